"""What makes a datamodule a stream of tasks."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Protocol, runtime_checkable

from lightning_cl.core.task import Task

__all__ = ["CountedStream", "TaskStream", "tasks_that_run"]


@runtime_checkable
class TaskStream(Protocol):
    """What a datamodule offers to run a whole stream of tasks in one ``fit``."""

    hides_boundaries: bool
    reveals_task: bool

    def task_of_epoch(self, epoch: int) -> Task:
        """Return the task that the Trainer's ``epoch`` belongs to."""

    def ends_task(self, epoch: int) -> bool:
        """Return whether ``epoch`` is the last of its task."""

    def evaluates_after(self, epoch: int) -> bool:
        """Return whether tasks are evaluated at the end of ``epoch``."""

    def evaluated_tasks(self) -> Sequence[Task]:
        """Return the tasks of the current evaluation loaders, in their order; their indices are matrix columns."""

    def trained_by(self, task: Task) -> list[int]:
        """Return the matrix columns that ``task`` trains."""

    def request_evaluation(self, task: Task | None) -> None:
        """Give evaluation loaders as at the end of ``task``, whatever the epoch; ``None`` ends the request."""


@runtime_checkable
class CountedStream(Protocol):
    """A stream that knows how long its tasks are."""

    def epochs_and_batches(self) -> list[tuple[int, int]]:
        """Return the epochs of every task and the batches that a rank reads in each of them."""


def tasks_that_run(stream: TaskStream, kinds: Set[str]) -> list[bool]:
    """Return for each task of a counted stream whether it is of one of these kinds and has epochs at all."""
    assert isinstance(stream, CountedStream)
    epochs = [number for number, _ in stream.epochs_and_batches()]
    firsts = [stream.task_of_epoch(sum(epochs[:index])) for index in range(len(epochs))]
    return [number > 0 and task.kind in kinds for number, task in zip(epochs, firsts, strict=True)]
