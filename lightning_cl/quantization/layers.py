"""Linear layers with packed weights: made empty, filled from rows in full precision, read back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_cl.core.imports import require
from lightning_cl.core.state import local

__all__ = ["BLOCK", "dequantize", "empty_layer", "fill_layer", "is_quantized", "quantization_bytes", "quantized_layers"]

BLOCK = 64
"""Weights that share one scale, along the input features."""

_BLOCK_OF_SCALES = 256
# Rows are quantized in portions of so many weights: temporary memory stays at a few megabytes, and in the cache.
_PORTION = 2**17
# The outlier threshold of LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339), as in `transformers`.
_INT8_THRESHOLD = 6.0


def bitsandbytes() -> Any:
    """Return the package, or raise the error that says how to install it."""
    return require("bitsandbytes", extra="llm")


def is_quantized(module: nn.Module) -> bool:
    """Return whether ``module`` is a linear layer with packed weights."""
    # by name, so that to ask about a plain model does not import bitsandbytes
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__}
    return bool(names & {"bitsandbytes.nn.modules.Linear4bit", "bitsandbytes.nn.modules.Linear8bitLt"})


def is_int8(layer: nn.Module) -> bool:
    """Return whether the packed weights of ``layer`` have 8 bits."""
    return any(cls.__qualname__ == "Linear8bitLt" for cls in type(layer).__mro__)


def quantized_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the names and layers of ``module`` that hold packed weights."""
    return ((name, layer) for name, layer in module.named_modules() if is_quantized(layer))


def empty_layer(
    linear: nn.Linear, mode: str, *, double_quant: bool, compute_dtype: torch.dtype, storage_dtype: torch.dtype
) -> nn.Module:
    """Return the quantized layer for ``linear``, with its bias, and with a weight on the meta device."""
    nn_of_bnb = bitsandbytes().nn
    rows, columns = linear.out_features, linear.in_features
    layer: nn.Module
    if mode == "int8":
        layer = nn_of_bnb.Linear8bitLt(
            columns, rows, bias=False, has_fp16_weights=False, threshold=_INT8_THRESHOLD, device="meta"
        )
        packed = torch.empty(rows, columns, dtype=torch.int8, device="meta")
        layer.weight = nn_of_bnb.Int8Params(packed, requires_grad=False, has_fp16_weights=False)
        layer.compute_dtype = compute_dtype  # type: ignore[assignment]  # as the layer of 4 bits has it
    else:
        layer = nn_of_bnb.Linear4bit(
            columns, rows, bias=False, compute_dtype=compute_dtype, quant_storage=storage_dtype, device="meta"
        )
        packed = torch.empty(rows * columns // 2 // storage_dtype.itemsize, 1, dtype=storage_dtype, device="meta")
        layer.weight = nn_of_bnb.Params4bit(
            packed,
            requires_grad=False,
            blocksize=BLOCK,
            compress_statistics=double_quant,
            quant_type=mode,
            quant_storage=storage_dtype,
            bnb_quantized=True,
        )
        # In evaluation on CPUs with AVX512-BF16 bitsandbytes repacks weight and scales in place. Under FSDP2 the weight
        # comes back in the old packing at the next all-gather, and the layer computes nonsense from then on.
        layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    layer.bias = linear.bias
    layer.train(linear.training)
    return layer


def portions(weight: Tensor) -> Iterator[Tensor]:
    """Yield the rows of ``weight`` in portions."""
    yield from weight.split(rows_of_a_portion(weight.shape[1]))


def rows_of_a_portion(columns: int) -> int:
    """Return how many rows of a weight are quantized at a time."""
    return max(1, _PORTION // columns)


def fill_layer(layer: Any, rows: Iterable[Tensor], device: torch.device) -> None:
    """Quantize a weight into the empty ``layer``, in portions of its rows.

    Scales belong to :data:`BLOCK` weights of one row, so that the result is, bit by bit, that of the whole weight.

    Args:
        layer: What :func:`empty_layer` returned.
        rows: The weight in order, portions [n, in_features], n summing to out_features.
        device: Where the packed weight goes, and where it is computed.
    """
    if is_int8(layer):
        _fill_int8(layer, rows, device)
    else:
        set_packed_4bit(layer, *pack_4bit(layer, rows, device))


def pack_4bit(layer: Any, rows: Iterable[Tensor], device: torch.device) -> tuple[Tensor, Any]:
    """Return the packed weight for an empty layer, and its quantization state; see :func:`fill_layer`."""
    bnb = bitsandbytes()
    empty = layer.weight
    packed = torch.empty(empty.shape, dtype=empty.dtype, device=device)
    scales, begin = [], 0
    for portion in rows:
        # to the compute dtype first: what the weights of an unquantized model would be, and what transformers does
        codes, state = bnb.functional.quantize_4bit(
            portion.to(device, layer.compute_dtype),
            blocksize=empty.blocksize,
            quant_type=empty.quant_type,
            quant_storage=empty.quant_storage,
        )
        packed[begin : begin + len(codes)] = codes
        scales.append(state.absmax)
        begin += len(codes)
    absmax = torch.cat(scales)
    state.absmax, state.shape = absmax, torch.Size((layer.out_features, layer.in_features))
    if empty.compress_statistics:
        state.offset = absmax.mean()
        state.absmax, state.state2 = bnb.functional.quantize_blockwise(
            absmax - state.offset, blocksize=_BLOCK_OF_SCALES
        )
        state.nested = True
    return packed, state


def set_packed_4bit(layer: Any, packed: Tensor, state: Any) -> None:
    """Give ``layer`` a packed weight and its quantization state."""
    layer.weight = bitsandbytes().nn.Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=packed.dtype,
        bnb_quantized=True,
    )
    # the parameter loses its state when FSDP2 makes it anew; the layer's own reference is what the forward then takes
    layer.quant_state = state


def share_packed_4bit(layer: Any, source: Any) -> None:
    """Give ``layer`` the packed weight and the scales of another one, in the same memory.

    Each has a parameter and a state of its own around them: bitsandbytes moves a state in place when its parameter is
    moved to another device.
    """
    state = copy.copy(source.quant_state)
    if state.nested:
        state.state2 = copy.copy(state.state2)
    set_packed_4bit(layer, source.weight.data, state)


def _fill_int8(layer: Any, rows: Iterable[Tensor], device: torch.device) -> None:
    bnb = bitsandbytes()
    parts = [
        bnb.functional.int8_vectorwise_quant(portion.to(device, layer.compute_dtype).to(torch.float16))[:2]
        for portion in rows
    ]
    set_packed_int8(layer, torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts]))


def set_packed_int8(layer: Any, packed: Tensor, scales: Tensor) -> None:
    """Give ``layer`` an int8 weight and the scales of its rows."""
    layer.weight = bitsandbytes().nn.Int8Params(
        packed, requires_grad=False, has_fp16_weights=False, CB=packed, SCB=scales
    )


def packed_weight(layer: Any) -> Tensor:
    """Return the whole packed weight; with a sharded layer all ranks must call it."""
    weight = layer.weight
    return weight.full_tensor() if isinstance(weight, DTensor) else weight.data


def int8_scales(layer: Any) -> Tensor:
    """Return the scales of the rows of an int8 layer, float32 [out_features]."""
    # the first forward moves them from the weight to the layer
    scales: Tensor = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
    return scales


def dequantize(layer: Any) -> Tensor:
    """Return the weight that a quantized layer computes with.

    With a sharded layer all ranks must call it: the packed weight is gathered, and freed again.

    Args:
        layer: One layer of those that :func:`quantized_layers` yields.

    Returns:
        The weight [out_features, in_features] in the compute dtype (float32 for int8), on the layer's device.

    Raises:
        ValueError: If ``layer`` is not quantized.
    """
    if not is_quantized(layer):
        raise ValueError(f"`dequantize` takes one quantized layer, got {type(layer).__name__}; see `quantized_layers`.")
    functional = bitsandbytes().functional
    with torch.no_grad():
        if is_int8(layer):
            return functional.int8_vectorwise_dequant(packed_weight(layer), int8_scales(layer))  # type: ignore[no-any-return]
        return functional.dequantize_4bit(packed_weight(layer), layer.quant_state)  # type: ignore[no-any-return]


def state_tensors(layer: Any) -> list[Tensor]:
    """Return the tensors beside the packed weight that a quantized layer needs."""
    if is_int8(layer):
        return [int8_scales(layer)]
    state = layer.quant_state
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [state.absmax, state.code, *nested]


def quantization_bytes(module: nn.Module) -> dict[str, int]:
    r"""Return what the quantized layers of ``module`` hold on this rank, in bytes.

    The quantization state is the same on every rank, never sharded: with double quantization it takes
    :math:`8/64 + 32/(64 \cdot 256) = 0.127` bits for each weight, 3 percent of the 4 bits, without it 0.5.

    Returns:
        ``"packed"``: packed weights, of a sharded layer this rank's shard; ``"state"``: scales, tables and offsets.
        A skeleton on the meta device has no state yet.
    """
    sizes = {"packed": 0, "state": 0}
    for _, layer in quantized_layers(module):
        weight = local(layer.weight)  # type: ignore[arg-type]
        sizes["packed"] += weight.numel() * weight.itemsize
        if not weight.is_meta:
            sizes["state"] += sum(tensor.numel() * tensor.itemsize for tensor in state_tensors(layer))
    return sizes
