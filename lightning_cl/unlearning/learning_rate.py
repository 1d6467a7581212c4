"""The learning rate of a request, which is not that of learning."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

__all__ = ["ScaledLearningRate"]


class ScaledLearningRate:
    """Lets optimizers step with a multiple of the learning rate that they and their schedules have.

    Around each step, so that a schedule reads and writes its own rate in between.

    Args:
        factor: What the learning rate is multiplied by.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._handles: list[Any] = []
        self._rates: dict[Optimizer, list[Any]] = {}

    def start(self, optimizers: Iterable[Optimizer]) -> None:
        """Begin to scale."""
        if self.factor != 1:
            for optimizer in optimizers:
                self._handles.append(optimizer.register_step_pre_hook(self._scale))
                self._handles.append(optimizer.register_step_post_hook(self._restore))

    def end(self) -> None:
        """Leave the optimizers as they were, also one whose step failed."""
        for handle in self._handles:
            handle.remove()
        for optimizer in list(self._rates):
            self._restore(optimizer)
        self._handles = []

    def _scale(self, optimizer: Optimizer, *_: Any) -> None:
        self._rates[optimizer] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.factor

    def _restore(self, optimizer: Optimizer, *_: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates.pop(optimizer), strict=True):
            group["lr"] = rate
