"""The DataLoader of one task: reads whole batches, knows its position, keeps randomness apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, Dataset

from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.rng import isolated_rng
from lightning_cl.datamodules.batches import BatchReader
from lightning_cl.datamodules.samplers import BatchIndex, EvaluationSampler, RequestIndex, TaskSampler

__all__ = ["BatchDataset", "RequestDataset", "TaskLoader", "no_loaders"]


class BatchDataset(Dataset[Any]):
    """A dataset of whole batches.

    Reading with random augmentation is seeded for each batch, so that what a sample looks like is a pure function of
    (seed, task, epoch, step): the same in the main process and in workers, in a straight and in a resumed run.

    Args:
        reader: Reads the batch of given rows.
        transform: Applied to the inputs of the batch: the first element of a tuple, or every floating-point leaf of a
            mapping but its labels.
    """

    def __init__(self, reader: BatchReader, transform: Callable[[Tensor], Tensor] | None = None) -> None:
        self.reader = reader
        self.transform = transform

    def __getitem__(self, index: BatchIndex) -> Any:
        if self.reader.deterministic:
            batch = self.reader(index.rows)
        else:
            with isolated_rng(index.seed):
                batch = self.reader(index.rows)
        return batch if self.transform is None else _transform_inputs(batch, self.transform)


class RequestDataset(BatchDataset):
    """A dataset of pairs of batches: what a request forgets, and what is retained, if anything is."""

    def __getitem__(self, index: RequestIndex) -> dict[str, Any]:  # type: ignore[override]
        batches = {"forget": super().__getitem__(index.forget)}
        return batches if index.retain is None else {**batches, "retain": super().__getitem__(index.retain)}


class TaskLoader(DataLoader[Any]):
    """A DataLoader over :class:`BatchDataset` that is resumable at any step.

    Its iterator is lazy: Lightning asks for one before it restores the position, and twice an epoch; nothing is read
    before the first batch is wanted. Its position is part of the datamodule's state.
    """

    def __init__(
        self, dataset: BatchDataset, sampler: TaskSampler | EvaluationSampler, *, num_workers: int = 0, **options: Any
    ) -> None:
        super().__init__(
            dataset,
            sampler=sampler,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_as_read,
            # an evaluation has a loader for each task: their workers must not all live at once
            persistent_workers=num_workers > 0 and isinstance(sampler, TaskSampler),
            # a generator of its own: starting workers must not move the global one
            generator=torch.Generator(),
            **options,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Tell Lightning that the loader is resumable."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: the datamodule restores the position."""


def _as_read(batch: Any) -> Any:
    return batch


def _transform_inputs(batch: Any, transform: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Tensor):
        return transform(batch)
    if isinstance(batch, (tuple, list)):
        first = transform(batch[0])
        rest = [first, *batch[1:]]
        return type(batch)(*rest) if hasattr(batch, "_fields") else type(batch)(rest)
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"The scenario transforms the inputs of a task, which it cannot find in a batch of type"
            f" {type(batch).__name__}. Return a tensor, a tuple or a mapping from `collate_fn`."
        )
    labels = BatchAdapter().labels(batch)
    return {
        key: transform(value)
        if isinstance(value, Tensor) and value.is_floating_point() and value is not labels
        else value
        for key, value in batch.items()
    }


def no_loaders() -> CombinedLoader:
    """Return what Lightning skips without a warning; it takes an empty list for one loader without length."""
    loaders = CombinedLoader({}, "sequential")
    loaders._flattened, loaders._spec = tree_flatten({})
    return loaders
