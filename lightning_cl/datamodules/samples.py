"""The training samples of a stream by their identities."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_cl.core.rng import derived_seed, isolated_rng
from lightning_cl.core.task import Task
from lightning_cl.datamodules.batches import batch_reader
from lightning_cl.datamodules.loader import BatchDataset, RequestDataset, TaskLoader
from lightning_cl.datamodules.plan import StreamPlan
from lightning_cl.datamodules.samplers import BatchIndex, EvaluationSampler, TaskSampler
from lightning_cl.datamodules.splits import Split

__all__ = ["TrainingSamples"]


class TrainingSamples:
    """Reads training samples and knows who they are.

    An identity is stable for the run: the row of the training dataset, plus ``task * rows`` where the task shows the
    row in its own way (permuted or rotated inputs).

    Args:
        split: The training data.
        plan: The tasks.
        collate_fn: Joins samples to a batch.
        seed: Seed of the stream.
    """

    def __init__(
        self, split: Split, plan: StreamPlan, collate_fn: Callable[[list[Any]], Any] | None, seed: int
    ) -> None:
        self.labels = split.labels
        self._size = len(split)
        self._plan = plan
        self._dataset: Any = split.dataset
        self._reader = batch_reader(split.dataset, collate_fn)
        self._seed = seed

    def dataset(self, task: int) -> BatchDataset:
        """Return the data as ``task`` shows it."""
        plan = self._plan.plans[task]
        return (BatchDataset if plan.retained is None else RequestDataset)(self._reader, plan.transform)

    def batch_ids(self, sampler: TaskSampler, batch: int) -> tuple[Tensor, Tensor]:
        """Return identities and ranks of the samples of all ranks in a step, both int64 [samples of all ranks]."""
        rows = sampler.global_rows(batch) + self._first_id(sampler.task)
        # numpy's small arrays cost less than torch's, in every step
        owners = np.repeat(np.arange(rows.shape[0]), rows.shape[1])
        return torch.from_numpy(rows.reshape(-1)), torch.from_numpy(owners)

    def labels_of(self, sample_ids: Tensor) -> Tensor | None:
        """Return the labels of identities, int64, without reading samples; ``None`` if the data has no labels."""
        return None if self.labels is None else torch.from_numpy(self.labels[sample_ids.numpy() % self._size])

    def largest_label(self) -> tuple[int, Task, Tensor] | None:
        """Return the largest label of all tasks, the first task with it and the identity of a sample, int64 [1]."""
        if self.labels is None:
            return None
        task = max(self._plan.tasks, key=lambda task: max(task.classes, default=-1))
        rows = self._plan.plans[task.index].indices
        row = rows[self.labels[rows].argmax()]
        return int(self.labels[row]), task, torch.tensor([row + self._first_id(task.index)])

    def fetch(self, sample_ids: Tensor, seed: int = 0) -> Any:
        """Read the samples of identities anew, as one batch; random transforms give the same for the same seed."""
        ids = sample_ids.numpy()
        rows, views = ids % self._size, ids // self._size
        if len(set(views.tolist())) > 1:
            raise ValueError(
                "Samples of tasks with different input transforms cannot be read as one batch: use"
                " `storage='memory'` with this scenario."
            )
        plan = self._plan.part_plans[int(views[0]) if len(views) else 0]
        read_seed = derived_seed(self._seed, "fetch", seed, zlib.crc32(rows.tobytes()))
        return BatchDataset(self._reader, plan.transform)[BatchIndex(rows, read_seed)]

    def of_task(
        self, sampler: TaskSampler, n_samples: int | None, limit_batches: float
    ) -> Iterator[tuple[Any, Tensor]]:
        """Read the sampler's task in order, each sample once over all ranks, with identities.

        Args:
            sampler: Tells the task and the ranks.
            n_samples: Samples over all ranks, drawn at random by the stream's seed; all if ``None``.
            limit_batches: At most as many samples as this many training steps read.
        """
        rows = sampler.rows
        wanted = len(rows) if n_samples is None else n_samples
        if sampler.steps is not None:
            limit_batches = min(limit_batches, sampler.steps)
        wanted = int(min(wanted, limit_batches * sampler.global_batch_size))
        if wanted < len(rows):
            chosen = np.random.default_rng(derived_seed(self._seed, "subset", sampler.task))
            rows = np.sort(chosen.choice(rows, wanted, replace=False))
        ordered = EvaluationSampler(
            rows, batch_size=sampler.batch_size, rank=sampler.rank, world_size=sampler.world_size
        )
        first_id = self._first_id(sampler.task)
        for index, batch in zip(ordered, TaskLoader(self.dataset(sampler.task), ordered), strict=True):
            yield batch, torch.from_numpy(np.ascontiguousarray(index.rows)) + first_id

    def in_order(
        self, sample_ids: Tensor, batch_size: int, *, rank: int, world_size: int
    ) -> Iterator[tuple[Any, Tensor]]:
        """Read samples of tasks without transforms in order, each once over all ranks, with identities."""
        ordered = EvaluationSampler(sample_ids.numpy(), batch_size=batch_size, rank=rank, world_size=world_size)
        dataset = BatchDataset(self._reader)
        for index, batch in zip(ordered, TaskLoader(dataset, ordered), strict=True):
            yield batch, torch.from_numpy(np.ascontiguousarray(index.rows))

    def raw(self, sample_ids: Tensor) -> Iterator[Any]:
        """Yield samples of tasks without transforms as the dataset gives them; of rows that it has not, none."""
        for row in sample_ids[sample_ids < self._size].tolist():
            # one that is augmented at random looks the same each time
            with isolated_rng(0):
                sample = self._dataset[row]
            yield sample

    def _first_id(self, task: int) -> int:
        # a task that shows the rows in its own way makes other samples of them, the same ones at each visit
        plan = self._plan.plans[task]
        view = task if plan.source is None else plan.source
        return view * self._size if plan.transform is not None else 0
