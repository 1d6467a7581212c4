"""Class- and task-incremental streams: each task brings new classes."""

from __future__ import annotations

from typing import Literal

import numpy as np
from typing_extensions import override

from lightning_cl.datamodules.scenarios.base import (
    DataInfo,
    IndexArray,
    Scenario,
    TaskPlan,
    check_n_tasks,
    evaluation_parts,
    generator,
    group,
    required_labels,
    split_sizes,
)

__all__ = ["ClassIncremental", "TaskIncremental"]


class _ClassSplit(Scenario):
    """Deals the classes to the tasks; see :class:`ClassIncremental`."""

    needs_labels = True

    def __init__(self, n_tasks: int, order: Literal["sorted", "shuffled"] | list[int] = "sorted") -> None:
        self.n_tasks = check_n_tasks(n_tasks)
        if isinstance(order, str) and order not in ("sorted", "shuffled"):
            raise ValueError(f"`order` must be 'sorted', 'shuffled' or a list of labels, got {order!r}.")
        self.order = order

    @override
    def plan(self, train: DataInfo, seed: int) -> list[TaskPlan]:
        labels = required_labels(train, self)
        present, inverse = np.unique(labels, return_inverse=True)
        ordered = self._ordered(present, seed)
        if len(present) < self.n_tasks:
            raise ValueError(
                f"`n_tasks={self.n_tasks}` asks for more tasks than the training set has classes ({len(present)});"
                f" set `n_tasks` to at most {len(present)}."
            )
        sizes = split_sizes(len(ordered), self.n_tasks)
        task_of_class = np.empty(len(present), dtype=np.int64)
        task_of_class[np.searchsorted(present, ordered)] = np.repeat(np.arange(self.n_tasks), sizes)
        indices = group(task_of_class[inverse], self.n_tasks)
        classes = np.split(ordered, np.cumsum(sizes)[:-1])
        return [
            TaskPlan(name=_name(part.tolist()), indices=chosen, classes=tuple(part.tolist()))
            for part, chosen in zip(classes, indices, strict=True)
        ]

    @override
    def evaluation(self, plans: list[TaskPlan], data: DataInfo, seed: int) -> list[IndexArray]:
        return evaluation_parts(required_labels(data, self), [plan.classes for plan in plans], plans, "label")

    def _ordered(self, present: np.ndarray, seed: int) -> np.ndarray:
        if isinstance(self.order, str):
            return generator(seed, "class order").permutation(present) if self.order == "shuffled" else present
        ordered = np.asarray(self.order, dtype=np.int64)
        values, counts = np.unique(ordered, return_counts=True)
        for problem, found, way_out in (
            ("names labels twice", values[counts > 1], "name each label once"),
            ("names labels that the training set lacks", np.setdiff1d(values, present), "take them out"),
            ("leaves out labels of the training set", np.setdiff1d(present, values), "add them, or drop their samples"),
        ):
            if len(found):
                raise ValueError(f"`order` {problem}: {found.tolist()}; {way_out}.")
        return ordered


class ClassIncremental(_ClassSplit):
    """Each task brings classes that no other task has; the task of a batch is not revealed (class-IL).

    Classes are dealt in ``order``, as equally as possible: when ``n_tasks`` does not divide their number, each of
    the first ``classes % n_tasks`` tasks has one class more. No class and no sample is dropped.

    Args:
        n_tasks: Number of tasks, at least 1 and at most the number of classes.
        order: ``"sorted"`` by label, ``"shuffled"`` by the seed, or a list that names every label once.

    Raises:
        ValueError: When planning, without labels, with fewer classes than tasks, or if ``order`` names labels that
            do not occur, names one twice or leaves one out.

    Example:
        >>> info = DataInfo(length=6, labels=np.array([0, 1, 2, 0, 1, 2]))
        >>> [(task.name, task.indices.tolist()) for task in ClassIncremental(n_tasks=2).plan(info, seed=0)]
        [('classes 0-1', [0, 1, 3, 4]), ('class 2', [2, 5])]
    """


class TaskIncremental(_ClassSplit):
    """The split of :class:`ClassIncremental`, with the task of each batch known to the module (task-IL).

    Args:
        n_tasks: Number of tasks, at least 1 and at most the number of classes.
        order: ``"sorted"`` by label, ``"shuffled"`` by the seed, or a list that names every label once.

    Raises:
        ValueError: As for :class:`ClassIncremental`.
    """

    reveals_task = True


def _name(classes: list[int]) -> str:
    """Name the classes of a task briefly; tasks share no class, so that the first one keeps names apart."""
    if len(classes) == 1:
        return f"class {classes[0]}"
    if classes == list(range(classes[0], classes[0] + len(classes))):
        return f"classes {classes[0]}-{classes[-1]}"
    if len(classes) <= 4:
        return "classes " + " ".join(map(str, classes))
    return f"classes {classes[0]} {classes[1]} .. {classes[-1]} ({len(classes)})"
