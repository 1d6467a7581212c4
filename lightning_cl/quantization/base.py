"""Frozen base models with packed linear layers (NF4 of QLoRA, Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Literal, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_cl.core.checks import check_choice
from lightning_cl.core.imports import require
from lightning_cl.quantization.layers import BLOCK, empty_layer, fill_layer, is_quantized, portions

__all__ = ["Mode", "check_can_shard", "quantize_base"]

Mode = Literal["nf4", "fp4", "int8"]
DEFAULT_SKIP = ("lm_head",)
_COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_Module = TypeVar("_Module", bound=nn.Module)


def quantize_base(
    module: _Module,
    *,
    mode: Mode = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    storage_dtype: torch.dtype | None = None,
    skip: Sequence[str] = DEFAULT_SKIP,
) -> _Module:
    """Freeze ``module`` and pack the weights of its linear layers, in place.

    Every ``torch.nn.Linear`` becomes a layer of bitsandbytes; all other parameters (biases, norms, embeddings, what is
    skipped) are cast to ``compute_dtype``, buffers stay as they are. The order that works is: quantize, add adapters,
    shard. A module with weights is quantized layer by layer, each freed before the next; a module on the meta device
    becomes a skeleton that :func:`~lightning_cl.quantization.fill_block` fills.

    The packed weights shard under FSDP2; the scales are replicated, see
    :func:`~lightning_cl.quantization.quantization_bytes`.

    Args:
        module: Any module; of a Hugging Face model the config notes the quantization too, so that PEFT and
            ``transformers`` know.
        mode: ``"nf4"`` or ``"fp4"`` (4 bits), or ``"int8"`` (LLM.int8(), on one device only: bitsandbytes keeps a whole
            copy of each weight outside its parameter, which FSDP2 cannot shard).
        double_quant: Quantize the scales as well: 0.127 instead of 0.5 bits for each weight. 4 bits only.
        compute_dtype: What weights are unpacked to, and the dtype of all other parameters: float32, bfloat16 or
            float16.
        storage_dtype: The dtype that packed bytes pass for, uint8 or a floating one; ``compute_dtype`` if ``None``,
            which leaves a mixed precision policy of FSDP2 nothing to cast. 4 bits only.
        skip: Layers to leave alone: patterns (as in :mod:`fnmatch`) over the full name of a layer, or over any part of
            it between dots.

    Returns:
        The module itself.

    Raises:
        ValueError: For a setting out of range; for a module that is sharded, has adapters or is quantized already; if
            no linear layer is found, or a pattern of ``skip`` matches none; for a layer whose weight is shared, or
            whose input features are no multiple of 64.
    """
    check_choice("mode", mode, ("nf4", "fp4", "int8"))
    _check_dtypes(compute_dtype, storage_dtype)
    _check_order(module)
    linears = _linears_to_quantize(module, skip)
    for name, linear in linears.items():
        layer = empty_layer(
            linear,
            mode,
            double_quant=double_quant,
            compute_dtype=compute_dtype,
            storage_dtype=storage_dtype or compute_dtype,
        )
        if not linear.weight.is_meta:
            fill_layer(layer, portions(linear.weight.detach()), linear.weight.device)
        module.set_submodule(name, layer)
        linear.weight = None  # type: ignore[assignment]  # the loop still refers to the layer
    for layer in module.modules():
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(False)
            if parameter.is_floating_point() and not (is_quantized(layer) and parameter is layer.weight):
                parameter.data = parameter.data.to(compute_dtype)
    _mark(module, mode, double_quant, compute_dtype, storage_dtype or compute_dtype)
    return module


def check_can_shard(module: nn.Module) -> None:
    """Raise if ``module`` holds packed weights that FSDP2 cannot shard.

    Raises:
        ValueError: For ``mode="int8"``.
    """
    from lightning_cl.quantization.layers import is_int8, quantized_layers

    if found := [name for name, layer in quantized_layers(module) if is_int8(layer)]:
        raise ValueError(
            f"{found[0]!r} is quantized with `mode='int8'`: bitsandbytes keeps a whole copy of such a weight outside"
            " its parameter, so that it cannot be sharded. Quantize with `mode='nf4'`, or train on one device or with"
            " DDP."
        )


def _check_dtypes(compute_dtype: torch.dtype, storage_dtype: torch.dtype | None) -> None:
    if compute_dtype not in _COMPUTE_DTYPES:
        raise ValueError(f"`compute_dtype` must be float32, bfloat16 or float16, got {compute_dtype}.")
    if storage_dtype not in (None, torch.uint8, *_COMPUTE_DTYPES):
        raise ValueError(
            f"`storage_dtype` must be uint8, float32, bfloat16 or float16, got {storage_dtype}. Leave it out to store"
            " in the compute dtype, which is what FSDP2 wants."
        )


def _check_order(module: nn.Module) -> None:
    order = "The order is: `quantize_base`, then `add_adapters`, then shard (strategy `fsdp2` does it at its set-up)."
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        raise ValueError(f"`quantize_base` got a module that is already sharded. {order}")
    for name, layer in module.named_modules():
        if type(layer).__module__.startswith("peft."):
            raise ValueError(f"`quantize_base` got a module that has adapters already, at {name!r}. {order}")
        if is_quantized(layer):
            raise ValueError(f"`quantize_base` got a module that is already quantized: {name!r} holds packed weights.")


def _linears_to_quantize(module: nn.Module, skip: Sequence[str]) -> dict[str, nn.Linear]:
    # subclasses have forwards of their own, or are read by others, as the projection of torch's attention is
    linears = {name: layer for name, layer in module.named_modules() if type(layer) is nn.Linear and name}
    for pattern in skip:
        if pattern not in DEFAULT_SKIP and not any(_matches(name, pattern) for name in linears):
            raise ValueError(f"`skip` pattern {pattern!r} matches no linear layer; there are {list(linears)[:3]}, ...")
    linears = {name: layer for name, layer in linears.items() if not any(_matches(name, p) for p in skip)}
    if not linears:
        raise ValueError(
            f"`quantize_base` found no linear layer (torch.nn.Linear) to quantize in {type(module).__name__}, with"
            f" `skip={tuple(skip)!r}`."
        )
    uses: dict[int, int] = {}
    for _, parameter in module.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for name, linear in linears.items():
        if uses[id(linear.weight)] > 1:
            raise ValueError(
                f"The weight of {name!r} is shared with another layer, which needs it unpacked. Add {name!r} to `skip`."
            )
        if linear.in_features % BLOCK:
            # bitsandbytes 0.50 unpacks such weights wrongly on CPUs, without an error
            raise ValueError(
                f"{name!r} has {linear.in_features} input features; packing takes a multiple of {BLOCK}. Add it to"
                " `skip`."
            )
    return linears


def _matches(name: str, pattern: str) -> bool:
    return fnmatch(name, pattern) or any(fnmatch(part, pattern) for part in name.split("."))


def _mark(
    module: nn.Module, mode: Mode, double_quant: bool, compute_dtype: torch.dtype, storage_dtype: torch.dtype
) -> None:
    """Tell Hugging Face models that they are quantized: PEFT then uses its layers for packed weights."""
    models = [m for m in module.modules() if hasattr(m, "config") and hasattr(m, "_init_weights")]
    if not models:
        return
    transformers = require("transformers", extra="llm")
    method = require("transformers.utils.quantization_config", extra="llm").QuantizationMethod.BITS_AND_BYTES
    for model in reversed(models):  # the outermost last: parts often share its config
        if not isinstance(model, transformers.PreTrainedModel):
            continue
        kept = [name for name, layer in model.named_modules() if type(layer) is nn.Linear]
        four = mode != "int8"
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=four,
            load_in_8bit=not four,
            llm_int8_skip_modules=kept,
            bnb_4bit_quant_type="nf4" if mode == "int8" else mode,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=compute_dtype,
            bnb_4bit_quant_storage=storage_dtype,
        )
        model.config.quantization_config = config
        model.config.dtype = compute_dtype
        model.is_quantized = True
        model.quantization_method = method
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = four, not four
