"""Reading of whole batches, at once where the dataset can, with the result of reading sample by sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, default_collate
from typing_extensions import override

from lightning_cl.datamodules.sources.arrow import is_hf, read_arrow_batch, reads_tensors
from lightning_cl.datamodules.sources.base import Source

__all__ = ["BatchReader", "batch_reader"]

Collate = Callable[[list[Any]], Any]


class BatchReader(ABC):
    """Returns the batch of given indices; travels to worker processes if its dataset does.

    Attributes:
        deterministic: Reading provably uses no randomness (tensors, arrays, Arrow without a transform of the user).
    """

    deterministic: bool = True

    def __call__(self, indices: Sequence[int] | np.ndarray) -> Any:
        """Return what ``collate_fn([dataset[i] for i in indices])`` gives."""
        return self.read(np.asarray(indices, dtype=np.int64))

    @abstractmethod
    def read(self, indices: np.ndarray) -> Any:
        """Return the batch of int64 indices."""


def batch_reader(dataset: Dataset[Any], collate_fn: Collate | None = None) -> BatchReader:
    """Return the fastest reader whose batches equal ``collate_fn([dataset[i] for i in indices])``.

    Without a ``collate_fn`` (torch's ``default_collate``), ``TensorDataset``, our sources and Hugging Face datasets in
    torch format are indexed by the batch, also below ``Subset`` and ``ConcatDataset``. Other datasets are read by
    their ``__getitems__`` where they have it, or sample by sample, and collated.

    Args:
        dataset: A map-style dataset.
        collate_fn: Joins a list of samples to a batch.

    Example:
        >>> data = TensorDataset(torch.arange(4.0), torch.arange(4))
        >>> reader = batch_reader(Subset(data, [3, 1]))
        >>> reader([1, 0]), reader.deterministic
        ([tensor([1., 3.]), tensor([1, 3])], True)
    """
    reader = _whole_reader(dataset) if collate_fn is None else None
    if reader is not None:
        return reader
    base, rows = _unwrap(dataset)
    samples = _SampleReader(base, collate_fn)
    return samples if rows is None else _MappedReader(samples, rows)


def _whole_reader(dataset: Any) -> BatchReader | None:
    """Return a reader that indexes by batch and collates by default, ``None`` where there is none."""
    base, rows = _unwrap(dataset)
    reader: BatchReader | None = None
    # a subclass may read its samples in another way
    if type(base) is TensorDataset:
        reader = _TensorReader(base.tensors)
    elif isinstance(base, Source):
        reader = _SourceReader(base)
    elif is_hf(base) and reads_tensors(base):
        reader = _ArrowReader(base)
    elif type(base) is ConcatDataset:
        parts = [_whole_reader(part) for part in base.datasets]
        known = [part for part in parts if part is not None]
        reader = _ConcatReader(known, base) if len(known) == len(parts) else None
    return reader if reader is None or rows is None else _MappedReader(reader, rows)


def _unwrap(dataset: Any) -> tuple[Any, np.ndarray | None]:
    """Return the dataset below a chain of ``Subset``, and the composed indices into it."""
    rows: np.ndarray | None = None
    while type(dataset) is Subset:
        indices = np.asarray(dataset.indices, dtype=np.int64)
        rows = indices if rows is None else indices[rows]
        dataset = dataset.dataset
    return dataset, rows


class _TensorReader(BatchReader):
    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors = tensors

    @override
    def read(self, indices: np.ndarray) -> Any:
        rows = torch.from_numpy(indices)
        # a list, as default_collate makes of tuples
        return [tensor[rows] for tensor in self.tensors]


class _SourceReader(BatchReader):
    def __init__(self, source: Source) -> None:
        self.source = source

    @override
    def read(self, indices: np.ndarray) -> Any:
        return self.source.read_batch(indices)


class _ArrowReader(BatchReader):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    @override
    def read(self, indices: np.ndarray) -> Any:
        return read_arrow_batch(self.dataset, indices)


class _MappedReader(BatchReader):
    """Reads rows of another reader."""

    def __init__(self, reader: BatchReader, rows: np.ndarray) -> None:
        self.reader = reader
        self.rows = rows
        self.deterministic = reader.deterministic

    @override
    def read(self, indices: np.ndarray) -> Any:
        return self.reader.read(self.rows[indices])


class _ConcatReader(BatchReader):
    """Reads from each dataset of a concatenation at once and puts the rows in order."""

    def __init__(self, readers: list[BatchReader], dataset: ConcatDataset[Any]) -> None:
        self.readers = readers
        self.dataset = dataset
        self.ends = np.asarray(dataset.cumulative_sizes)

    @override
    def read(self, indices: np.ndarray) -> Any:
        owner = np.searchsorted(self.ends, indices, side="right")
        places, batches = [], []
        for part in np.unique(owner):
            place = np.flatnonzero(owner == part)
            start = self.ends[part - 1] if part else 0
            places.append(place)
            batches.append(self.readers[part].read(indices[place] - start))
        if len(batches) == 1:
            return batches[0]
        order = torch.from_numpy(np.argsort(np.concatenate(places)))
        try:
            return _join(batches, order)
        except _Unlike:
            return default_collate([self.dataset[int(index)] for index in indices])


class _Unlike(Exception):
    """The batches of two datasets do not join column by column."""


def _join(batches: list[Any], order: Tensor) -> Any:
    """Concatenate batches of one structure and reorder the rows."""
    first = batches[0]
    if any(type(batch) is not type(first) for batch in batches):
        raise _Unlike
    if isinstance(first, Tensor):
        if any(batch.shape[1:] != first.shape[1:] for batch in batches):
            raise _Unlike
        # torch promotes unlike types alike in `cat` and in the `stack` of default_collate
        return torch.cat(batches)[order]
    if isinstance(first, dict):
        if any(batch.keys() != first.keys() for batch in batches):
            raise _Unlike
        return {key: _join([batch[key] for batch in batches], order) for key in first}
    if isinstance(first, list) and len({len(batch) for batch in batches}) == 1 and isinstance(first[0], Tensor):
        return [_join(list(column), order) for column in zip(*batches, strict=True)]
    raise _Unlike


class _SampleReader(BatchReader):
    """Reads a list of samples and collates it."""

    def __init__(self, dataset: Any, collate_fn: Collate | None) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn
        # collators of the user may draw at random (those that mask tokens do), and so may transforms
        self.deterministic = collate_fn is None and is_hf(dataset) and dataset.format["type"] != "custom"

    @override
    def read(self, indices: np.ndarray) -> Any:
        rows = indices.tolist()
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = [self.dataset[row] for row in rows] if fetch is None else fetch(rows)
        return (self.collate_fn or default_collate)(samples)
