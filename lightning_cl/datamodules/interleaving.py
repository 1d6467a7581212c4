"""Requests to forget in a stream: which rows they name, and how they stand between the tasks to learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lightning_cl.core.requests import ForgetRequest
from lightning_cl.datamodules.labels import read_column
from lightning_cl.datamodules.scenarios import TaskPlan
from lightning_cl.datamodules.splits import Split

__all__ = ["interleave", "requested_rows"]


def requested_rows(request: ForgetRequest, train: Split) -> np.ndarray:
    """Return the rows of the training data that a request names, int64 [n], ascending.

    Raises:
        ValueError: If it names rows, classes, columns or values that the data does not have.
    """
    size = len(train)
    if request.rows is not None:
        rows = np.unique(np.asarray(request.rows))
        if rows.dtype.kind not in "iu" or rows[0] < 0 or rows[-1] >= size:
            raise ValueError(
                f"`rows` of request {request.name!r} must be rows of the training data, 0 to {size - 1}; it has"
                f" {rows[0]} to {rows[-1]}."
            )
        return rows.astype(np.int64)
    chosen = np.ones(size, dtype=bool)
    columns: dict[str, tuple[np.ndarray | None, list[Any]]]
    if request.classes is not None:
        columns = {"classes": (train.labels, request.classes)}
    else:
        columns = {name: (read_column(train.dataset, name), values) for name, values in (request.where or {}).items()}
    for name, (column, values) in columns.items():
        if column is None:
            raise ValueError(
                f"Request {request.name!r} names `classes`, but the training data has no labels that can be found. Name"
                " their key or position in a sample with `label`, or give the dataset an integer attribute `targets`."
            )
        for value in values:
            if not (column == value).any():
                raise ValueError(
                    f"Request {request.name!r} names {value!r} of `{name}`, which no training sample has. Where samples"
                    " were deleted since it was served, keep placeholders in their rows, with the column, or, in a run"
                    " that does not go on from a checkpoint, take it out of `requests`."
                )
        chosen &= np.isin(column, values)
    return np.flatnonzero(chosen)


def interleave(
    learning: Sequence[TaskPlan], requests: Sequence[ForgetRequest], train: Split
) -> tuple[list[TaskPlan], list[ForgetRequest | None]]:
    """Return the tasks of a stream with its requests in their places, and the request that each of them serves.

    A request forgets what it names of the rows learned before it and not forgotten since; what it names of tasks still
    to come is taken out of them. Its ``retained`` rows are those learned before it and forgotten by no request so far.

    Raises:
        ValueError: If a request comes before anything is learned or after the stream, names nothing that is left to
            forget, shares its name with another, or leaves a later task without samples; or if tasks transform inputs.
    """
    names = [request.name for request in requests]
    if len(set(names)) < len(names):
        raise ValueError(f"`requests` must have names of their own, got {names}.")
    if requests and any(plan.transform is not None for plan in learning):
        raise ValueError(
            "`requests` name rows of the training data, but the scenario shows each row in several ways, as another"
            " sample in every task. Use a scenario without transforms of inputs."
        )
    for request in requests:
        if request.after is not None and not 0 < request.after <= len(learning):
            raise ValueError(
                f"Request {request.name!r} comes `after={request.after}` tasks; the stream has {len(learning)}, and at"
                " least 1 must come first."
            )
    plans: list[TaskPlan] = []
    served: list[ForgetRequest | None] = []
    learned = np.zeros(len(train), dtype=bool)
    gone = np.zeros(len(train), dtype=bool)
    for position, plan in enumerate(learning, start=1):
        left = plan.indices[~gone[plan.indices]]
        if not len(left):
            raise ValueError(f"All samples of task {plan.name!r} are forgotten before it comes: drop the task.")
        plans.append(plan if len(left) == len(plan.indices) else replace(plan, indices=left))
        served.append(None)
        learned[left] = True
        for request in (r for r in requests if (r.after or len(learning)) == position):
            rows = requested_rows(request, train)
            forgotten = rows[learned[rows] & ~gone[rows]]
            if not len(forgotten):
                raise ValueError(
                    f"Request {request.name!r} names {len(rows)} samples, but none of them was learned before it and is"
                    " not forgotten yet."
                )
            gone[rows] = True
            classes = () if train.labels is None else tuple(np.unique(train.labels[forgotten]).tolist())
            retained = np.flatnonzero(learned & ~gone)
            plans.append(TaskPlan(request.name, forgotten, classes, retained=retained, requested=len(rows)))
            served.append(request)
    return plans, served
