"""What the rows of a stream trained, and checked access to the scores: shared by the metrics of ``functional``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor

Trained: TypeAlias = Sequence[int | Sequence[int]]
"""What each row of the stream trained: a task, or several, or none."""


class Stream(NamedTuple):
    """What was learned when: the last row, and the first row of each task seen in the order of learning."""

    last: int
    first: dict[int, int]
    previous: list[int]


def _stream(n_rows: int, n_tasks: int, trained: Trained | None) -> Stream:
    if trained is None:
        if n_rows > n_tasks:
            raise ValueError(
                f"{n_rows} rows were learned but there are {n_tasks} tasks; "
                "pass `trained`, the task or tasks that each row trained."
            )
        trained = range(n_rows)
    if len(trained) < n_rows:
        raise ValueError(f"`trained` has {len(trained)} rows, but {n_rows} rows were learned.")
    rows = [[row] if isinstance(row, int) else list(row) for row in trained[:n_rows]]
    first: dict[int, int] = {}
    for position, tasks in enumerate(rows):
        for task in tasks:
            if not 0 <= task < n_tasks:
                raise ValueError(f"`trained` names task {task} in row {position}; tasks go from 0 to {n_tasks - 1}.")
            first.setdefault(task, position)
    return Stream(n_rows - 1, first, [task for task in first if task not in rows[-1]])


def check_matrix(R: Tensor, trained: Trained | None) -> tuple[Tensor, Stream]:
    """Return ``R`` without the rows that were not learned yet, and what its rows trained."""
    if R.ndim != 2 or not R.is_floating_point():
        raise ValueError(f"`R` must be a floating-point Tensor[T, N], got {R.dtype} of shape {tuple(R.shape)}.")
    learned = (~R.isnan()).any(dim=1).nonzero()
    if learned.numel() == 0:
        raise ValueError(f"`R` of shape {tuple(R.shape)} holds no evaluation.")
    R = R[: int(learned[-1]) + 1]
    return R, _stream(R.shape[0], R.shape[1], trained)


def check_evaluations(scores: Tensor, task_of_evaluation: Tensor, trained: Trained | None) -> Stream:
    """Return what was trained up to the last evaluation."""
    if scores.ndim != 2 or task_of_evaluation.shape != scores.shape[:1] or len(scores) == 0:
        raise ValueError(
            "`scores` must be Tensor[E, N] and `task_of_evaluation` Tensor[E] with E of at least 1, "
            f"got shapes {tuple(scores.shape)} and {tuple(task_of_evaluation.shape)}."
        )
    if (task_of_evaluation.diff() < 0).any():
        raise ValueError("`task_of_evaluation` must not decrease: evaluations are listed in the order they were made.")
    return _stream(int(task_of_evaluation[-1]) + 1, scores.shape[1], trained)


def needed_entries(R: Tensor, rows: list[int], tasks: list[int], metric: str, *, name: str = "R") -> Tensor:
    """Return ``R[rows, tasks]``, refusing entries that are missing."""
    values = R[rows, tasks]
    missing = values.isnan().nonzero()
    if missing.numel():
        row, task = rows[int(missing[0])], tasks[int(missing[0])]
        raise ValueError(f"{metric} needs {name}[{row}, {task}], which is NaN: task {task} was not evaluated there.")
    return values


def needed_per_task(values: Tensor, tasks: list[int], R: Tensor, name: str) -> Tensor:
    """Return ``values[tasks]`` of a vector with one entry per task, refusing entries that are missing."""
    if values.shape != R.shape[1:]:
        raise ValueError(f"`{name}` must be Tensor[{R.shape[1]}], one score per task, got shape {tuple(values.shape)}.")
    for task in tasks:
        if values[task].isnan():
            raise ValueError(f"{name}[{task}] is NaN, but task {task} is among the tasks seen.")
    return values[tasks].to(R)
