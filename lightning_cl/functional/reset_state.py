"""How an optimizer begins anew, whoever wrote it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch.optim import Optimizer

__all__ = ["ResetsMoments", "reset_state"]


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
