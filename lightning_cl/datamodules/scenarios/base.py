"""What every scenario shares: the facts it reads, the plans it makes, the checks and the splitting of indices."""

from __future__ import annotations

import inspect
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["DataInfo", "Scenario", "TaskPlan"]

IndexArray = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class DataInfo:
    """What a scenario may know of a dataset, without reading an input.

    Args:
        length: Number of samples.
        labels: Integer labels ``[length]``; ``None`` when the dataset has none.
        domains: One value of any type per sample ``[length]``; ``None`` when the dataset has none.
        boundaries: Where each dataset starts in the concatenation when the user gave a list; ``None`` for one dataset.
        lengths: Tokens of each sample that are no padding, int64 ``[length]``; ``None`` when they are not known.
    """

    length: int
    labels: np.ndarray | None
    domains: np.ndarray | None = None
    boundaries: tuple[int, ...] | None = None
    lengths: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, values in (("labels", self.labels), ("domains", self.domains), ("lengths", self.lengths)):
            if values is not None and values.shape != (self.length,):
                raise ValueError(
                    f"`{name}` must hold one value for each of the {self.length} samples, got shape {values.shape}."
                )
        if self.labels is not None and self.labels.dtype.kind not in "iu":
            raise ValueError(f"`labels` must be integers, got {self.labels.dtype}; map each class to a number from 0.")


@dataclass(frozen=True, eq=False)
class TaskPlan:
    """One task of a stream, before training.

    Args:
        name: Short name, unique in the stream.
        indices: int64 indices into the training set, at least one.
        classes: Labels that occur among the samples; ``()`` when unknown.
        transform: Acts on a batch of inputs ``[B, ...]``; ``None`` leaves them as they are.
        source: Position of the task that this one repeats, in a :class:`Recurring` stream; ``None`` elsewhere.
        joined: The tasks that this one holds, in a :class:`Joint` stream.
        retained: Of a request to forget: indices of what was learned before and is not forgotten; ``None`` for a task
            to learn.
        requested: Of a request to forget: samples that it names, also those that were not learned.
    """

    name: str
    indices: IndexArray
    classes: tuple[int, ...]
    transform: Callable[[Tensor], Tensor] | None = None
    source: int | None = None
    joined: tuple[TaskPlan, ...] = ()
    retained: IndexArray | None = None
    requested: int = 0

    def __post_init__(self) -> None:
        if self.indices.dtype != np.int64 or self.indices.ndim != 1:
            raise ValueError(
                f"Task '{self.name}': `indices` must be a 1-D int64 array, got {self.indices.dtype} of shape"
                f" {self.indices.shape}."
            )
        if len(self.indices) == 0:
            raise ValueError(f"Task '{self.name}' holds no training sample; drop the task or give it data.")
        if self.indices.min() < 0:
            raise ValueError(f"Task '{self.name}': `indices` must be at least 0, got {self.indices.min()}.")


class Scenario(ABC):
    """Turns a training set into tasks, and an evaluation set into one part per task.

    Both methods are pure functions of their arguments: the same data and seed give the same stream on every rank
    and after every restart.

    Attributes:
        reveals_task: The module is told the task of an evaluation batch.
        hides_boundaries: Methods that need task boundaries are refused or not told.
        single_pass: Every sample is trained on once.
        needs_labels: The split cannot be made without labels.
        domain_column: Column with the domain of each sample, when the split needs one.
    """

    reveals_task: bool = False
    hides_boundaries: bool = False
    single_pass: bool = False
    needs_labels: bool = False
    domain_column: str | None = None

    def __repr__(self) -> str:
        settings = [name for name in inspect.signature(type(self)).parameters if hasattr(self, name)]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in settings)})"

    @abstractmethod
    def plan(self, train: DataInfo, seed: int) -> list[TaskPlan]:
        """Return the tasks in the order of the stream.

        Raises:
            ValueError: If the data cannot be split as asked.
        """

    def parts(self, plans: list[TaskPlan]) -> list[TaskPlan]:
        """Return what is evaluated separately: the tasks themselves, unless a stream repeats or joins them."""
        return plans

    def trained(self, plans: list[TaskPlan]) -> list[list[int]]:
        """Return, for each task, the positions in :meth:`parts` of what it trains."""
        return [[index] for index in range(len(plans))]

    @abstractmethod
    def evaluation(self, plans: list[TaskPlan], data: DataInfo, seed: int) -> list[IndexArray]:
        """Return the indices into the validation or test set that belong to each of :meth:`parts`.

        Args:
            plans: What :meth:`plan` returned.
            data: The evaluation set.
            seed: The seed given to :meth:`plan`.

        Raises:
            ValueError: If a task would have no sample to be evaluated on.
        """


def generator(seed: int, purpose: str) -> np.random.Generator:
    """Return a generator that depends on the seed and on what it is for, so that equal seeds share no draws."""
    if seed < 0:
        raise ValueError(f"`seed` must be at least 0, got {seed}.")
    return np.random.default_rng([seed, zlib.crc32(purpose.encode())])


def check_n_tasks(n_tasks: int) -> int:
    """Return ``n_tasks``, or raise ``ValueError`` if there would be no task."""
    if n_tasks < 1:
        raise ValueError(f"`n_tasks` must be at least 1, got {n_tasks}.")
    return n_tasks


def classes_of(labels: np.ndarray | None) -> tuple[int, ...]:
    """Return the distinct labels in ascending order, ``()`` when there are none."""
    return () if labels is None else tuple(np.unique(labels).tolist())


def required_labels(data: DataInfo, user: Scenario) -> np.ndarray:
    """Return the labels, or raise ``ValueError`` naming the scenario that cannot do without."""
    if data.labels is None:
        raise ValueError(
            f"`{type(user).__name__}` splits by label, but the dataset has no labels that can be read. Name the label"
            " (column or position in the sample), give the dataset a `targets` attribute, or use a scenario that"
            " needs none, such as `DataIncremental`."
        )
    if data.length and data.labels.min() < 0:
        raise ValueError(
            f"`{type(user).__name__}` splits by label, and labels must be at least 0, got {data.labels.min()}."
            " Drop the samples without a class from the dataset."
        )
    return data.labels


def split_sizes(total: int, parts: int) -> list[int]:
    """Return sizes as equal as possible; the first ``total % parts`` are one larger.

    >>> split_sizes(10, 4)
    [3, 3, 2, 2]
    """
    return [total // parts + (part < total % parts) for part in range(parts)]


def group(task_of: np.ndarray, n_tasks: int) -> list[IndexArray]:
    """Return, for each task, the ascending indices at which ``task_of`` names it; entries past the tasks are left out.

    One stable sort of small integers (a radix sort in numpy), no loop over samples.
    """
    keys = task_of.astype(np.uint16 if n_tasks < 2**16 else np.int64)
    order = np.argsort(keys, kind="stable").astype(np.int64, copy=False)
    ends = np.cumsum(np.bincount(keys, minlength=n_tasks + 1))
    return np.split(order[: ends[n_tasks - 1]], ends[: n_tasks - 1])


def match(values: np.ndarray, known: np.ndarray, task_of_known: np.ndarray, n_tasks: int) -> np.ndarray:
    """Return the task of each value, ``n_tasks`` for values that are not in ``known`` (no order needed)."""
    order = np.argsort(known)
    position = np.minimum(np.searchsorted(known, values, sorter=order), len(known) - 1)
    found = order[position]
    return np.where(known[found] == values, task_of_known[found], n_tasks)


def evaluation_parts(
    values: np.ndarray, groups: Sequence[Sequence[Any]], plans: list[TaskPlan], kind: str
) -> list[IndexArray]:
    """Return the samples of the evaluation set whose value belongs to each task's group.

    Args:
        values: Label or domain of each sample.
        groups: The values that belong to each task, disjoint.
        plans: The tasks, for their names.
        kind: ``"label"`` or ``"domain"``, for messages.

    Raises:
        ValueError: If a task would have no sample.
    """
    known = np.concatenate([np.asarray(part) for part in groups])
    task_of_known = np.repeat(np.arange(len(groups)), [len(part) for part in groups])
    task_of = match(values, known, task_of_known, len(groups))
    parts = group(task_of, len(groups))
    for plan, part in zip(plans, parts, strict=True):
        check_evaluated(plan, part)
    unknown = values[task_of == len(groups)]
    if len(unknown):
        shown = ", ".join(str(value) for value in np.unique(unknown)[:5])
        warnings.warn(
            f"{len(unknown)} of {len(values)} evaluation samples have a {kind} that no task trains on ({shown});"
            " they are left out of the evaluation.",
            stacklevel=3,
        )
    return parts


def check_evaluated(plan: TaskPlan, part: IndexArray) -> None:
    """Raise ``ValueError`` if the task has no sample to be evaluated on."""
    if len(part) == 0:
        raise ValueError(
            f"The evaluation set holds no sample of task '{plan.name}'. Add samples of each task to `val` and `test`,"
            " or leave the set out."
        )
