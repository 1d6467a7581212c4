"""Adapters load in plain PEFT, merged models in plain transformers, also from shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from lightning_cl.adapters import AdapterSlots, add_adapters, export
from lightning_cl.modules import CausalLM
from lightning_cl.quantization import dequantize, load_quantized, quantize_base
from lightning_cl.strategies import FSDP2Strategy
from llamas import LORA, TOKENS, logits, perturb, save_llama, shard, tiny_llama
from ranks import Ranks

# PEFT 0.21 asks for it by the name that transformers 5.23 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

HEADS = {**LORA, "use_rslora": True, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
WITH_ALL = [pytest.param(LORA, id="all-linear"), pytest.param(HEADS, id="embeddings and a whole head")]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Two processes for all tests of the file."""
    group = Ranks(2)
    yield group
    group.close()


def base(mode: str | None, dtype: torch.dtype, **changes: Any) -> LlamaForCausalLM:
    """Return the base model, quantized or not."""
    model = tiny_llama(**changes)
    return model if mode is None else quantize_base(model, mode=mode, compute_dtype=dtype)


def original(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the base model as it was before it was quantized."""
    tiny_llama().to(dtype).save_pretrained(folder, max_shard_size="60KB")
    return folder


def adapted(mode: str | None, dtype: torch.dtype, config: dict[str, Any]) -> peft.PeftModel:
    """Return a base model with adapters that do something."""
    model = add_adapters(base(mode, dtype), config)
    perturb(model)
    return model


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    return ((value.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.parametrize("config", WITH_ALL)
@pytest.mark.parametrize(
    ("mode", "dtype"),
    [("nf4", torch.float32), ("nf4", torch.bfloat16), ("int8", torch.float32), (None, torch.float32)],
)
def test_adapters_load_in_plain_peft(mode, dtype, config, tmp_path):
    """On a fresh base the logits are the same, bit by bit."""
    model = adapted(mode, dtype, config)
    export(nn.ModuleList([model]), tmp_path)  # as a LightningModule holds it
    fresh = base(mode, dtype)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(base(mode, dtype)))


def test_adapters_of_other_names_are_exported(tmp_path):
    """Each into a folder of its own, as PEFT does."""
    model = adapted(None, torch.float32, LORA)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    export(model, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert (tmp_path / "second" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("config", WITH_ALL)
@pytest.mark.parametrize("mode", ["nf4", "fp4", "int8", None])
def test_merged_loads_in_plain_transformers(mode, config, tmp_path):
    """In float32 the logits are those of the model with adapters, to a relative 1e-6; in bfloat16 to 1e-2."""
    model = adapted(mode, torch.float32, config)
    expected = logits(model)
    export(model, tmp_path / "float32", "dequantized", shard_bytes=60_000)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "float32")
    assert len(list((tmp_path / "float32").glob("*.safetensors"))) > 2
    assert merged.dtype == torch.float32
    assert not hasattr(merged.config, "quantization_config")
    assert relative(logits(merged), expected) < 1e-6
    assert relative(logits(base(mode, torch.float32)), expected) > 0.05
    export(model, tmp_path / "bfloat16", "dequantized", dtype=torch.bfloat16)
    rounded = LlamaForCausalLM.from_pretrained(tmp_path / "bfloat16")
    assert rounded.dtype == torch.bfloat16
    assert 1e-3 < relative(logits(rounded), expected) < 1e-2


def test_merged_weight_is_dequantized_plus_delta(tmp_path):
    """A small adapter is kept, which PEFT's merge into packed weights loses; the model is left as it was."""
    model = adapted("nf4", torch.float32, {**LORA, "target_modules": ["q_proj"]})
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(1e-2)
    before = logits(model)
    delta = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    weight = dequantize(layer.base_layer)
    assert delta.norm() / weight.norm() < 0.05
    export(model, tmp_path, "dequantized")
    written = LlamaForCausalLM.from_pretrained(tmp_path).model.layers[0].self_attn.q_proj.weight
    assert relative((written - weight).detach(), delta.detach()) < 1e-5
    assert torch.equal(logits(model), before)


def test_quantized_model_without_adapters_is_unpacked(tmp_path):
    """The same weights in a plain model."""
    model = base("nf4", torch.float32)
    export(model, tmp_path, "dequantized")
    assert relative(logits(LlamaForCausalLM.from_pretrained(tmp_path)), logits(model)) < 1e-6


@pytest.mark.parametrize("config", WITH_ALL)
@pytest.mark.parametrize("mode", ["nf4", "int8", None])
def test_original_weights_take_the_delta(mode, config, tmp_path):
    """As merged by PEFT on the base before it was quantized; training saw that base with a quantization error."""
    model = adapted(mode, torch.float32, config)
    seen = logits(model)
    export(model, tmp_path / "new", "original16", base=original(tmp_path / "base"), shard_bytes=60_000)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "new")
    export(model, tmp_path / "adapters")
    plain = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapters")
    assert relative(logits(merged), logits(plain)) < 1e-6
    assert relative(logits(plain.merge_and_unload()), logits(merged)) < 1e-6
    of_base = relative(logits(base(mode, torch.float32)), logits(tiny_llama()))
    if mode is None:
        assert relative(logits(merged), seen) < 1e-6
    else:
        assert of_base > 1e-3
        assert 0.05 * of_base < relative(logits(merged), seen) < 1.5 * of_base


def test_original_weights_keep_their_dtype(tmp_path):
    """In bfloat16 every weight is within half a unit in the last place of the sum; another dtype may be asked for."""
    model = adapted("nf4", torch.float32, LORA)
    folder = original(tmp_path / "base", torch.bfloat16)
    export(model, tmp_path / "new", "original16", base=folder)
    export(model, tmp_path / "wide", "original16", base=folder, dtype=torch.float32)
    rounded, exact = (LlamaForCausalLM.from_pretrained(tmp_path / name) for name in ("new", "wide"))
    assert (rounded.dtype, exact.dtype) == (torch.bfloat16, torch.float32)
    for name, weight in exact.named_parameters():
        assert torch.equal(rounded.get_parameter(name), weight.to(torch.bfloat16)), name
    assert 1e-4 < relative(logits(rounded), logits(exact)) < 1e-2


def export_from_shards(folder: Path, mode: str | None, config: dict[str, Any]) -> torch.Tensor:
    """Export a sharded model in both forms, and return its logits."""
    model = adapted(mode, torch.float32, config)
    shard(model, model.base_model.model)
    before = logits(model)
    export(model, folder / "adapters")
    export(model, folder / "merged", "dequantized", shard_bytes=60_000)
    export(model, folder / "new", "original16", base=folder / "base")
    assert (folder / "merged" / "config.json").is_file()  # on every rank, as soon as the call returns
    assert torch.equal(logits(model), before)
    return before


@pytest.mark.distributed
@pytest.mark.parametrize(("mode", "config"), [("nf4", LORA), ("nf4", HEADS), (None, LORA)])
def test_exports_from_shards(ranks, mode, config, tmp_path):
    """Two ranks write what one process would."""
    original(tmp_path / "base")
    expected, other = ranks.run(export_from_shards, tmp_path, mode, config)
    assert torch.equal(expected, other)
    loaded = peft.PeftModel.from_pretrained(base(mode, torch.float32), tmp_path / "adapters")
    assert torch.equal(logits(loaded), expected)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative(logits(merged), expected) < 1e-6
    plain = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapters")
    assert relative(logits(LlamaForCausalLM.from_pretrained(tmp_path / "new")), logits(plain)) < 1e-6


def export_after_fit(folder: Path) -> torch.Tensor:
    """Train a module that FSDP2 fills block by block, export from it, and return its logits."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    settings = {"quantization": {"mode": "nf4"}, "adapter": LORA, "dtype": "float32", "learning_rate": 1e-2}
    module = CausalLM(str(folder / "base"), **settings)
    trainer = Trainer(accelerator="cpu", devices=2, strategy=FSDP2Strategy(), max_steps=3, **quiet)
    loader = DataLoader([{"input_ids": row, "labels": row} for row in TOKENS], batch_size=1)
    trainer.fit(module, loader, loader)
    export(module, folder / "adapters")
    export(module, folder / "merged", "dequantized")
    with torch.no_grad():
        return module.train()(input_ids=TOKENS)


@pytest.mark.distributed
def test_exports_after_a_fit_under_the_strategy(tmp_path):
    """A 4-bit model that was streamed, sharded and trained by Lightning, in processes of their own."""
    save_llama(tmp_path / "base")
    group = Ranks(2)
    expected, other = group.run(export_after_fit, tmp_path)
    group.close()
    assert torch.equal(expected, other)
    fresh = load_quantized(tmp_path / "base", compute_dtype=torch.float32)
    assert relative(logits(fresh), expected) > 0.01  # it was trained
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapters")
    assert torch.equal(logits(loaded), expected)
    assert relative(logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged")), expected) < 1e-6


def test_what_cannot_be_merged_is_refused(tmp_path):
    """Other adapters, weights that are shared, adapters that are merged already; modules without adapters."""
    dora = add_adapters(tiny_llama(), {**LORA, "use_dora": True})
    ia3 = add_adapters(tiny_llama(), {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []})
    for model in (dora, ia3):
        with pytest.raises(ValueError, match=r"merges plain LoRA.*`into='factors'`"):
            export(model, tmp_path, "dequantized")
    with pytest.warns(UserWarning, match="a tied layer is part of the adapter"):
        shared = add_adapters(tiny_llama(tie_word_embeddings=True), {**LORA, "target_modules": ["embed_tokens"]})
    with pytest.raises(ValueError, match=r"embed_tokens.weight' is shared"):
        export(shared, tmp_path, "dequantized")
    merged = adapted(None, torch.float32, LORA)
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"merged already. Unmerge them"):
        export(merged, tmp_path, "dequantized")
    with pytest.raises(ValueError, match=r"holds no `peft.PeftModel`"):
        export(tiny_llama(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("into", ["dequantized", "original16"])
def test_layers_of_gpt2_are_merged(into, tmp_path):
    """Their weights are [in, out], and not of `nn.Linear`."""
    torch.manual_seed(0)
    sizes = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, bos_token_id=0, eos_token_id=0, **sizes)).eval()
    model.save_pretrained(tmp_path / "base")
    lora = {**LORA, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    model = add_adapters(model, lora).eval()
    perturb(model)
    export(model, tmp_path / "merged", into, base=tmp_path / "base" if into == "original16" else None)
    loaded, start = (GPT2LMHeadModel.from_pretrained(tmp_path / name).eval() for name in ("merged", "base"))
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
        assert relative(loaded(input_ids=TOKENS).logits, expected) < 1e-6
        assert relative(start(input_ids=TOKENS).logits, expected) > 0.01


@pytest.mark.parametrize("into", ["factors", "dequantized"])
def test_one_model_is_exported_at_a_time(into, tmp_path):
    """A second one would be left out; given itself, each is written."""
    pair = nn.ModuleDict({name: adapted(None, torch.float32, LORA) for name in ("student", "tutor")})
    with pytest.raises(ValueError, match=r"several PEFT models, \['student', 'tutor'\].*the PeftModel itself"):
        export(pair, tmp_path, into)
    beside = nn.ModuleDict({"student": pair["student"], "plain": tiny_llama()})
    if into == "dequantized":
        with pytest.raises(ValueError, match=r"several Hugging Face models, \['student.base_model.model', 'plain'\]"):
            export(beside, tmp_path, into)
    assert list(tmp_path.iterdir()) == []
    export(pair["tutor"], tmp_path, into)
    if into == "factors":
        export(beside, tmp_path / "beside")
    assert (tmp_path / "config.json").exists() == (into == "dequantized")


def test_settings_of_another_format_are_refused(tmp_path):
    """They would be ignored; a base that is another model would be silently wrong."""
    model = adapted("nf4", torch.float32, LORA)
    with pytest.raises(ValueError, match=r"`into` must be one of .*'original16'"):
        export(model, tmp_path, "original")
    with pytest.raises(ValueError, match=r"`base` names the checkpoint.*got None with 'original16'"):
        export(model, tmp_path, "original16")
    with pytest.raises(ValueError, match=r"`base` names the checkpoint.*with 'dequantized'"):
        export(model, tmp_path, "dequantized", base=tmp_path)
    with pytest.raises(ValueError, match=r"`dtype` is that of merged weights"):
        export(model, tmp_path, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"`slots` are written beside factors"):
        export(model, tmp_path, "dequantized", slots=AdapterSlots())
    with pytest.raises(ValueError, match=r"`slots` is a AdapterSlots, and the adapters of PeftModel have"):
        export(model, tmp_path, slots=AdapterSlots())
    assert list(tmp_path.iterdir()) == []
    wider = save_llama(tmp_path / "wider", intermediate_size=256)
    with pytest.raises(
        ValueError, match=r"has \(256, 64\) as 'model.layers.0.mlp.gate_proj.weight', and the model \(128"
    ):
        export(model, tmp_path / "new", "original16", base=wider)
    shorter = save_llama(tmp_path / "shorter", num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"has nothing as 'model.layers.1.self_attn.q_proj.weight'"):
        export(model, tmp_path / "new", "original16", base=shorter)
    assert not (tmp_path / "new").exists()
