"""The learning rate of a request, which is not that of learning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer

__all__ = ["ScaledLearningRate"]


class ScaledLearningRate:
    """Lets optimizers step with a multiple of the learning rate that they and their schedules have.

    Around each step, so that a schedule reads and writes its own rate in between; so does the closure of a step, in
    which a checkpoint may be written.

    Args:
        factor: What the learning rate is multiplied by.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._handles: list[Any] = []
        self._rates: dict[Optimizer, list[Any]] = {}
        # a step that calls that of its base class has hooks around both: how many are under way
        self._entered: Counter[Optimizer] = Counter()

    def start(self, optimizers: Iterable[Optimizer]) -> None:
        """Begin to scale."""
        if self.factor != 1:
            for optimizer in optimizers:
                self._handles.append(optimizer.register_step_pre_hook(self._enter))
                self._handles.append(optimizer.register_step_post_hook(self._leave))

    def end(self) -> None:
        """Leave the optimizers as they were, also one whose step failed."""
        for handle in self._handles:
            handle.remove()
        for optimizer in list(self._rates):
            self._restore(optimizer)
        self._handles = []
        self._entered.clear()

    def _enter(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self._entered[optimizer] += 1
        if self._entered[optimizer] > 1:
            return None
        self._scale(optimizer)
        return (
            tuple(self._unscaled(optimizer, value) if callable(value) else value for value in args),
            {name: self._unscaled(optimizer, value) if callable(value) else value for name, value in kwargs.items()},
        )

    def _leave(self, optimizer: Optimizer, *_: Any) -> None:
        self._entered[optimizer] -= 1
        if not self._entered[optimizer]:
            self._restore(optimizer)

    def _unscaled(self, optimizer: Optimizer, closure: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            self._restore(optimizer)
            loss = closure(*args, **kwargs)
            self._scale(optimizer)
            return loss

        return called

    def _scale(self, optimizer: Optimizer) -> None:
        self._rates[optimizer] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * self.factor

    def _restore(self, optimizer: Optimizer) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates.pop(optimizer), strict=True):
            group["lr"] = rate
