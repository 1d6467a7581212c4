"""The state of any optimizer: its second moments and its clock."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_cl.optim.base import MomentResetOptimizer
from lightning_cl.optim.moments import Storage, local
from lightning_cl.optim.sparse import SparseMoments

__all__ = [
    "decays_weights_apart",
    "has_second_moment",
    "second_moment",
    "steps_taken",
]

_KEYS = ("exp_avg_sq", "square_avg")
_TORCH_KINDS = (torch.optim.Adam, torch.optim.NAdam, torch.optim.RAdam, torch.optim.RMSprop, torch.optim.Adadelta)
# bitsandbytes' kernels of Adam's form, which decay the weights themselves, and the one without a first moment
_BITSANDBYTES_ADAM = ("adam", "lamb", "ademamix")
_BITSANDBYTES_RMSPROP = "rmsprop"
_BITSANDBYTES_BLOCK = 256
_KNOWN_PACKAGES = ("torch", "bitsandbytes", __name__.partition(".")[0])


def second_moment(optimizer: Optimizer, parameter: Parameter) -> Tensor | None:
    """Return the running average of squared gradients, before any bias correction.

    Known are torch's optimizers of Adam's family, RMSprop and Adadelta, ours, all that name their state as these do,
    and those of bitsandbytes in 32 and 8 bits.

    Args:
        optimizer: Any optimizer.
        parameter: One of its parameters.

    Returns:
        Floating point, of the shape of this rank's shard: what the optimizer keeps, or a copy of it where that is in 8
        bits (as float32) or of a part of the weights (0 for the others); ``None`` where there is none (yet).

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = torch.optim.AdamW([weight])
        >>> weight.grad = torch.tensor([1.0, 2.0])
        >>> second_moment(optimizer, weight) is None
        True
        >>> optimizer.step()
        >>> second_moment(optimizer, weight)
        tensor([0.0010, 0.0040])
    """
    state = optimizer.state.get(parameter) or {}
    for key in _KEYS:
        if key in state:
            value: Tensor = state[key]
            if "indices" in state:
                value = SparseMoments(parameter, value.dtype, 1.0, (0, 0)).expand(state, key)
            elif f"{key}_scale" in state:
                value = Storage(parameter, "8bit").read(state, key)
            return local(value)
    number = _bitsandbytes_number(optimizer)
    if number is None or f"state{number}" not in state:
        return None
    value = local(state[f"state{number}"])
    if value.is_floating_point():
        return value
    # registered by bitsandbytes, which such a state cannot exist without
    dequantize: Any = torch.ops.bitsandbytes.dequantize_blockwise
    code, scales = state[f"qmap{number}"], state[f"absmax{number}"]
    copied: Tensor = dequantize(value, scales, code, _BITSANDBYTES_BLOCK, torch.float32)
    return copied


def has_second_moment(optimizer: Optimizer) -> bool | None:
    """Return whether an optimizer keeps one, ``None`` for an unknown kind before its first step.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> has_second_moment(torch.optim.NAdam([weight])), has_second_moment(torch.optim.SGD([weight]))
        (True, False)
    """
    known = [p for group in optimizer.param_groups for p in group["params"] if optimizer.state.get(p)]
    if known:
        return any(second_moment(optimizer, parameter) is not None for parameter in known)
    if isinstance(optimizer, (*_TORCH_KINDS, MomentResetOptimizer)) or _bitsandbytes_number(optimizer):
        return True
    # subclasses elsewhere may add one
    return False if type(optimizer).__module__.partition(".")[0] in _KNOWN_PACKAGES else None


def steps_taken(optimizer: Optimizer, parameter: Parameter) -> Tensor | int | None:
    """Return how many gradients the moments of a parameter have seen, wherever the optimizer keeps that number.

    Returns:
        0 where there is no state (yet), ``None`` where the state has no count of its own for each parameter.
    """
    state = optimizer.state.get(parameter)
    if not state:
        return 0
    count: Tensor | int | None = state.get("step")
    return local(count) if isinstance(count, Tensor) else count


def decays_weights_apart(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Return whether weight decay shrinks the weights themselves (as AdamW's) and is no part of the gradient (L2)."""
    ours = isinstance(optimizer, MomentResetOptimizer)
    if ours or getattr(optimizer, "optimizer_name", None) in _BITSANDBYTES_ADAM:
        return True
    return bool(group.get("decoupled_weight_decay", group.get("weight_decouple", False)))


def _bitsandbytes_number(optimizer: Optimizer) -> int | None:
    """Return the number of the state tensor that is the second moment."""
    name = getattr(optimizer, "optimizer_name", None)
    return 2 if name in _BITSANDBYTES_ADAM else 1 if name == _BITSANDBYTES_RMSPROP else None
