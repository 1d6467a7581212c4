"""How an optimizer begins anew, whoever wrote it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

__all__ = ["ResetsMoments", "reset_state"]

# what torch's optimizers of these names start with zeros
_FROM_ZERO = {
    "acc_delta",
    "exp_avg",
    "exp_avg_sq",
    "exp_inf",
    "grad_avg",
    "max_exp_avg_sq",
    "momentum_buffer",
    "square_avg",
    "step",
}


@runtime_checkable
class ResetsMoments(Protocol):
    """An optimizer that knows how to reset its moments, as ours do."""

    def reset_moments(self, parameters: Iterable[Parameter] | None = None) -> None:
        """Set the moments of these parameters, or of all, to zero and start their bias correction anew."""


def reset_state(optimizer: Optimizer, parameters: Iterable[Parameter] | None = None) -> None:
    """Let an optimizer begin anew: it forgets what it has gathered about its parameters, and keeps its settings.

    Args:
        optimizer: Any optimizer.
        parameters: Those to forget about, of which some may be another optimizer's; all if ``None``.
    """
    if isinstance(optimizer, ResetsMoments):
        optimizer.reset_moments(parameters)
        return
    if parameters is None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    keeps_zeros = not any(group.get("dampening") for group in optimizer.param_groups)
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        if keeps_zeros and state.keys() <= _FROM_ZERO and all(isinstance(value, Tensor) for value in state.values()):
            # not an empty state, which torch fills by a step of its own as soon as a sharded checkpoint is written; and
            # new tensors, by which those who follow the clock see that it was set back
            state.update({key: torch.zeros_like(value) for key, value in state.items()})
        else:
            optimizer.state.pop(parameter, None)
