"""Which samples each rank reads at each step: a pure function of (seed, task, epoch) and a position in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DistributedSampler

from lightning_cl.core.rng import derived_seed

__all__ = ["BatchIndex", "EvaluationSampler", "RequestIndex", "RequestSampler", "TaskSampler"]


@dataclass(frozen=True)
class BatchIndex:
    """What a sampler asks the dataset for: one batch of rows, and a seed for the randomness of reading it."""

    rows: np.ndarray
    seed: int


@dataclass(frozen=True)
class RequestIndex:
    """What the sampler of a request asks for: a batch to forget, and one of what is retained, if anything is."""

    forget: BatchIndex
    retain: BatchIndex | None


class _RankSampler(DistributedSampler[Any]):
    """The part that Lightning looks at: under DDP it replaces any sampler that is not a ``DistributedSampler``."""

    def __init__(self, rank: int, world_size: int) -> None:
        # the base class only wants a length; the order is made here
        super().__init__(range(1), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.rank = rank
        self.world_size = world_size


class TaskSampler(_RankSampler):
    """Batches of one task's training samples, in an order that depends on the seed, the task and the epoch only.

    The *global* batch of a step holds ``batch_size`` samples for each rank; rank r takes the r-th part of it. When the
    last global batch of an epoch does not divide by the ranks, it is filled up from the start of the epoch's order
    (at most ``world_size - 1`` repeats an epoch); nothing is dropped.

    Args:
        rows: int64 [n], the task's rows in the training dataset.
        task: Index of the task in the stream.
        batch_size: Samples for each rank and step.
        seed: Seed of the stream.
        steps: Steps in an epoch; ``None`` for one pass over the rows. More steps than a pass go on with new orders.
        shuffle: Whether the order is shuffled.
        rank: This process.
        world_size: All processes.
    """

    def __init__(
        self,
        rows: np.ndarray,
        *,
        task: int,
        batch_size: int,
        seed: int,
        steps: int | None = None,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(rank, world_size)
        self.rows = rows
        self.task = task
        self.batch_size = batch_size
        self.seed = seed
        self.steps = steps
        self.shuffle = shuffle
        self.set_position(epoch=0)

    def set_position(self, *, epoch: int, batches: int = 0, samples: int = 0) -> None:
        """Start at an epoch of the task, after ``batches`` steps that consumed ``samples`` samples over all ranks.

        The two are separate because the steps before may have been made on another number of ranks.
        """
        self.task_epoch = epoch
        self.start_batches = batches
        self.start_samples = samples
        self._orders: dict[int, np.ndarray] = {}

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the datamodule sets the epoch, before Lightning creates the iterator."""

    @property
    def global_batch_size(self) -> int:
        """Samples of a full step over all ranks."""
        return self.batch_size * self.world_size

    def __len__(self) -> int:
        """Return the steps of the epoch, those before the starting position included."""
        if self.steps is not None:
            return self.steps
        return self.start_batches - (-(len(self.rows) - self.start_samples) // self.global_batch_size)

    def samples_after(self, batches: int) -> int:
        """Return the samples over all ranks that the first ``batches`` steps of this epoch consume."""
        consumed = self.start_samples + (batches - self.start_batches) * self.global_batch_size
        return consumed if self.steps is not None else min(consumed, len(self.rows))

    def global_rows(self, batch: int) -> np.ndarray:
        """Return the rows of a step for all ranks, int64 [world_size, n]."""
        start = self.start_samples + (batch - self.start_batches) * self.global_batch_size
        stop = start + self.global_batch_size
        if self.steps is None:
            stop = min(stop, len(self.rows))
            stop += -(stop - start) % self.world_size
        return self._slice(start, stop).reshape(self.world_size, -1)

    def __iter__(self) -> Iterator[Any]:
        for batch in range(self.start_batches, len(self)):
            seed = derived_seed(self.seed, "read", self.task, self.task_epoch, batch, self.rank)
            yield BatchIndex(self.global_rows(batch)[self.rank], seed)

    def _slice(self, start: int, stop: int) -> np.ndarray:
        """Return positions ``start`` to ``stop`` of the endless sequence of this epoch's orders."""
        size = len(self.rows)
        first, last = start // size, (stop - 1) // size
        if first == last:
            return self._order(first)[start - first * size : stop - first * size]
        parts = [
            self._order(cycle)[max(start - cycle * size, 0) : stop - cycle * size] for cycle in range(first, last + 1)
        ]
        return np.concatenate(parts)

    def _order(self, cycle: int) -> np.ndarray:
        # filling up the last step of a pass repeats this pass's own order
        key = cycle if self.steps is not None else 0
        if key not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k == key - 1}
            if self.shuffle:
                seed = derived_seed(self.seed, "order", self.task, self.task_epoch, key)
                self._orders[key] = np.random.default_rng(seed).permutation(self.rows)
            else:
                self._orders[key] = self.rows
        return self._orders[key]


class RequestSampler(TaskSampler):
    """Batches of what a request forgets, each with as many samples of what is retained.

    The retained samples are drawn with replacement, for every rank and step anew.

    Args:
        retained: int64 [m], rows learned before and not forgotten; may be empty.
        settings: Those of :class:`TaskSampler`.
    """

    def __init__(self, rows: np.ndarray, retained: np.ndarray, **settings: Any) -> None:
        super().__init__(rows, **settings)
        self.retained = retained

    def __iter__(self) -> Iterator[Any]:
        for batch, forget in zip(range(self.start_batches, len(self)), super().__iter__(), strict=True):
            if not len(self.retained):
                yield RequestIndex(forget, None)
                continue
            seed = derived_seed(self.seed, "retain", self.task, self.task_epoch, batch, self.rank)
            drawn = np.random.default_rng(seed).integers(len(self.retained), size=len(forget.rows))
            yield RequestIndex(forget, BatchIndex(self.retained[drawn], seed))


class EvaluationSampler(_RankSampler):
    """Batches of an evaluation set in order, each sample once over all ranks, as many batches on every rank.

    Ranks may differ by one sample in a batch but never in the number of batches, so that sharded models, which
    communicate in every forward, do not wait for each other, and no batch is empty. A set of fewer samples than ranks
    is therefore read whole by every rank, which is the only case where a sample is read twice: each as often as the
    others, so that means over samples are those of one process.

    Args:
        rows: int64 [n], the rows to read.
        batch_size: Samples for each rank and batch, at most.
        rank: This process.
        world_size: All processes.
    """

    def __init__(self, rows: np.ndarray, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(rank, world_size)
        self.rows = rows
        self.batch_size = batch_size

    def __len__(self) -> int:
        if self._is_whole:
            return -(-len(self.rows) // self.batch_size)
        batches = -(-len(self.rows) // (self.batch_size * self.world_size))
        # in batches of one sample a rank with one sample fewer would run out of them
        return min(batches, len(self.rows) // self.world_size)

    def __iter__(self) -> Iterator[BatchIndex]:
        if self._is_whole:
            for batch, start in enumerate(range(0, len(self.rows), self.batch_size)):
                yield BatchIndex(self.rows[start : start + self.batch_size], derived_seed("evaluate", batch))
            return
        mine = self.rows[self.rank :: self.world_size]
        for batch, part in enumerate(np.array_split(mine, len(self))):
            yield BatchIndex(part, derived_seed("evaluate", batch, self.rank))

    @property
    def _is_whole(self) -> bool:
        return self.world_size == 1 or len(self.rows) < self.world_size
