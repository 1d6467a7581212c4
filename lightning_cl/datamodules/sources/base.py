"""What every source shares, and the storage of those that hold their samples as arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

__all__ = ["MappedArray", "Source", "TableSource", "stratified_split"]


class Source(Dataset[Any], ABC):
    """A map-style dataset whose labels are known without reading an input, and which reads whole batches.

    Attributes:
        labels: int64 ``[n]``, ``None`` without labels.
        domains: One value of any type per sample ``[n]``, ``None`` without domains.
        label_names: Name of each label, ``None`` when labels are plain numbers.
    """

    labels: np.ndarray | None = None
    domains: np.ndarray | None = None
    label_names: list[str] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples."""

    @override
    @abstractmethod
    def __getitem__(self, index: int) -> Any:
        """Return one sample."""

    @abstractmethod
    def read_batch(self, indices: np.ndarray) -> Any:
        """Return what torch's ``default_collate([self[i] for i in indices])`` gives, without using randomness."""


class MappedArray:
    """A ``.npy`` file read through a memory map; a worker process opens the file anew instead of receiving its data.

    Args:
        path: The file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.array: np.ndarray = np.load(self.path, mmap_mode="r")

    def __reduce__(self) -> tuple[type[MappedArray], tuple[Path]]:
        return type(self), (self.path,)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int | np.ndarray) -> Tensor:
        # a copy, because the map is read-only and torch tensors are not
        return torch.from_numpy(np.array(self.array[index]))


class TableSource(Source):
    """Samples as rows of columns.

    Args:
        columns: Tensors or mapped arrays of equal length, the inputs first.
        keys: Keys of the columns for samples that are dicts; without keys a sample is a tuple, or the bare input when
            there is one column.
        labels: Labels, where a column holds them.
        domains: Domains.
        label_names: Names of the labels.
    """

    def __init__(
        self,
        columns: list[Tensor | MappedArray],
        *,
        keys: list[str] | None = None,
        labels: np.ndarray | None = None,
        domains: np.ndarray | None = None,
        label_names: list[str] | None = None,
    ) -> None:
        self.columns = columns
        self.keys = keys
        self.labels = labels
        self.domains = domains
        self.label_names = label_names

    def __len__(self) -> int:
        return len(self.columns[0])

    @override
    def __getitem__(self, index: int) -> Any:
        values = [column[index] for column in self.columns]
        if self.keys is not None:
            return dict(zip(self.keys, values, strict=True))
        return values[0] if len(values) == 1 else tuple(values)

    @override
    def read_batch(self, indices: np.ndarray) -> Any:
        rows = torch.from_numpy(indices)
        values = [column[rows] if isinstance(column, Tensor) else column[indices] for column in self.columns]
        if self.keys is not None:
            return dict(zip(self.keys, values, strict=True))
        # default_collate turns a list of tuples into a list of batches
        return values[0] if len(values) == 1 else values


def stratified_split(labels: np.ndarray, split: str, seed: int, shares: tuple[float, float, float]) -> np.ndarray:
    """Return the ascending indices of one part of a random split that keeps the shares within every class.

    The ``j``-th of the ``n`` samples of a class, in random order, goes to the part in which ``(j + 1/2) / n`` falls,
    so that a class too small for all parts is in ``train`` first.

    Args:
        labels: Label of each sample.
        split: ``"train"``, ``"val"`` or ``"test"``.
        seed: Seed of the split; the same for the three parts.
        shares: Shares of the three parts, which add up to 1.

    Example:
        >>> stratified_split(np.repeat([0, 1], 5), "val", seed=0, shares=(0.6, 0.2, 0.2)).tolist()
        [0, 9]
    """
    parts = ("train", "val", "test")
    if split not in parts:
        raise ValueError(f"`split` must be one of {parts}, got {split!r}.")
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(inverse[order], kind="stable")]
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    quantile = (rank + 0.5) / np.repeat(counts, counts)
    part_of = np.searchsorted(np.cumsum(shares)[:2], quantile, side="right")
    return np.sort(order[part_of == parts.index(split)])
