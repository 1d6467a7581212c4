"""What callbacks share that measure something on a task's samples: to measure it again when some were forgotten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_cl.core.requests import Influence
from lightning_cl.core.task import Task
from lightning_cl.core.task_data import retained_samples

__all__ = ["measured_again"]


def measured_again(
    trainer: Trainer, task: Task, owner: object, state: str, drop: Callable[[], None], measure: Callable[[Tensor], None]
) -> Influence:
    """Drop what was measured on samples, and measure it on those that a request left.

    Args:
        trainer: The running Trainer.
        task: The task that served the request.
        owner: The callback.
        state: What it measured.
        drop: Called where the retained samples can be read, also if there are none.
        measure: Called after that with their identities, int64 [n], if there are some.
    """
    retained = retained_samples(trainer, task)
    outcome: Literal["removed", "recomputed", "remains"] = "remains"
    if retained is not None:
        drop()
        outcome = "removed"
        if len(retained):
            measure(retained)
            outcome = "recomputed"
    return Influence(type(owner).__name__, state, outcome)
