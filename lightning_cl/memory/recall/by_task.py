"""What recall schedules by the task of a sample share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from typing_extensions import override

from lightning_cl.memory.hashing import Float64Array, Int64Array
from lightning_cl.memory.index import SlotChange
from lightning_cl.memory.recall.base import LocalSamples, Recall
from lightning_cl.memory.recall.chances import weighted
from lightning_cl.memory.recall.slots import SlotGroups

__all__ = ["ByTask"]


class ByTask(Recall):
    """The chance of a sample depends on its task; no sample comes twice in a draw."""

    needs_boundaries: ClassVar[bool] = True
    bytes_per_sample: ClassVar[int] = 8

    def __init__(self) -> None:
        self._tasks = SlotGroups()

    @abstractmethod
    def weights(self, counts: Int64Array, task: int) -> Float64Array:
        """Return the weight of a sample of each task, at least 0.

        Args:
            counts: Samples of each task that there are to draw from.
            task: The running task.
        """

    @override
    def follow(self, change: SlotChange, samples: LocalSamples) -> None:
        self._tasks.follow(change, samples.tasks(change.slots))

    @override
    def choose(self, samples: LocalSamples, size: int, generator: torch.Generator, *, task: int) -> Int64Array:
        tasks, counts = self._tasks.values, self._tasks.counts
        if len(samples) < len(tasks):
            tasks = tasks[samples.slots()]
            counts = np.bincount(tasks, minlength=len(counts))
        return weighted(tasks, counts, self.weights(counts, task), size, generator)

    @override
    def load_state_dict(
        self, parts: Sequence[Mapping[str, Any]], *, kept: Int64Array, rank: int | None, samples: LocalSamples
    ) -> None:
        self._tasks.restore(samples.tasks())
