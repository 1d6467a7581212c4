"""The unit of a stream: one task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Task"]


@dataclass(frozen=True)
class Task:
    """One task of a stream, as callbacks, modules and datamodules see it.

    Args:
        index: Position in the stream, from 0.
        name: A short name for logs and reports.
        classes: Labels that occur in the task; empty when unknown.
        kind: ``"learn"`` for a task to learn, ``"forget"`` for a request to forget.
        length: Training samples of the task; ``None`` when unknown.
        num_tasks: Tasks in the stream; ``None`` when unknown (one ``fit`` per task).
        seen_classes: Labels of this task and of all before it; empty when unknown.

    Example:
        >>> str(Task(index=1, name="digits 2-3", num_tasks=5))
        'task 2 of 5 (digits 2-3)'
    """

    index: int
    name: str
    classes: tuple[int, ...] = ()
    kind: Literal["learn", "forget"] = "learn"
    length: int | None = None
    num_tasks: int | None = None
    seen_classes: tuple[int, ...] = ()

    def __str__(self) -> str:
        of = "" if self.num_tasks is None else f" of {self.num_tasks}"
        return f"task {self.index + 1}{of} ({self.name})"
