"""Quantized layers of fake tensors, to measure what a model needs before there is one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from lightning_cl.quantization.layers import bitsandbytes, is_int8, pack_4bit, quantized_layers

__all__ = ["fill_with_fakes"]


def fill_with_fakes(module: nn.Module, mode: FakeTensorMode) -> None:
    """Give the quantized layers of ``module`` packed weights and scales without values.

    They shard as real ones do. A forward runs for 4 bits only.

    Args:
        module: Changed in place; a skeleton, or a module with weights.
        mode: What makes the fake tensors.
    """
    for _, layer in quantized_layers(module):
        # of the first call bitsandbytes keeps a table, which must be a real one
        bitsandbytes().functional.quantize_blockwise(torch.zeros(256))
        with mode:
            _fill(layer)


def _fill(layer: Any) -> None:
    cpu = torch.device("cpu")
    if is_int8(layer):
        packed = torch.empty(layer.weight.shape, dtype=layer.weight.dtype, device=cpu)
        layer.weight = nn.Parameter(packed, requires_grad=False)
        layer.weight.SCB = torch.empty(layer.out_features, device=cpu)
        return
    packed, state = pack_4bit(layer, [torch.empty(layer.out_features, layer.in_features, device=cpu)], cpu)
    # `Params4bit` cannot hold a fake tensor; the layer takes any parameter that has a state
    layer.weight, layer.quant_state = nn.Parameter(packed, requires_grad=False), state
    layer.weight.quant_state = state
    layer.register_forward_pre_hook(_give_state)


def _give_state(layer: Any, _: Any) -> None:
    # what FSDP2 gathers is another parameter
    layer.weight.quant_state = layer.quant_state
