"""Full checkpoints of quantized models load in plain transformers, from shards too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from lightning_cl.adapters import add_adapters
from lightning_cl.quantization import quantize_base, quantized_state_dict, save_quantized
from llamas import LORA, logits, perturb, shard, tiny_llama
from ranks import Ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Two processes for all tests of the file."""
    group = Ranks(2)
    yield group
    group.close()


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Return whether two tensors hold the same bytes; packed ones pass for floats that may be NaN."""
    return ours.dtype == theirs.dtype and torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (ours, theirs)))


@pytest.mark.parametrize("mode", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_reloads_in_transformers(mode, dtype, tied, tmp_path):
    """The same logits, bit by bit, without a word about the quantization."""
    model = quantize_base(tiny_llama(tie_word_embeddings=tied), mode=mode, compute_dtype=dtype)
    save_quantized(model, tmp_path, shard_bytes=40_000)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert reloaded.dtype == dtype
    assert torch.equal(logits(reloaded), logits(model))


def test_state_dict_is_that_of_bitsandbytes():
    """Names, dtypes and values are what the unsharded model's own state dict holds."""
    model = quantize_base(tiny_llama())
    ours, theirs = quantized_state_dict(model), model.state_dict()
    assert sorted(ours) == sorted(theirs)
    assert all(same_bits(ours[name], value) for name, value in theirs.items())
    name = "model.layers.0.mlp.up_proj.weight"
    assert {f"{name}.absmax", f"{name}.nested_absmax", f"{name}.quant_state.bitsandbytes__nf4"} <= ours.keys()


def save_from_shards(folder: Path) -> tuple[list[str], bool]:
    """Return the names that the rank keeps, after all ranks saved; and whether the model still computes as before."""
    model = quantize_base(tiny_llama(), compute_dtype=torch.float32)
    expected = quantized_state_dict(model)
    before = logits(model)
    adapted = add_adapters(model, LORA)
    perturb(adapted)
    shard(adapted, model)
    adapted_before = logits(adapted)
    save_quantized(adapted, folder)
    state = quantized_state_dict(adapted)
    assert (folder / "config.json").is_file()  # on every rank, as soon as the call returns
    if torch.distributed.get_rank() == 0:
        assert all(same_bits(state[name], value) for name, value in expected.items())
    assert not torch.equal(adapted_before, before)
    return sorted(state), torch.equal(logits(adapted), adapted_before)


@pytest.mark.distributed
def test_shards_get_their_state_back(ranks, tmp_path):
    """Two ranks: the base without its adapters, whole on rank 0 only, and transformers loads it."""
    model = quantize_base(tiny_llama(), compute_dtype=torch.float32)
    (names, unchanged), (others, _) = ranks.run(save_from_shards, tmp_path)
    assert names == sorted(model.state_dict())
    assert others == []
    assert unchanged
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert reloaded.config.architectures == ["LlamaForCausalLM"]
    assert torch.equal(logits(reloaded), logits(model))


def test_unquantized_models_are_refused(tmp_path):
    """Their own `save_pretrained` serves them; a module without a Hugging Face model has no such format."""
    with pytest.raises(ValueError, match="without quantized layers; `save_pretrained`"):
        save_quantized(tiny_llama(), tmp_path)
    with pytest.raises(ValueError, match="holds no Hugging Face model"):
        save_quantized(quantize_base(torch.nn.Sequential(torch.nn.Linear(64, 8))), tmp_path)
