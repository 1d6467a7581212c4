"""Recall at a guaranteed interval, with several views (Kang et al. 2025, arXiv:2503.18371)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from typing_extensions import override

from lightning_cl.core.rng import derived_seed
from lightning_cl.memory.hashing import Int64Array, sample_keys
from lightning_cl.memory.index import SlotChange
from lightning_cl.memory.recall.base import LocalSamples, Recall
from lightning_cl.memory.recall.slots import SlotValues

__all__ = ["ViewBatch"]


class ViewBatch(Recall):
    r"""The least recently trained samples first, each with several views at once.

    A draw of :math:`s` takes the :math:`s / V` samples that have waited longest, and gives each of them V times in a
    row. A sample does not come back before all others of its rank came, so with n of them it rests for at least
    :math:`\lfloor n V / s \rfloor - 1` draws, V times as long as if each came once. Samples enter behind all others,
    as the model has just seen them; those that enter together are ordered by a hash of their identity. If V does not
    divide the size, the last sample comes less often.

    The views differ by what the memory does to a sample when it is read: its ``transform``, or the random transforms of
    the dataset with ``storage="index"``. Without either they are copies.

    Kang et al. 2025, "Do Your Best and Get Enough Rest for Continual Learning", CVPR, arXiv:2503.18371.

    Args:
        views: V, from 1.

    Raises:
        ValueError: If ``views`` is below 1.
    """

    name: ClassVar[str] = "view_batch"
    bytes_per_sample: ClassVar[int] = 24

    def __init__(self, views: int = 4) -> None:
        if views < 1:
            raise ValueError(f"`views` must be at least 1, got {views!r}.")
        self.views = views
        # the slots of all samples in the order of their turns, -1 for turns that are given up
        self._queue: Int64Array = np.empty(0, dtype=np.int64)
        self._first = self._end = 0
        # where each slot stands in it
        self._turns = SlotValues()

    @override
    def follow(self, change: SlotChange, samples: LocalSamples) -> None:
        new = np.full(len(change.slots), -1)
        self._queue[self._turns.follow(change, new)] = -1
        self._queue[self._turns.values[change.targets]] = change.targets
        self._append(change.slots[np.argsort(self._ties(samples, change.slots))])

    @override
    def choose(self, samples: LocalSamples, size: int, generator: torch.Generator, *, task: int) -> Int64Array:
        wanted = min(-(-size // self.views), len(samples))
        if len(samples) < len(self._turns.values):
            among = self._turns.values[samples.slots()]
            positions = np.argpartition(among, wanted - 1)[:wanted]
            positions = positions[np.argsort(among[positions])]
            slots = samples.slots(positions)
        else:
            positions = slots = self._next(wanted)
        self._queue[self._turns.values[slots]] = -1
        self._append(slots)
        chosen: Int64Array = np.repeat(positions, self.views)[:size]
        return chosen

    def _next(self, wanted: int) -> Int64Array:
        """Return the slots whose turn it is."""
        found: list[Int64Array] = []
        while wanted:
            part = self._queue[self._first : min(self._first + wanted, self._end)]
            self._first += len(part)
            part = part[part >= 0]
            found.append(part)
            wanted -= len(part)
        return np.concatenate(found)

    def _append(self, slots: Int64Array) -> None:
        """Put slots behind all others."""
        if self._end + len(slots) > len(self._queue):
            waiting = self._queue[self._first : self._end]
            waiting = waiting[waiting >= 0]
            self._queue = np.full(2 * (len(waiting) + len(slots)), -1)
            self._queue[: len(waiting)] = waiting
            self._turns.values[waiting] = np.arange(len(waiting))
            self._first, self._end = 0, len(waiting)
        self._queue[self._end : self._end + len(slots)] = slots
        self._turns.values[slots] = np.arange(self._end, self._end + len(slots))
        self._end += len(slots)

    @override
    def state_dict(self) -> dict[str, Any]:
        # how many come before each sample: draws of all ranks are as large, so this compares between ranks
        waiting = np.empty(len(self._turns.values), dtype=np.int64)
        waiting[np.argsort(self._turns.values)] = np.arange(len(waiting))
        return {"waiting": torch.from_numpy(waiting)}

    @override
    def load_state_dict(
        self, parts: Sequence[Mapping[str, Any]], *, kept: Int64Array, rank: int | None, samples: LocalSamples
    ) -> None:
        waiting = np.concatenate([part["waiting"].numpy() for part in parts])[kept]
        self._turns.restore(np.full(len(waiting), -1))
        self._queue, self._first, self._end = np.empty(0, dtype=np.int64), 0, 0
        self._append(np.lexsort((self._ties(samples, slice(None)), waiting)))

    def _ties(self, samples: LocalSamples, slots: Int64Array | slice) -> Int64Array:
        # not the keys of the reservoir, which decide how long a sample stays
        return sample_keys(samples.sample_ids(slots), derived_seed(self.seed, "recall"))
