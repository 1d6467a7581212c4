"""Adapters go into plain and packed models, and refuse what would train unsynchronised."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from lightning_cl.adapters import add_adapters
from lightning_cl.quantization import quantize_base
from llamas import LORA, logits, tiny_llama


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
