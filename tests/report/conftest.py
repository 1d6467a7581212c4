"""Records with known numbers, shared by the tests of the report."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_cl import metrics
from lightning_cl.report import RunRecord, WithinTask

NAMES = ["average_accuracy", "forgetting", "backward_transfer", "learning_accuracy"]


def make_record(method: str = "ewc", seed: int | None = 0, tasks: int = 3, keep: float = 0.5, **changes) -> RunRecord:
    """Build a record whose old tasks keep the share ``keep`` of their score; ``joint`` has one row over all tasks."""
    base = 0.9 + 0.01 * (seed or 0)
    if method == "joint":
        matrix, trained = [[base] * tasks], [list(range(tasks))]
    else:
        matrix = [[base if i == t else base * keep if i < t else math.nan for i in range(tasks)] for t in range(tasks)]
        trained = None
    R = torch.tensor(matrix, dtype=torch.float64)
    arguments = {
        "method": method,
        "seed": seed,
        "monitor": "val_acc",
        "task_names": [f"digits {2 * i}-{2 * i + 1}" for i in range(tasks)],
        "matrix": matrix,
        "trained": trained,
        "summary": {name: float(getattr(metrics, name)(R, trained=trained)) for name in NAMES},
        "config": "model:\n  lr: 0.1\n",
        "train_seconds": 10.0 + (seed or 0),
        "peak_memory_mib": 400.0,
        "versions": {"torch": "2.13.0"},
        "created": "2026-01-15T10:12:03+00:00",
    }
    return RunRecord(**{**arguments, **changes})


def make_within(tasks: int, per_task: int = 4) -> WithinTask:
    """Evaluate ``per_task`` times in each task, all tasks seen, at steps 10 apart."""
    row_of = [task for task in range(tasks) for _ in range(per_task)]
    scores = [[0.8 if i <= task else math.nan for i in range(tasks)] for task in row_of]
    return WithinTask(step=[10 * (i + 1) for i in range(len(row_of))], task=row_of, scores=scores)


@pytest.fixture(scope="session", name="make_record")
def make_record_fixture():
    """Give :func:`make_record`."""
    return make_record


@pytest.fixture(scope="session", name="make_within")
def make_within_fixture():
    """Give :func:`make_within`."""
    return make_within
