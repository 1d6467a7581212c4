"""LoRA summed into whole weights, one after the other."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cl.adapters.slot import Slot
from lightning_cl.core.imports import require
from lightning_cl.core.state import full_tensor
from lightning_cl.quantization.layers import dequantize, is_quantized
from lightning_cl.quantization.names import places
from lightning_cl.quantization.reader import CheckpointReader
from lightning_cl.quantization.saving import Entry, base_entries, hf_model, write_config, write_entries
from lightning_cl.quantization.writer import Planned

__all__ = ["write_merged"]


def write_merged(
    module: nn.Module, folder: Path, base: CheckpointReader | None, dtype: torch.dtype | None, shard_bytes: int
) -> None:
    """Write a whole model with the active adapters in its weights, see :func:`~lightning_cl.adapters.export`.

    Args:
        module: Holds a Hugging Face model.
        folder: Where the files go.
        base: What the weights of quantized and of adapted layers are read from; those of ``module`` if ``None``.
        dtype: Of the written weights; if ``None``, that of ``base``, or float32.
        shard_bytes: Size beyond which a file is split.
    """
    model = hf_model(module)
    deltas = dict(_adapted_layers(model))
    kept = _trained_copies(model)
    _check_shared(model, deltas, kept)
    tensors = list(base_entries(model))
    # the layers whose weights are merged, or unpacked
    changed = {
        name: layer
        for name, layer, _ in tensors
        if name.rpartition(".")[2] == "weight" and (is_quantized(layer) or id(layer) in deltas)
    }
    if base is not None:
        _check_base(base, {name: _shape(layer) for name, layer in changed.items()})
        dtype = dtype or next((base.dtype(name) for name in changed), None)
    dtype = dtype or torch.float32
    entries = []
    for name, layer, tensor in tensors:
        source: Callable[[], Tensor] = partial(full_tensor, kept.get(name, tensor))
        if name in changed and base is not None:
            source = partial(base.read, name)
        elif name in changed and is_quantized(layer):
            source = partial(dequantize, layer)
        to = dtype if tensor.is_floating_point() or name in changed else tensor.dtype
        shape = _shape(layer) if name in changed else tuple(tensor.shape)
        lora = deltas.get(id(layer)) if name in changed else None
        entries.append(Entry(Planned(name, to, shape), partial(_merged, source, lora, to)))
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    write_entries(entries, folder, shard_bytes)
    write_config(model, config, folder)


def _merged(source: Callable[[], Tensor], lora: Any, dtype: torch.dtype) -> Tensor:
    weight = source()
    if lora is None:
        return weight.to(dtype)
    weight = weight.float()
    for name in lora.active_adapters:
        if name in lora.lora_A:
            down, up = Slot("", lora, name).factors(name)
        elif name in lora.lora_embedding_A:
            down, up = (full_tensor(part[name]).float() for part in (lora.lora_embedding_A, lora.lora_embedding_B))
        else:
            continue
        delta = up @ down
        transposed = name in lora.lora_embedding_A or getattr(lora, "fan_in_fan_out", False)
        weight = weight + lora.scaling[name] * (delta.T if transposed else delta).to(weight.device)
    return weight.to(dtype)


def _shape(layer: Any) -> tuple[int, ...]:
    """Return the shape that the weight of a layer has where it is not packed."""
    return (layer.out_features, layer.in_features) if is_quantized(layer) else tuple(layer.weight.shape)


# ---------------------------------------------------------------------- what is adapted


def _adapted_layers(model: nn.Module) -> Iterator[tuple[int, Any]]:
    """Yield LoRA layers whose adapters act, by the identity of the layer that they adapt.

    Raises:
        ValueError: For other adapters, other variants of LoRA, other layers, and adapters that are merged already.
    """
    tuner = require("peft.tuners.tuners_utils", extra="llm").BaseTunerLayer
    lora = require("peft.tuners.lora", extra="llm").LoraLayer
    conv = require("transformers.pytorch_utils", extra="llm").Conv1D
    for name, layer in model.named_modules():
        if not isinstance(layer, tuner) or layer.disable_adapters:
            continue
        active: Any = layer.active_adapters
        simple = isinstance(layer, lora) and not any(a in layer.lora_variant or layer.lora_bias.get(a) for a in active)
        base = layer.get_base_layer()
        if not simple or not (is_quantized(base) or isinstance(base, (nn.Linear, nn.Embedding, conv))):
            raise ValueError(
                f"`export` merges plain LoRA on linear and embedding layers (also GPT-2's `Conv1D`); {name!r} is a"
                f" {type(layer).__name__} of PEFT on a {type(base).__name__}, or has settings such as DoRA. Export the"
                " adapters (`into='factors'`), and merge them in PEFT on a base model that is not quantized."
            )
        if layer.merged:
            raise ValueError(f"The adapters of {name!r} are merged already. Unmerge them (`unmerge_adapter`) first.")
        yield id(base), layer


def _trained_copies(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of whole modules that were trained beside the adapters (``modules_to_save``)."""
    wrapper = require("peft.utils.other", extra="llm").ModulesToSaveWrapper
    acting: set[int] = set()
    for layer in model.modules():
        if isinstance(layer, wrapper) and not layer.disable_adapters:
            for name in layer.active_adapters:
                if name in layer.modules_to_save:
                    acting |= {id(parameter) for parameter in layer.modules_to_save[name].parameters()}
    return {p.name: p.tensor for p in places(model) if p.adapter and p.name is not None and id(p.tensor) in acting}


def _check_shared(model: nn.Module, deltas: dict[int, Any], kept: dict[str, Tensor]) -> None:
    base = [place for place in places(model) if place.name is not None and not place.adapter and not place.buffer]
    uses = Counter(id(place.tensor) for place in base)
    for place in base:
        if uses[id(place.tensor)] > 1 and (id(place.module) in deltas or place.name in kept):
            raise ValueError(
                f"{place.name!r} is shared with another layer, and only one of them has an adapter: merged, they"
                " differ. Export the adapters (`into='factors'`) instead."
            )


def _check_base(base: CheckpointReader, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        found = tuple(base.shape(name)) if name in base else "nothing"
        if found != shape:
            raise ValueError(
                f"`base={base.path!r}` has {found} as {name!r}, and the model {shape}: name the checkpoint, not"
                " quantized, that the model was made from."
            )
