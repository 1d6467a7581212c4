"""Reading the data of the task that is ending: for Fisher information, exemplars, statistics."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.capture import move_batch
from lightning_cl.core.distributed import gather_rows, world_size
from lightning_cl.core.requests import RequestStream
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.task import Task

__all__ = ["IdentifiedData", "retained_samples", "task_batches"]


@runtime_checkable
class IdentifiedData(Protocol):
    """What a task stream offers on top of its events: sample identities, and the task's data in order."""

    def batch_sample_ids(self, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Return identities and ranks of the samples of all ranks in a step, both int64 [n]."""

    def labels_of(self, sample_ids: Tensor) -> Tensor | None:
        """Return labels of identities, int64 [n], ``None`` if there are none."""

    def fetch(self, sample_ids: Tensor, seed: int = 0) -> Any:
        """Read the samples of identities anew, as one batch; random transforms give the same for the same seed."""

    def task_loader(self, n_samples: int | None, limit_batches: float) -> Any:
        """Return an iterable of ``(batch, identities)`` over the current task, each sample once over all ranks."""


def retained_samples(trainer: Trainer, task: Task) -> Tensor | None:
    """Return the identities of what a request leaves, int64 [n]; ``None`` for data that cannot be read by identity."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    return datamodule.retained_ids(task) if isinstance(datamodule, RequestStream) else None


def task_batches(
    trainer: Trainer,
    pl_module: LightningModule,
    adapter: BatchAdapter,
    n_samples: int | None = None,
    sample_ids: Tensor | None = None,
) -> Iterator[tuple[Any, Tensor]]:
    """Yield the batches of the current task on the device, with the identities of their samples.

    On a task stream every sample comes once over all ranks, in a fixed order. Otherwise the training loader is read
    once more, at most as many batches as an epoch has; its samples have identities by order of reading.

    Args:
        trainer: The running Trainer.
        pl_module: The user's module.
        adapter: Reads batch sizes.
        n_samples: Samples to read over all ranks; all if ``None``. A stream draws them at random, seeded.
        sample_ids: Identities of samples of a stream to read in the place of the task's, int64 [n].
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if sample_ids is not None:
        if n_samples is not None and n_samples < len(sample_ids):
            generator = torch.Generator().manual_seed(derived_seed("chosen samples", n_samples))
            sample_ids = sample_ids[torch.randperm(len(sample_ids), generator=generator)[:n_samples].sort().values]
        for batch, found in datamodule.read_samples(sample_ids):
            yield move_batch(trainer, pl_module, batch), found
        return
    limit = float("inf") if trainer.limit_train_batches == 1.0 else trainer.num_training_batches
    if isinstance(datamodule, IdentifiedData):
        for batch, sample_ids in datamodule.task_loader(n_samples, limit):
            yield move_batch(trainer, pl_module, batch), sample_ids
        return
    combined = trainer.fit_loop._combined_loader
    assert combined is not None
    # a single loader is read by an iterator of its own, so that the epoch's iterator stays as it is
    loaders = combined.flattened
    source = iter(loaders[0]) if len(loaders) == 1 else (batch for batch, _, _ in iter(combined))
    read, wanted = 0, float("inf") if n_samples is None else -(-n_samples // world_size())
    # a loader without length may have no end: as many batches as this epoch had
    unknown = trainer.num_training_batches == float("inf")
    batches = trainer.fit_loop.batch_idx + 1 if unknown else int(trainer.num_training_batches)
    for batch in itertools.islice(source, batches):
        if read >= wanted:
            return
        size = adapter.size(batch)
        if read + size > wanted:
            batch = adapter.select(batch, slice(0, int(wanted) - read))
            size = int(wanted) - read
        yield move_batch(trainer, pl_module, batch), torch.arange(read, read + size)
        read += size


def global_rows(
    trainer: Trainer, adapter: BatchAdapter, batch: Any, batch_idx: int, first_id: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return identities, ranks and labels of the samples that all ranks hold in this step.

    Args:
        trainer: The running Trainer.
        adapter: Reads sizes and labels.
        batch: This rank's batch.
        batch_idx: Its index in the epoch.
        first_id: Without a task stream, the identity of the first sample of the step.

    Raises:
        ValueError: If the batch holds another number of samples than was read for it.
    """
    size = adapter.size(batch)
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    # not the protocol, whose check looks at all its methods: too long for every step
    if hasattr(datamodule, "batch_sample_ids"):
        sample_ids, owners = datamodule.batch_sample_ids(batch_idx)
        mine = int((owners == trainer.global_rank).sum()) if world_size() > 1 else len(owners)
        if mine != size:
            raise ValueError(
                f"The batch holds {size} samples, but {mine} were read for it: samples lost their identities. A"
                " `collate_fn` must neither drop nor add samples."
            )
        known = datamodule.labels_of(sample_ids)
        return sample_ids, owners, known if known is not None else adapter.class_labels(batch)
    labels = adapter.class_labels(batch)
    if labels is not None:
        joined, owners = gather_rows(labels.detach())
        return first_id + torch.arange(len(joined)), owners, joined.cpu()
    sizes, owners = gather_rows(torch.zeros(size, device=trainer.strategy.root_device))
    return first_id + torch.arange(len(sizes)), owners, None
