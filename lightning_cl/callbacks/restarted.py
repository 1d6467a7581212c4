"""A learning-rate scheduler that begins anew with every task."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain, repeat
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightning_cl.core.schedules import set_rates

__all__ = ["RestartedScheduler"]

# what torch's schedulers write into parameter groups
_SCHEDULED = {"lr", "initial_lr", "min_lr", "max_lr", "momentum", "base_momentum", "max_momentum", "betas"}
_STATE_KEY = "rewarm"


class RestartedScheduler(LRScheduler):
    """A scheduler that begins anew with every task, with linear re-warming from the rate of the task before.

    Step it as the scheduler in it; what else that has, its attributes, is reached through this one.

    Args:
        scheduler: The scheduler, at its beginning.
        warmup: Optimizer steps of re-warming.
        every: Calls of :meth:`step` for each step of the scheduler, counted from a task's start.
        ended: The learning rates that a task before ended with; ``None`` in the first.
    """

    def __init__(
        self, scheduler: LRScheduler, *, warmup: int = 0, every: int = 1, ended: Sequence[float] | None = None
    ) -> None:
        # not the host's, which would move the learning rates
        self.scheduler = scheduler
        self.optimizer = scheduler.optimizer
        self.warmup = warmup
        self.every = every
        self._state = copy.deepcopy(scheduler.state_dict())
        self._groups = [
            {name: copy.deepcopy(value) for name, value in group.items() if name in _SCHEDULED}
            for group in self.optimizer.param_groups
        ]
        self._start: list[float] | None = None
        self._begin(ended)

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def restart(self) -> None:
        """Begin anew: the task has ended. Steps before the optimizer's next one do not count."""
        ended = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.scheduler.load_state_dict(copy.deepcopy(self._state))
        # a group that was added since stays as it is
        for group, values in zip(self.optimizer.param_groups, self._groups, strict=False):
            group.update({name: copy.deepcopy(value) for name, value in values.items() if name != "lr"})
        set_rates(self.optimizer, [values["lr"] for values in self._groups])
        self._begin(ended)

    def _begin(self, ended: Sequence[float] | None) -> None:
        self._steps = self._calls = 0
        self._targets = self._rates()
        if ended is not None:
            # a group that the task before did not have warms up from 0
            self._start = [rate for rate, _ in zip(chain(ended, repeat(0.0)), self._targets, strict=False)]
        self._warm()

    def count_step(self) -> None:
        """Count a step that the optimizer has taken."""
        warming = self._warming
        self._steps += 1
        if warming:
            self._warm()

    @override
    def step(self, *args: Any, **kwargs: Any) -> None:
        if self._start is not None and self._steps == 0:
            return
        self._calls += 1
        if self._calls % self.every:
            return
        if not self._warming:
            self.scheduler.step(*args, **kwargs)
            return
        # most schedulers derive a rate from the one before
        set_rates(self.optimizer, self._targets)
        self.scheduler.step(*args, **kwargs)
        self._targets = self._rates()
        self._warm()

    @property
    def _warming(self) -> bool:
        return self._start is not None and self._steps < self.warmup

    def _warm(self) -> None:
        """Set the learning rates of the coming step."""
        if self._start is None or not self._warming:
            set_rates(self.optimizer, self._targets)
            return
        part = (self._steps + 1) / (self.warmup + 1)
        # a group that was added since has no start
        rates = [start + (end - start) * part for start, end in zip(self._start, self._targets, strict=False)]
        set_rates(self.optimizer, rates)

    def _rates(self) -> list[float | Tensor]:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]

    @override
    def get_lr(self) -> list[float | Tensor]:
        return self.scheduler.get_lr()

    @override
    def get_last_lr(self) -> list[float | Tensor]:
        return self._rates()

    @override
    def state_dict(self) -> dict[str, Any]:
        own = {"steps": self._steps, "calls": self._calls, "start": self._start, "targets": self._targets}
        return self.scheduler.state_dict() | {_STATE_KEY: own}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = state_dict[_STATE_KEY]
        self.scheduler.load_state_dict({name: value for name, value in state_dict.items() if name != _STATE_KEY})
        self._steps, self._calls, self._start = own["steps"], own["calls"], own["start"]
        self._targets = own["targets"]
