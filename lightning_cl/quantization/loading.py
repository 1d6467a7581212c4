"""Weights from a checkpoint into a skeleton, block by block: read, quantize, free."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cl.core.lazy import StartsItself
from lightning_cl.quantization.layers import (
    bitsandbytes,
    fill_layer,
    is_int8,
    is_quantized,
    rows_of_a_portion,
    set_packed_4bit,
    set_packed_int8,
)
from lightning_cl.quantization.names import Place, checkpoint_name, places
from lightning_cl.quantization.reader import CheckpointReader

__all__ = ["fill_block"]


def fill_block(
    block: nn.Module, prefix: str, reader: CheckpointReader, device: torch.device | str, *, fresh: Sequence[str] = ()
) -> None:
    """Bring all that ``block`` holds on the meta device to ``device``, with the values of a checkpoint.

    Tensors are read one after the other; a weight for a quantized layer in portions of its rows, so that it never
    stands in memory in full precision. Other tensors are cast to the dtype of the skeleton. What is not on the meta
    device is left alone: blocks that were filled (and sharded) before. LoRA factors start as PEFT starts them, from
    the CPU's random numbers: equal on all ranks that have equal seeds.

    Args:
        block: The module, or one block of it; adapters and wrappers in it are seen through.
        prefix: Name of the block in the checkpoint, ``""`` for the whole model; what PEFT puts before or into a name is
            taken out.
        reader: The checkpoint; one that :func:`~lightning_cl.quantization.save_quantized` wrote is taken as it is.
        device: Where the values go.
        fresh: Patterns of parameters that the checkpoint may lack, such as ``"score.*"``: they start as the model, or
            their layer, starts them.

    Raises:
        ValueError: If the checkpoint lacks a tensor, has one of another shape, or one that the block does not take.
    """
    device = torch.device(device)
    found = list(places(block, checkpoint_name(prefix)))
    _check_buffers(found)
    groups: defaultdict[int, list[Place]] = defaultdict(list)
    for place in found:
        if place.tensor.is_meta:
            groups[id(place.tensor)].append(place)
    sources, started, adapters = {}, [], []
    missing = []
    for key, group in groups.items():
        names = [place.name for place in group if place.name is not None]
        source = next((name for name in names if name in reader), None)
        if source is not None:
            sources[key] = source
        elif not names:
            adapters.append(group[0])
        elif any(fnmatch(name, pattern) for name in names for pattern in fresh):
            started.append(group)
        else:
            missing.append(names[0])
    _check_names(missing, found, checkpoint_name(prefix), reader)
    _check_shapes({name: groups[key][0] for key, name in sources.items()}, reader)

    reader.read_ahead(list(sources.values()))
    for key, name in sources.items():
        _fill(groups[key], name, reader, device)
        give_back_freed_memory()
    for group in started:
        _start(block, group, device)
    _start_adapters(block, adapters, device)


# ---------------------------------------------------------------------- checks


def _check_buffers(found: list[Place]) -> None:
    if lost := [place.name for place in found if place.buffer and not place.persistent and place.tensor.is_meta]:
        raise ValueError(
            f"The buffers {lost[:3]} are on the meta device, and no checkpoint holds them. Build the model with"
            " `build_skeleton`, which computes them."
        )


def _check_names(missing: list[str], found: list[Place], prefix: str, reader: CheckpointReader) -> None:
    if missing:
        raise ValueError(
            f"{reader.path} lacks {len(missing)} of the tensors of {prefix or 'the model'!r}, such as {missing[:3]}; it"
            f" has {reader.names(prefix)[:3] or reader.names()[:3]}. Is it a checkpoint of this architecture?"
            " Parameters that are new, such as the head of a classifier, are named by `fresh`."
        )
    taken = {place.name for place in found}
    packed = [f"{place.name}." for place in found if place.attribute == "weight" and is_quantized(place.module)]
    packed += [f"{p.name}".removesuffix("weight") for p in found if p.attribute == "weight" and _is_int8(p.module)]
    left = [n for n in reader.names(prefix) if n not in taken and not n.startswith(tuple(packed))]
    if left:
        raise ValueError(
            f"{reader.path} has {len(left)} tensors that {prefix or 'the model'!r} does not take, such as {left[:3]}."
            " Name those that may be left out by `CheckpointReader(..., ignore=[...])`."
        )


def _is_int8(module: nn.Module) -> bool:
    return is_quantized(module) and is_int8(module)


def _check_shapes(sources: dict[str, Place], reader: CheckpointReader) -> None:
    for name, place in sources.items():
        layer: Any = place.module
        wanted = place.tensor.shape
        if is_quantized(layer) and place.attribute == "weight" and not _is_packed(name, reader):
            wanted = torch.Size((layer.out_features, layer.in_features))
        shape = reader.shape(name)
        # packed bytes may pass for another dtype than the skeleton's
        if shape != wanted and not (_is_packed(name, reader) and shape[1:] == (1,)):
            raise ValueError(
                f"{reader.path} holds {name!r} in the shape {tuple(shape)}, the model has {tuple(wanted)}. Build the"
                " model from the config of the checkpoint."
            )


def _is_packed(name: str, reader: CheckpointReader) -> bool:
    return f"{name}.absmax" in reader or f"{name.removesuffix('weight')}SCB" in reader


# ---------------------------------------------------------------------- values


def give_back_freed_memory() -> None:
    """Return freed memory to the system: the allocator of glibc would keep several times what is in use."""
    with suppress(AttributeError, OSError):  # other C libraries
        ctypes.CDLL(None).malloc_trim(0)


def _fill(group: list[Place], name: str, reader: CheckpointReader, device: torch.device) -> None:
    place = group[0]
    layer: Any = place.module
    if is_quantized(layer) and place.attribute == "weight":
        if _is_packed(name, reader):
            _take_packed(layer, name, reader, device)
        else:
            fill_layer(layer, reader.rows(name, rows_of_a_portion(layer.in_features)), device)
    else:
        _set(group, reader.read(name).to(device, place.tensor.dtype))


def _set(group: list[Place], value: Tensor) -> None:
    first = group[0]
    if not first.buffer:
        value = nn.Parameter(value, first.tensor.requires_grad)
    for place in group:
        (place.module._buffers if place.buffer else place.module._parameters)[place.attribute] = value  # type: ignore[assignment]


def _take_packed(layer: Any, name: str, reader: CheckpointReader, device: torch.device) -> None:
    packed = reader.read(name).to(device)
    if is_int8(layer):
        set_packed_int8(layer, packed, reader.read(f"{name.removesuffix('weight')}SCB").to(device))
        return
    parts = {n.removeprefix(f"{name}."): reader.read(n) for n in reader.names(name)}
    state = bitsandbytes().functional.QuantState.from_dict(parts, device=device)
    empty = layer.weight
    given = (state.quant_type, state.nested, state.dtype)
    if given != (wanted := (empty.quant_type, empty.compress_statistics, layer.compute_dtype)):
        raise ValueError(
            f"{reader.path} was quantized with (mode, double_quant, compute_dtype) = {given}, `quantize_base` was asked"
            f" for {wanted}. Give it the settings of the checkpoint."
        )
    set_packed_4bit(layer, packed.view(torch.uint8).view(-1).view(empty.dtype).view(-1, 1), state)


def _start(block: nn.Module, group: list[Place], device: torch.device) -> None:
    """Initialise a parameter that the checkpoint lacks, on the CPU, as its model does."""
    owner = group[0].module
    own = owner._parameters.items()
    _set(group, torch.empty_like(group[0].tensor, device="cpu"))
    if any(parameter is not None and parameter.is_meta for _, parameter in own):
        return  # with the last of the layer's parameters
    models = [m for m in block.modules() if hasattr(m, "_init_weights") and any(x is owner for x in m.modules())]
    if models:
        with torch.no_grad():
            models[-1]._init_weights(owner)  # type: ignore[operator]
    else:
        owner.reset_parameters()  # type: ignore[operator]
    for parameter in owner.parameters(recurse=False):
        parameter.data = parameter.data.to(device)


def _start_adapters(block: nn.Module, adapters: list[Place], device: torch.device) -> None:
    left = {id(place.tensor): place for place in adapters}
    for layer in block.modules():
        inside = [p for p in places(layer) if id(p.tensor) in left] if hasattr(layer, "reset_lora_parameters") else []
        if not inside:
            continue
        for place in inside:
            _set([place], torch.empty_like(place.tensor, device="cpu"))
            del left[id(place.tensor)]
        for name in layer.r:  # type: ignore[union-attr]
            layer.reset_lora_parameters(name, True)  # type: ignore[operator]
        for part in layer.modules():
            if isinstance(part, StartsItself):
                part.start()
        for place in inside:
            place.module._parameters[place.attribute].data = place.module._parameters[place.attribute].data.to(device)  # type: ignore[union-attr]
    if left:
        place = next(iter(left.values()))
        raise ValueError(
            f"{type(place.module).__name__}.{place.attribute} of an adapter is on the meta device, and only LoRA can"
            " start there. Load the weights first (`load_quantized`), then add the adapters, then shard."
        )
