"""Adapters and merged models in the formats of PEFT and ``transformers``, also from shards."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cl.core.distributed import gather_on_rank_zero, rank
from lightning_cl.core.imports import require
from lightning_cl.core.state import reshard
from lightning_cl.quantization.layers import dequantize, is_quantized
from lightning_cl.quantization.names import places
from lightning_cl.quantization.saving import (
    SHARD_BYTES,
    Entry,
    base_entries,
    full_tensor,
    hf_model,
    write_config,
    write_entries,
)
from lightning_cl.quantization.writer import Planned

__all__ = ["export_adapters", "export_merged"]


def export_adapters(module: nn.Module, folder: str | Path) -> None:
    """Write the adapters of ``module`` as ``peft.PeftModel.save_pretrained`` does.

    They load in plain PEFT on the base model: ``PeftModel.from_pretrained(base, folder)``.

    Args:
        module: A ``PeftModel``, or a module that holds one, sharded or not; all ranks must call this.
        folder: Gets ``adapter_config.json`` and ``adapter_model.safetensors``; adapters of other names than
            ``"default"`` go into subfolders.

    Raises:
        ValueError: If ``module`` holds no ``PeftModel``.
    """
    adapted = _peft_model(module)
    reshard(module)
    ours = {id(place.tensor) for place in places(adapted) if place.adapter}
    state = {}
    for name, parameter in adapted.named_parameters():
        if id(parameter) in ours:
            value = full_tensor(parameter)
            if rank() == 0:
                # activation checkpointing and torch.compile put themselves into names
                state[name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")] = value.cpu()
    if rank() == 0:
        # what PEFT would do by itself, "auto", asks the hub for the size of the vocabulary
        adapted.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    gather_on_rank_zero(None)  # nobody reads before all is written


def export_merged(
    module: nn.Module,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    r"""Write the base model with the active adapters merged into its unpacked weights.

    Each weight becomes :math:`\mathrm{dequant}(W_4) + s B A`, summed in float32, the weights that the adapters saw in
    training. PEFT's own merge into packed weights packs the sum again, and loses small adapters altogether. Weights are
    gathered, merged and written one after the other; rank 0 writes.

    Args:
        module: A ``PeftModel`` with LoRA around a Hugging Face model, or a module that holds one, or a quantized model
            without adapters; sharded or not; all ranks must call this.
        folder: Gets ``config.json`` and the safetensors files, for ``from_pretrained`` of ``transformers``.
        dtype: Of the written weights. In float32 nothing is lost; bfloat16 rounds an adapter away where it changes a
            weight by less than 0.4 percent.
        shard_bytes: Size beyond which a file is split.

    Raises:
        ValueError: For adapters other than LoRA on linear and embedding layers, or if a merged weight is shared.
    """
    model = hf_model(module)
    reshard(module)
    deltas = dict(_adapted_layers(model))
    kept = _trained_copies(model)
    _check_shared(model, deltas, kept)
    entries = []
    for name, layer, tensor in base_entries(model):
        weight = is_quantized(layer) and name.rpartition(".")[2] == "weight"
        shape = (layer.out_features, layer.in_features) if weight else tuple(tensor.shape)
        to = dtype if tensor.is_floating_point() or weight else tensor.dtype
        lora = deltas.get(id(layer)) if name.rpartition(".")[2] == "weight" else None
        make = partial(_merged, layer if weight else None, kept.get(name, tensor), lora, to)
        entries.append(Entry(Planned(name, to, shape), make))
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    write_entries(entries, Path(folder), shard_bytes)
    write_config(model, config, Path(folder))


def _merged(quantized: Any, tensor: Tensor, lora: Any, dtype: torch.dtype) -> Tensor:
    weight = full_tensor(tensor) if quantized is None else dequantize(quantized)
    if lora is None:
        return weight.to(dtype)
    weight = weight.float()
    for name in lora.active_adapters:
        if name in lora.lora_A:
            down, up = lora.lora_A[name].weight, lora.lora_B[name].weight
        elif name in lora.lora_embedding_A:
            down, up = lora.lora_embedding_A[name], lora.lora_embedding_B[name]
        else:
            continue
        delta = full_tensor(up).float() @ full_tensor(down).float()
        transposed = name in lora.lora_embedding_A or getattr(lora, "fan_in_fan_out", False)
        weight = weight + lora.scaling[name] * (delta.T if transposed else delta)
    return weight.to(dtype)


# ---------------------------------------------------------------------- what is adapted


def _peft_model(module: nn.Module) -> Any:
    peft_model = require("peft", extra="llm").PeftModel
    for child in module.modules():
        if isinstance(child, peft_model):
            return child
    raise ValueError(f"{type(module).__name__} holds no `peft.PeftModel`: there are no adapters to export.")


def _adapted_layers(model: nn.Module) -> Iterator[tuple[int, Any]]:
    """Yield LoRA layers whose adapters act, by the identity of the layer that they adapt."""
    tuner = require("peft.tuners.tuners_utils", extra="llm").BaseTunerLayer
    lora = require("peft.tuners.lora", extra="llm").LoraLayer
    for name, layer in model.named_modules():
        if not isinstance(layer, tuner) or layer.disable_adapters:
            continue
        active: Any = layer.active_adapters
        simple = isinstance(layer, lora) and not any(a in layer.lora_variant or layer.lora_bias.get(a) for a in active)
        base = layer.get_base_layer()
        if not simple or not (is_quantized(base) or isinstance(base, nn.Linear | nn.Embedding)):
            raise ValueError(
                f"`export_merged` merges plain LoRA on linear and embedding layers; {name!r} is a"
                f" {type(layer).__name__} with other settings. Export the adapters (`export_adapters`), and merge them"
                " in PEFT on a base model that is not quantized."
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
                acting |= {id(parameter) for parameter in layer.modules_to_save[name].parameters()}
    return {p.name: p.tensor for p in places(model) if p.adapter and p.name is not None and id(p.tensor) in acting}


def _check_shared(model: nn.Module, deltas: dict[int, Any], kept: dict[str, Tensor]) -> None:
    base = [place for place in places(model) if place.name is not None and not place.adapter and not place.buffer]
    uses = Counter(id(place.tensor) for place in base)
    for place in base:
        if uses[id(place.tensor)] > 1 and (id(place.module) in deltas or place.name in kept):
            raise ValueError(
                f"{place.name!r} is shared with another layer, and only one of them has an adapter: merged, they"
                " differ. Export the adapters (`export_adapters`) instead."
            )
