"""Full checkpoints of quantized models, also from shards, in the format of bitsandbytes and ``transformers``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_cl.core.distributed import gather_on_rank_zero, rank
from lightning_cl.core.imports import require
from lightning_cl.core.state import full_tensor, reshard
from lightning_cl.quantization.layers import int8_scales, is_int8, is_quantized
from lightning_cl.quantization.names import places
from lightning_cl.quantization.writer import CheckpointWriter, Planned

__all__ = [
    "Entry",
    "base_entries",
    "hf_model",
    "quantized_state_dict",
    "save_quantized",
    "write_config",
    "write_entries",
]

SHARD_BYTES = 5 * 10**9


class Entry(NamedTuple):
    """A tensor of a checkpoint, and the function that makes it; all ranks must call it, in the same order."""

    planned: Planned
    make: Callable[[], Tensor]


def base_entries(module: nn.Module) -> Iterator[tuple[str, Any, Tensor]]:
    """Yield what a checkpoint of the base model of ``module`` holds: names, the modules they belong to, tensors.

    Shared tensors come once, under their first name; adapters are left out.
    """
    seen: set[int] = set()
    for place in places(module):
        if place.name is None or place.adapter or not place.persistent or id(place.tensor) in seen:
            continue
        seen.add(id(place.tensor))
        yield place.name, place.module, place.tensor


def _quantized_entries(module: nn.Module) -> Iterator[Entry]:
    for name, layer, tensor in base_entries(module):
        yield Entry(Planned(name, tensor.dtype, tuple(tensor.shape)), partial(full_tensor, tensor))
        if is_quantized(layer) and name.rpartition(".")[2] == "weight":
            for suffix, value in _state(layer).items():
                stem = name if suffix not in ("SCB", "weight_format") else name.removesuffix(".weight")
                yield Entry(Planned(f"{stem}.{suffix}", value.dtype, tuple(value.shape)), partial(full_tensor, value))


def _state(layer: Any) -> dict[str, Tensor]:
    if is_int8(layer):
        return {"SCB": int8_scales(layer), "weight_format": torch.tensor(0, dtype=torch.uint8)}
    state: dict[str, Tensor] = layer.quant_state.as_dict(packed=True)
    return state


def quantized_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Return all weights of the base model in full, with the quantization states that a sharded state dict loses.

    Parameters are gathered one by one, and kept on the CPU of rank 0 only. Adapters are left out.

    Args:
        module: A quantized module, sharded or not; all ranks must call this.

    Returns:
        On rank 0 the tensors by their names in a checkpoint, with the entries of bitsandbytes (``...weight.absmax``,
        ...); on other ranks an empty dict.
    """
    reshard(module)
    state = {}
    for planned, make in _quantized_entries(module):
        value = make()
        if rank() == 0:
            state[planned.name] = value.cpu()
    return state


def save_quantized(module: nn.Module, folder: str | Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the quantized base model so that ``transformers`` loads it by ``from_pretrained``.

    Rank 0 writes, tensor by tensor. Adapters are written by :func:`~lightning_cl.adapters.export`.

    Args:
        module: A quantized Hugging Face model, also under PEFT or in a LightningModule, sharded or not; all ranks must
            call this.
        folder: Gets ``config.json`` and the safetensors files.
        shard_bytes: Size beyond which a file is split.

    Raises:
        ValueError: If ``module`` holds no Hugging Face model, or none that is quantized.
    """
    model = hf_model(module)
    if not any(is_quantized(layer) for layer in model.modules()):
        raise ValueError("`save_quantized` got a model without quantized layers; `save_pretrained` writes such a one.")
    reshard(module)
    write_entries(list(_quantized_entries(model)), Path(folder), shard_bytes)
    write_config(model, model.config, Path(folder))


def write_entries(entries: list[Entry], folder: Path, shard_bytes: int) -> None:
    """Make the tensors of ``entries`` one after the other on all ranks, and write them on rank 0."""
    if rank() != 0:
        for entry in entries:
            entry.make()
        return
    with CheckpointWriter(folder, [entry.planned for entry in entries], shard_bytes) as writer:
        for planned, make in entries:
            writer.write(planned.name, make())


def hf_model(module: nn.Module) -> Any:
    """Return the outermost Hugging Face model in ``module``.

    Raises:
        ValueError: If there is none, or several beside each other.
    """
    base = require("transformers", extra="llm").PreTrainedModel
    found: dict[str, Any] = {}
    for name, child in module.named_modules():
        if isinstance(child, base) and not any(f"{name}.".startswith(f"{outer}.") for outer in found):
            found[name] = child
    if not found:
        raise ValueError(f"{type(module).__name__} holds no Hugging Face model, whose format this export has.")
    # one that is the module itself has no name, and all others are in it
    if len(found) > 1 and "" not in found:
        raise ValueError(
            f"{type(module).__name__} holds several Hugging Face models, {list(found)}, and a folder holds one: call"
            " this for each of them with the model itself."
        )
    return next(iter(found.values()))


def write_config(model: Any, config: Any, folder: Path) -> None:
    """Write what ``from_pretrained`` reads beside the weights, on rank 0; the other ranks wait for it."""
    if rank() == 0:
        # FSDP2 gives a sharded model a class of its own, which is no architecture
        classes = [cls for cls in type(model).__mro__ if not cls.__module__.startswith("torch.distributed")]
        config.architectures = [classes[0].__name__]
        config.save_pretrained(folder)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(folder)
    gather_on_rank_zero(None)
