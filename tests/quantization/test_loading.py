"""Weights go from a checkpoint into a skeleton block by block, and never stand in memory in full precision."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForSequenceClassification

from lightning_cl.adapters import add_adapters
from lightning_cl.core.state import local
from lightning_cl.quantization import (
    CheckpointReader,
    build_skeleton,
    fill_block,
    load_quantized,
    quantization_bytes,
    quantize_base,
    save_quantized,
)
from lightning_cl.quantization.loading import give_back_freed_memory
from lightning_cl.quantization.names import checkpoint_name, places
from llamas import LORA, TOKENS, logits, save_llama, tiny_config, tiny_llama
from ranks import Ranks


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    """Processes of their own for each test: what one frees would hide what the next takes."""
    group = Ranks(2)
    yield group
    group.close()


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize("mode", ["nf4", "int8"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_equals_quantized_in_memory(mode, tied, dtype, tmp_path):
    """The same bits, with an output layer of its own or tied to the embeddings."""
    save_llama(tmp_path, tie_word_embeddings=tied)
    streamed = load_quantized(tmp_path, mode=mode, compute_dtype=dtype)
    expected = quantize_base(tiny_llama(tie_word_embeddings=tied), mode=mode, compute_dtype=dtype)
    assert torch.equal(logits(streamed), logits(expected))
    assert (streamed.lm_head.weight is streamed.model.embed_tokens.weight) == tied
    assert not any(parameter.requires_grad for parameter in streamed.parameters())
    assert not streamed.training


def test_unquantized_skeleton_is_filled_too(tmp_path):
    """In the dtype of the skeleton."""
    reader = CheckpointReader(save_llama(tmp_path))
    for dtype in (torch.float32, torch.bfloat16):
        model = build_skeleton(tmp_path, dtype=dtype)
        fill_block(model, "", reader, "cpu")
        assert torch.equal(logits(model), logits(tiny_llama().to(dtype) if dtype == torch.float32 else _cast(dtype)))
        assert all(parameter.requires_grad for parameter in model.parameters())


def _cast(dtype: torch.dtype) -> nn.Module:
    model = tiny_llama()
    for parameter in model.parameters():  # buffers stay in float32
        parameter.data = parameter.data.to(dtype)
    return model


def test_block_by_block_with_adapters(tmp_path):
    """Names are those under PEFT; LoRA starts with B = 0, and equal seeds give equal factors."""
    reader = CheckpointReader(save_llama(tmp_path))
    factors = []
    for _ in range(2):
        model = quantize_base(build_skeleton(tmp_path), compute_dtype=torch.float32)
        adapted = add_adapters(model, LORA)
        assert all(parameter.is_meta for parameter in adapted.parameters())
        torch.manual_seed(5)
        for index, block in enumerate(model.model.layers):
            fill_block(block, f"base_model.model.model.layers.{index}", reader, "cpu")
        assert model.model.embed_tokens.weight.is_meta
        first = model.model.layers[0].self_attn.q_proj.base_layer.weight
        fill_block(adapted, "", reader, "cpu")
        assert model.model.layers[0].self_attn.q_proj.base_layer.weight is first  # left alone
        factors.append({n: p for n, p in adapted.named_parameters() if p.requires_grad})
    assert torch.equal(logits(adapted), logits(quantize_base(tiny_llama(), compute_dtype=torch.float32)))
    assert len(factors[0]) == 28
    assert all(torch.equal(value, factors[1][name]) for name, value in factors[0].items())
    assert all(value.abs().sum() > 0 for name, value in factors[0].items() if "lora_A" in name)


def test_whole_modules_that_train_are_filled_as_well(tmp_path):
    """PEFT's copies of `modules_to_save` start from the checkpoint."""
    save_llama(tmp_path)
    model = quantize_base(build_skeleton(tmp_path))
    adapted = add_adapters(model, {**LORA, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]})
    fill_block(adapted, "", CheckpointReader(tmp_path), "cpu")
    copy = model.lm_head.modules_to_save["default"].weight
    assert torch.equal(copy, tiny_llama().lm_head.weight.to(torch.bfloat16))
    assert copy.requires_grad
    assert copy is not model.lm_head.original_module.weight


def test_head_that_the_checkpoint_lacks_starts_fresh(tmp_path):
    """As the model starts it, on all ranks alike; a plain layer by its own `reset_parameters`."""
    save_llama(tmp_path)
    reader = CheckpointReader(tmp_path, ignore=["lm_head.*"])
    heads = []
    for _ in range(2):
        model = build_skeleton(tmp_path, auto_class="AutoModelForSequenceClassification", num_labels=3)
        assert isinstance(model, LlamaForSequenceClassification)
        torch.manual_seed(7)
        fill_block(model, "", reader, "cpu", fresh=["score.*"])
        heads.append(model.score.weight)
    assert torch.equal(*heads)
    assert heads[0].std().item() == pytest.approx(model.config.initializer_range, rel=0.2)
    assert torch.equal(model.model.embed_tokens.weight, tiny_llama().model.embed_tokens.weight)

    save_file({"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").unlink()
    with torch.device("meta"):
        plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    fill_block(plain, "", CheckpointReader(tmp_path), "cpu", fresh=["1.*"])
    assert torch.equal(plain[0].weight, torch.ones(2, 2))
    assert 0 < plain[1].weight.abs().max() < 1


@pytest.mark.parametrize("mode", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_quantized_checkpoint_is_taken_as_it_is(mode, double_quant, tmp_path):
    """What `save_quantized` wrote, also with another storage dtype."""
    settings = {"mode": mode, "double_quant": double_quant, "compute_dtype": torch.float32}
    model = quantize_base(tiny_llama(), **settings)
    save_quantized(model, tmp_path)
    again = load_quantized(tmp_path, storage_dtype=torch.uint8, **settings)
    assert torch.equal(logits(again), logits(model))
    assert quantization_bytes(again) == quantization_bytes(model)
    if mode == "nf4":
        with pytest.raises(ValueError, match=r"was quantized with .*Give it the settings of the checkpoint"):
            load_quantized(tmp_path, mode="fp4", double_quant=double_quant, compute_dtype=torch.float32)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.layers.0._checkpoint_wrapped_module.mlp", "model.layers.0.mlp"),
        ("base_model.model.score.original_module.weight", "score.weight"),
        ("model.layers.0", "model.layers.0"),
    ],
)
def test_names_are_seen_through_wrappers(name, expected):
    """What PEFT and activation checkpointing put into a name is taken out."""
    assert checkpoint_name(name) == expected


def test_places_are_the_tensors_of_the_base_model():
    """Under PEFT, with copies of whole modules, the names of the base model come out again."""
    names = {name for name, _ in tiny_llama().named_parameters()}
    config = {**LORA, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    adapted = add_adapters(tiny_llama(), config)
    found = [place for place in places(adapted) if not place.buffer]
    assert len(found) == len(list(adapted.parameters()))
    assert {place.name for place in found if not place.adapter} == names
    assert {place.name for place in found if place.adapter} == {None, "lm_head.weight"}
    assert all(place.tensor.requires_grad == place.adapter for place in found)


# ---------------------------------------------------------------------- errors


def edited(folder: Path, edit: Any) -> CheckpointReader:
    """Return a reader of the checkpoint in one file, after a change of its tensors."""
    save_llama(folder, shard_size="1GB")
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return CheckpointReader(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"lacks 1 of the tensors .*layers.1.mlp.up_proj.weight"),
        (lambda t: t.update({"model.layers.1.extra": torch.ones(1)}), r"has 1 tensors .*layers.1.extra.*ignore="),
        (lambda t: t.update({"model.norm.weight": torch.ones(32)}), r"norm.weight' in the shape \(32,\).*has \(64,\)"),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(64, 64)}),
            r"up_proj.weight' in the shape \(64, 64\).*has \(128, 64\)",
        ),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused(edit, message, tmp_path):
    """A tensor missing, left over or of another shape; nothing is read before."""
    reader = edited(tmp_path, edit)
    model = quantize_base(build_skeleton(tmp_path))
    with pytest.raises(ValueError, match=message):
        fill_block(model, "", reader, "cpu")
    assert all(parameter.is_meta for parameter in model.parameters())


def test_buffers_without_values_are_refused(tmp_path):
    """A model that was built on the meta device as a whole has lost what no checkpoint holds."""
    reader = CheckpointReader(save_llama(tmp_path))
    with torch.device("meta"):
        model = type(tiny_llama())(tiny_config())
    with pytest.raises(ValueError, match=r"inv_freq.*`build_skeleton`"):
        fill_block(model, "", reader, "cpu")


@pytest.mark.parametrize("change", [{"use_dora": True}, {"init_lora_weights": "gaussian"}, {"peft_type": "IA3"}])
def test_adapters_that_read_the_base_cannot_start_on_a_skeleton(change):
    """They are refused before they would start with nonsense."""
    config = {"target_modules": ["q_proj"], "feedforward_modules": []} if "peft_type" in change else LORA
    with pytest.raises(ValueError, match=r"the model is on the meta device. Load it first"):
        add_adapters(build_skeleton(tiny_config()), {**config, **change})


# ---------------------------------------------------------------------- shards and memory


def fill_and_shard(folder: Path, dtype: torch.dtype) -> torch.Tensor:
    """Return the logits of a model that was filled and sharded block by block."""
    model = quantize_base(build_skeleton(folder), compute_dtype=dtype)
    adapted = add_adapters(model, LORA)
    reader = CheckpointReader(folder)
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2,))
    for index, block in enumerate(model.model.layers):
        fill_block(block, f"model.layers.{index}", reader, "cpu")
        fully_shard(block, mesh=mesh)
    fill_block(adapted, "", reader, "cpu")
    fully_shard(adapted, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in adapted.parameters())
    return logits(adapted)


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filled_and_sharded_block_by_block(ranks, dtype, tmp_path):
    """On two ranks the logits are those of the whole model, bit by bit."""
    expected = logits(load_quantized(save_llama(tmp_path), compute_dtype=dtype))
    for result in ranks.run(fill_and_shard, tmp_path, dtype):
        assert torch.equal(result, expected)


def resident(key: str) -> int:
    """Return a number of bytes from what Linux says about this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def peak_of_loading(folder: Path, split: bool) -> tuple[float, float]:
    """Return the peak of resident memory above the start, and this rank's shard and one block in full precision."""
    model = quantize_base(build_skeleton(folder), compute_dtype=torch.bfloat16)
    reader = CheckpointReader(folder)
    give_back_freed_memory()
    start = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    if split:
        mesh = init_device_mesh("cpu", (2,))
        for index, block in enumerate(model.model.layers):
            fill_block(block, f"model.layers.{index}", reader, "cpu")
            fully_shard(block, mesh=mesh)
        fill_block(model, "", reader, "cpu")
        fully_shard(model, mesh=mesh)
    else:
        fill_block(model, "", reader, "cpu")
    peak = resident("VmHWM") - start
    held = sum(local(parameter).nbytes for parameter in model.parameters()) + quantization_bytes(model)["state"]
    block = sum(reader.nbytes(name) for name in reader.names("model.layers.0"))
    return peak / 2**20, (held + block) / 2**20


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux, to read the peak of memory")
@pytest.mark.parametrize("split", [False, True], ids=["one process", "two ranks"])
def test_peak_is_the_shard_and_one_block(ranks, split, tmp_path):
    """A model of 222 MB: at most 1.1 times what a rank keeps and one block in full precision (51 MB)."""
    save_llama(
        tmp_path, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, vocab_size=2048, shard_size="80MB"
    )
    for peak, bound in ranks.run(peak_of_loading, tmp_path, split):
        print(f"peak {peak:.1f} MiB, bound {bound:.1f} MiB")
        assert bound / 4 < peak < 1.1 * bound


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_streamed_to_the_gpu(tmp_path):
    """Weights are quantized there, and the model computes what it computes on the CPU, nearly."""
    save_llama(tmp_path)
    model = load_quantized(tmp_path, device="cuda", compute_dtype=torch.float32)
    assert all(tensor.is_cuda for tensor in (*model.parameters(), *model.buffers()))
    on_cpu = load_quantized(tmp_path, compute_dtype=torch.float32)
    assert torch.allclose(logits(model, TOKENS.cuda()).cpu(), logits(on_cpu), atol=1e-2)
