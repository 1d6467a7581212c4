"""Adapters go into plain and packed models, and refuse what would train unsynchronised."""

from __future__ import annotations

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import nn

from lightning_cl.adapters import add_adapters
from lightning_cl.quantization import quantize_base
from llamas import LORA, TOKENS, logits, tiny_llama


@pytest.mark.parametrize("config", [LORA, peft.LoraConfig(r=4, target_modules="all-linear")], ids=["dict", "config"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("storage", [None, torch.uint8])
def test_adapters_have_the_compute_dtype(config, dtype, storage):
    """Whatever dtype the packed bytes pass for; nothing else trains, and the model computes as before."""
    model = quantize_base(tiny_llama(), compute_dtype=dtype, storage_dtype=storage)
    expected = logits(model)
    adapted = add_adapters(model, config)
    assert isinstance(adapted, peft.PeftModel)
    trainable = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trainable) == 28
    assert {p.dtype for p in trainable.values()} == {dtype}
    assert all("lora_" in name for name in trainable)
    assert torch.equal(logits(adapted), expected)


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "LORA", "use_dora": True, "target_modules": ["q_proj"]},
        {"peft_type": "LORA", "init_lora_weights": "gaussian", "use_rslora": True, "target_modules": ["q_proj"]},
        {"peft_type": "ia3", "target_modules": ["k_proj"], "feedforward_modules": []},
        {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3},
    ],
    ids=lambda config: config["peft_type"],
)
def test_any_config_of_peft_serves_a_model_with_weights(config):
    """Also in the dict form of YAML; something trains."""
    adapted = add_adapters(tiny_llama(), config)
    adapted(input_ids=torch.arange(8).view(1, 8), labels=torch.arange(8).view(1, 8)).loss.backward()
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    assert trainable
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trainable)


def test_prompts_have_the_compute_dtype():
    """PEFT follows the base layer's dtype for factors in layers only."""
    prompts = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    adapted = add_adapters(quantize_base(tiny_llama()), prompts)
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.bfloat16}
    assert adapted(input_ids=torch.arange(8).view(1, 8)).logits.isfinite().all()


@pytest.mark.parametrize("mode", [None, "nf4"])
def test_adapters_of_a_float16_model_are_float32(mode):
    """As the scaler of gradients needs it; what PEFT does not cast around keeps the model's dtype, and computes."""
    config = {**LORA, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    model = tiny_llama().to(torch.float16)
    model = model if mode is None else quantize_base(model, mode=mode, compute_dtype=torch.float16)
    adapted = add_adapters(model, config)
    trainable = {name: p.dtype for name, p in adapted.named_parameters() if p.requires_grad}
    assert {dtype for name, dtype in trainable.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in trainable.items() if "lora_" not in name} == {torch.float16}
    adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert adapted(input_ids=TOKENS).logits.dtype == torch.float16
    prompts = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    prompted = add_adapters(tiny_llama().to(torch.float16), prompts)
    assert {p.dtype for p in prompted.parameters() if p.requires_grad} == {torch.float16}
    assert prompted(input_ids=TOKENS).logits.isfinite().all()


def test_packed_layers_of_any_module_are_known_to_peft():
    """Not only in models of Hugging Face: PEFT would take the layer for a plain one."""
    model = quantize_base(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)), compute_dtype=torch.float32, skip=["1"])
    adapted = add_adapters(model, {"peft_type": "LORA", "r": 2, "target_modules": ["0"]})
    assert type(adapted.base_model.model[0]).__module__ == "peft.tuners.lora.bnb"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"r": 4}, "a dict with `peft_type`"),
        ("LORA", "a dict with `peft_type`"),
        ({"peft_type": "LORRA"}, "`peft_type` must be one of.*'LORA'.*got 'LORRA'"),
        ({"peft_type": "LORA", "rank": 4}, "does not fit LoraConfig.*rank"),
    ],
)
def test_wrong_configs_are_refused(config, message):
    """With the names that would do."""
    with pytest.raises(ValueError, match=message):
        add_adapters(tiny_llama(), config)


def test_second_adapters_are_refused():
    """PEFT's own call adds them, to the same model."""
    with pytest.raises(ValueError, match=r"with adapters; `PeftModel.add_adapter`"):
        add_adapters(add_adapters(tiny_llama(), LORA), LORA)


PACKED = {
    "nf4": {"compute_dtype": torch.float32},
    "nf4 in bytes": {"compute_dtype": torch.float32, "storage_dtype": torch.uint8},
    "int8": {"compute_dtype": torch.float32, "mode": "int8"},
}


def lora(start, **settings):
    """A config of LoRA on the query projections."""
    return peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start, **settings)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "mica"])
@pytest.mark.parametrize("packing", PACKED.values(), ids=PACKED.keys())
def test_starts_from_base_weights_are_refused_on_packed_ones(packing, start):
    """PEFT fails with errors of shapes and dtypes, or packs other weights."""
    model = quantize_base(tiny_llama(), **packing)
    with pytest.raises(ValueError, match=r"the model is quantized.*`init_lora_weights=True`.*loftq"):
        add_adapters(model, lora(start))
    assert not any("lora" in name for name, _ in model.named_modules())


def test_loftq_on_packed_weights_is_refused():
    """They would be quantized a second time."""
    config = lora("loftq", loftq_config=peft.LoftQConfig(loftq_bits=4))
    with pytest.raises(ValueError, match=r"'loftq'.*the model is quantized"):
        add_adapters(quantize_base(tiny_llama()), config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="PEFT quantizes on the GPU that is here")
def test_loftq_without_a_gpu_is_refused():
    """PEFT says that torch is not compiled with CUDA."""
    with pytest.raises(ValueError, match=r"'loftq'` quantizes on a GPU, and PEFT finds none here"):
        add_adapters(tiny_llama(), lora("loftq", loftq_config=peft.LoftQConfig(loftq_bits=4)))


def test_orthogonal_start_needs_packed_weights_of_a_floating_dtype():
    """PEFT gives the factors the dtype of the packed weight."""
    for packing in ("nf4 in bytes", "int8"):
        with pytest.raises(ValueError, match=r"'orthogonal'.*the model is quantized"):
            add_adapters(quantize_base(tiny_llama(), **PACKED[packing]), lora("orthogonal"))
    model = quantize_base(tiny_llama(), **PACKED["nf4"])
    expected = logits(model)
    torch.testing.assert_close(logits(add_adapters(model, lora("orthogonal"))), expected)


@pytest.mark.parametrize(
    ("start", "settings", "message"),
    [
        ("eva", {"eva_config": peft.EvaConfig()}, r"plain LoRA until.*one adapter.*AdapterStart\('eva'\)"),
        (
            "corda",
            {"corda_config": CordaConfig()},
            r"preprocess_corda.*AdapterStart\('corda'\)",
        ),
        ("lora_ga", {"lora_ga_config": LoraGAConfig()}, "plain LoRA without the gradients"),
    ],
)
def test_starts_without_what_they_are_computed_from_are_refused(start, settings, message):
    """PEFT starts as plain LoRA and says nothing, or fails when the model is half changed."""
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        add_adapters(model, lora(start, **settings))
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora", "mica", "gaussian", "orthogonal"])
def test_starts_of_peft_on_unpacked_weights_keep_the_outputs(start):
    """Also those that take a part out of the base weight for the one adapter."""
    model = tiny_llama()
    expected = logits(model)
    torch.testing.assert_close(logits(add_adapters(model, lora(start))), expected, rtol=0, atol=1e-6)


def test_corda_starts_after_its_own_preparation():
    """What PEFT computed from the context is used."""
    config = lora("corda", corda_config=CordaConfig(corda_method="kpm"))
    model = tiny_llama()
    expected = logits(model)
    tokens = torch.randint(96, (64, 1, 12), generator=torch.Generator().manual_seed(0))
    preprocess_corda(model, config, run_model=lambda: [logits(model, row) for row in tokens])
    adapted = add_adapters(model, config)
    assert adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.norm() > 1e-4
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=1e-5)
