"""The part of a task stream that reads training samples by their identities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_cl.core.requests import ForgetRequest
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.task import Task
from lightning_cl.datamodules.batches import batch_reader
from lightning_cl.datamodules.loader import BatchDataset, TaskLoader
from lightning_cl.datamodules.plan import StreamPlan
from lightning_cl.datamodules.samplers import EvaluationSampler, TaskSampler
from lightning_cl.datamodules.samples import TrainingSamples
from lightning_cl.datamodules.splits import Split

__all__ = ["IdentifiedSamples"]


class IdentifiedSamples:
    """What a stream offers callbacks beside its events.

    It is an :class:`~lightning_cl.core.task_data.IdentifiedData`, and a
    :class:`~lightning_cl.core.requests.RequestStream`.
    """

    batch_size: int
    seed: int
    collate_fn: Callable[[list[Any]], Any] | None
    _splits: dict[str, Split]
    _made: StreamPlan | None = None
    _samples: TrainingSamples | None = None

    @property
    def plan(self) -> StreamPlan:
        """The tasks in time; known from ``setup`` on."""
        if self._made is None:
            raise ValueError("The stream has no tasks yet: pass it to a Trainer, or call `setup('fit')`.")
        return self._made

    @property
    def samples(self) -> TrainingSamples:
        """The training samples by their identities; known from ``setup`` on."""
        if self._samples is None:
            raise ValueError("The stream has no samples yet: pass it to a Trainer, or call `setup('fit')`.")
        return self._samples

    def batch_sample_ids(self, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Return identities and ranks of the samples of all ranks in a step of the current epoch, both int64 [n]."""
        return self.samples.batch_ids(self._sampler(), batch_idx)

    def labels_of(self, sample_ids: Tensor) -> Tensor | None:
        """Return the labels of identities, int64, without reading samples; ``None`` if the data has no labels."""
        return self.samples.labels_of(sample_ids)

    def largest_label(self) -> tuple[int, Task, Tensor] | None:
        """Return the largest label of all tasks, the first task with it and the identity of a sample, int64 [1]."""
        return self.samples.largest_label()

    def fetch(self, sample_ids: Tensor, seed: int = 0) -> Any:
        """Read the samples of identities anew, as one batch; random transforms give the same for the same seed."""
        return self.samples.fetch(sample_ids, seed)

    def task_loader(self, n_samples: int | None, limit_batches: float) -> Iterator[tuple[Any, Tensor]]:
        """Read the current task's training data, each sample once over all ranks, with identities."""
        return self.samples.of_task(self._sampler(), n_samples, limit_batches)

    # ------------------------------------------------------------------ requests

    def request_of(self, task: Task) -> ForgetRequest:
        """Return the request that a task of the kind ``"forget"`` serves."""
        request = self.plan.requests[task.index]
        assert request is not None
        return request

    def forgotten_ids(self, task: Task) -> Tensor:
        """Return the identities that the request of ``task`` forgets, int64 [n], ascending."""
        return torch.from_numpy(np.sort(self.plan.plans[task.index].indices))

    def retained_ids(self, task: Task) -> Tensor:
        """Return the identities learned before ``task`` and not forgotten since, int64 [n], ascending."""
        retained = self.plan.plans[task.index].retained
        assert retained is not None
        return torch.from_numpy(retained)

    def read_samples(self, sample_ids: Tensor, batch_size: int | None = None) -> Iterator[tuple[Any, Tensor]]:
        """Read samples of the training data in order, each once over all ranks, with identities.

        Args:
            sample_ids: Identities, int64 [n], at least one; the same on all ranks.
            batch_size: Samples of a rank's batch; that of training if ``None``.
        """
        return self.samples.in_order(sample_ids, batch_size or self.batch_size, **self._ranks())

    def read_raw(self, sample_ids: Tensor) -> Iterator[Any]:
        """Read samples of the training data one by one as the dataset gives them; of rows that it has not, none."""
        return self.samples.raw(sample_ids)

    def requested(self, task: Task) -> int:
        """Return how many samples the request of ``task`` names, also those that were not learned."""
        return self.plan.plans[task.index].requested

    def read_holdout(self, task: Task, n_samples: int) -> Iterator[tuple[Any, Tensor]]:
        """Read validation samples of the tasks learned before ``task``, each once over all ranks, with their rows.

        There are none without validation data.

        Args:
            task: The task that serves a request.
            n_samples: At most so many over all ranks, the same ones at every call.
        """
        split = self._splits.get("val")
        if split is None:
            return
        parts = self._evaluation_rows("val")
        seen = np.unique(np.concatenate([parts[part] for part in self.plan.seen_by(task)]))
        rows = np.random.default_rng(derived_seed(self.seed, "holdout")).permutation(seen)[:n_samples]
        reader = batch_reader(split.dataset, self.collate_fn)
        ordered = EvaluationSampler(np.sort(rows), batch_size=self.batch_size, **self._ranks())
        for index, batch in zip(ordered, TaskLoader(BatchDataset(reader), ordered), strict=True):
            yield batch, torch.from_numpy(np.ascontiguousarray(index.rows))

    def _evaluation_rows(self, name: str) -> list[np.ndarray]:
        raise NotImplementedError

    def _sampler(self) -> TaskSampler:
        raise NotImplementedError

    def _ranks(self) -> dict[str, Any]:
        raise NotImplementedError
