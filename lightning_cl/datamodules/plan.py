"""The plan of a stream: which rows each task trains on, in which epochs, and what is evaluated apart."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from lightning_cl.core.requests import ForgetRequest
from lightning_cl.core.task import Task
from lightning_cl.datamodules.interleaving import interleave
from lightning_cl.datamodules.scenarios import Scenario, TaskPlan
from lightning_cl.datamodules.splits import Split

__all__ = ["StreamPlan"]


class StreamPlan:
    """Tasks in time, a pure function of its arguments.

    Args:
        scenario: Makes the tasks.
        train: The training data.
        seed: Seed of the stream.
        epochs_per_task: Epochs of every task to learn, or of each.
        steps_per_task: Steps of every task to learn, in place of passes over its rows.
        requests: Requests to forget.
        epochs_per_request: Passes over what a request forgets.

    Attributes:
        plans: The rows and the transform of each task.
        requests: The request that each task serves, ``None`` for a task to learn.
        tasks: The plans as callbacks see them.
        part_plans: What is evaluated apart: the columns of the accuracy matrix.
        parts: The same as callbacks see them.
        starts: First epoch of each task, and the epochs of the whole stream at the end.

    Raises:
        ValueError: If the data cannot be split as asked, or ``epochs_per_task`` does not fit the tasks.
    """

    def __init__(
        self,
        scenario: Scenario,
        train: Split,
        *,
        seed: int,
        epochs_per_task: int | list[int],
        steps_per_task: int | None,
        requests: Sequence[ForgetRequest] = (),
        epochs_per_request: int = 1,
    ) -> None:
        learning = scenario.plan(train.info, seed)
        self.part_plans = scenario.parts(learning)
        epochs = epochs_per_task if isinstance(epochs_per_task, list) else [epochs_per_task] * len(learning)
        if len(epochs) != len(learning):
            raise ValueError(
                f"`epochs_per_task` lists {len(epochs)} numbers, but {scenario!r} makes {len(learning)} tasks."
            )
        if scenario.single_pass and any(number > 1 for number in epochs):
            raise ValueError(f"{scenario!r} is a single pass: `epochs_per_task` must be 1, got {epochs_per_task}.")
        plans, served = interleave(learning, requests, train)
        self.plans = plans
        self.requests: list[ForgetRequest | None] = served
        trained, learned_for = iter(scenario.trained(learning)), iter(epochs)
        # a request trains nothing that is evaluated apart
        self._trained = [next(trained) if request is None else [] for request in self.requests]
        epochs = [
            next(learned_for) if request is None else request.epochs or epochs_per_request for request in self.requests
        ]
        self.tasks = _tasks_of(self.plans)
        self.parts = _tasks_of(self.part_plans)
        self.starts: list[int] = [0, *np.cumsum(epochs).tolist()]
        self._scenario = scenario
        self._seed = seed
        self._steps = steps_per_task

    @property
    def num_epochs(self) -> int:
        """Epochs of the whole stream."""
        return self.starts[-1]

    def task_of_epoch(self, epoch: int) -> Task:
        """Return the task that ``epoch`` belongs to; the last one after the end."""
        position = int(np.searchsorted(self.starts, epoch, side="right")) - 1
        return self.tasks[min(position, len(self.tasks) - 1)]

    def epoch_in_task(self, epoch: int) -> int:
        """Return the number of ``epoch`` within its task, from 0."""
        return epoch - self.starts[self.task_of_epoch(epoch).index]

    def ends_task(self, epoch: int) -> bool:
        """Return whether ``epoch`` is the last of its task."""
        return epoch + 1 in self.starts

    def trained_by(self, task: Task) -> list[int]:
        """Return the positions in ``parts`` that ``task`` trains."""
        return self._trained[task.index]

    def seen_by(self, task: Task) -> list[int]:
        """Return the positions in ``parts`` that ``task`` and those before it train, ascending."""
        return sorted({part for parts in self._trained[: task.index + 1] for part in parts})

    def check_single_pass(self, global_batch_size: int) -> None:
        """Refuse ``steps_per_task`` that would show samples again where the scenario shows them once.

        Raises:
            ValueError: If so.
        """
        if self._steps is None or not self._scenario.single_pass:
            return
        for plan in (plan for plan in self.plans if plan.retained is None):
            steps = -(-len(plan.indices) // global_batch_size)
            if self._steps > steps:
                raise ValueError(
                    f"{self._scenario!r} is a single pass, but `steps_per_task={self._steps}` is more than the {steps}"
                    f" steps of task {plan.name!r}."
                )

    def fingerprint(self) -> dict[str, list[int]]:
        """Return numbers that two streams share only if they hold the same rows in the same tasks and epochs."""
        rows = [zlib.crc32(np.ascontiguousarray(plan.indices).tobytes()) for plan in self.plans]
        return {"settings": [self._seed, self._steps or 0], "starts": self.starts, "rows": rows}

    def continues(self, saved: Mapping[str, list[int]]) -> bool:
        """Return whether a saved fingerprint is of this stream, or of one that this goes on from with more requests."""
        present, tasks = self.fingerprint(), len(saved["rows"])
        same = all(present[key][: len(saved[key])] == saved[key] for key in present)
        return same and all(plan.retained is not None for plan in self.plans[tasks:])


def _tasks_of(plans: Sequence[TaskPlan]) -> list[Task]:
    seen: tuple[int, ...] = ()
    tasks = []
    for index, plan in enumerate(plans):
        seen = tuple(sorted({*seen, *plan.classes}))
        length, count = len(plan.indices), len(plans)
        kind: Literal["learn", "forget"] = "learn" if plan.retained is None else "forget"
        tasks.append(Task(index, plan.name, plan.classes, kind, length, count, seen))
    return tasks
