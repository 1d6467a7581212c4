"""The state of optimizers that are not ours: their second moments, and how to begin anew."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_cl.optim.moments import local

__all__ = ["ResetsMoments", "reset_state", "second_moment"]

_SECOND_MOMENTS = ("exp_avg_sq", "square_avg")


@runtime_checkable
class ResetsMoments(Protocol):
    """An optimizer that knows how to reset its moments, as ours do."""

    def reset_moments(self) -> None:
        """Set all moments to zero and start their bias correction anew."""


def reset_state(optimizer: Optimizer) -> None:
    """Let an optimizer begin anew: it forgets what it has gathered about its parameters, and keeps its settings."""
    if isinstance(optimizer, ResetsMoments):
        optimizer.reset_moments()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state.pop(parameter, None)


def second_moment(optimizer: Optimizer, parameter: Parameter) -> Tensor | None:
    """Return the running average of squared gradients, as this rank's shard has it, or ``None`` where there is none."""
    state = optimizer.state.get(parameter, {})
    for key in _SECOND_MOMENTS:
        if key in state:
            value = state[key]
            return local(value)
    return None
