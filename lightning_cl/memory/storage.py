"""Where the payload of a replay buffer lies: in memory, on disk, or nowhere but in the dataset."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_cl.memory.capacity import parse_bytes
from lightning_cl.memory.columns import (
    Allocate,
    Bytes,
    Column,
    DenseColumn,
    ListColumn,
    RaggedColumn,
    RowShape,
    piece_rows,
    read_piece,
)
from lightning_cl.memory.hashing import Int64Array
from lightning_cl.memory.scratch import ScratchFolder

__all__ = ["Columns", "Fetch", "IndexStorage", "MemoryStorage", "MmapStorage", "Storage"]

Columns = Mapping[str, Tensor | list[Any]]
Fetch = Callable[[Tensor], Columns]

_BLOCK = 4096  # rows handled at a time when a whole column is copied
_PLAIN = (str, bytes, int, float, bool, type(None))


class Storage(ABC):
    """Keeps the payload of one rank in slots ``0 .. size - 1``. A subclass with a ``name`` can be asked for by it.

    Attributes:
        name: What users write for it.
        keeps_payload: Whether :meth:`write` needs the whole payload. If not, ``columns`` may be empty.
    """

    registry: ClassVar[dict[str, type[Storage]]] = {}
    name: ClassVar[str]
    keeps_payload: ClassVar[bool] = True
    _attached = False

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Enter a subclass that has a name of its own in the registry."""
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            Storage.registry[cls.name] = cls

    @staticmethod
    def resolve(storage: str | Storage) -> Storage:
        """Return ``storage``, built with its defaults if it is given by name.

        Raises:
            ValueError: If no storage has that name, or it has settings without a default.
        """
        if isinstance(storage, Storage):
            return storage
        if storage not in Storage.registry:
            raise ValueError(f"`storage` must be a Storage or one of {sorted(Storage.registry)}, got {storage!r}.")
        kind = Storage.registry[storage]
        try:
            return kind()
        except TypeError as error:
            raise ValueError(
                f"`storage={storage!r}` has settings without a default; give `storage={kind.__name__}(...)`: {error}."
            ) from None

    def attach(self, *, capacity: int, rank: int, budget: int | None = None) -> None:
        """Serve a buffer from now on.

        Args:
            capacity: The most slots that will be used, from 1.
            rank: The rank whose payload this is.
            budget: The most bytes of payload, if they are counted.

        Raises:
            ValueError: If this storage serves another buffer already.
        """
        if self._attached:
            raise ValueError("`storage` serves another buffer already: give every buffer a storage of its own.")
        self._attached = True

    @abstractmethod
    def check(self, columns: Columns, count: int) -> None:
        """Raise a ValueError that names the column if ``columns`` are not ``count`` rows like those stored before."""

    @abstractmethod
    def write(self, slots: Int64Array, columns: Columns, picks: Int64Array) -> None:
        """Put the rows ``picks`` of ``columns`` into ``slots``, over what was there."""

    @abstractmethod
    def read(self, slots: Int64Array, sample_ids: Tensor) -> dict[str, Tensor | list[Any]]:
        """Return copies of the rows in these slots, which belong to these samples."""

    @abstractmethod
    def remove(self, freed: Int64Array, sources: Int64Array, targets: Int64Array) -> None:
        """Overwrite the freed slots, then move rows from ``sources`` to ``targets``."""

    @abstractmethod
    def pieces(self) -> dict[str, list[Any]]:
        """Return every column in slot order, as pieces that share memory with the storage."""

    @abstractmethod
    def load(self, pieces: Mapping[str, list[Any]], picks: Int64Array, total: int) -> None:
        """Replace the content by the rows ``picks`` (ascending) of the ``total`` rows that ``pieces`` make up."""


class ArrayStorage(Storage):
    """What the storages with a payload share: a set of columns on top of memory that a subclass allocates."""

    def __init__(self) -> None:
        self._capacity = 0
        self._budget: int | None = None
        self._rank = 0
        self._size = 0
        self._allocate: Allocate | None = None
        self._columns: dict[str, Column] = {}

    @abstractmethod
    def _allocator(self) -> Allocate:
        """Return what makes the arrays of the columns; asked for once, when the first row is stored."""

    @override
    def attach(self, *, capacity: int, rank: int, budget: int | None = None) -> None:
        super().attach(capacity=capacity, rank=rank, budget=budget)
        self._capacity = capacity
        self._budget = budget
        self._rank = rank

    @override
    def check(self, columns: Columns, count: int) -> None:
        if count and not columns and (self.keeps_payload or self._columns):
            raise ValueError(f"`columns` is empty, but this rank owns {count} samples of the batch.")
        for name, value in columns.items():
            if len(value) != count:
                raise ValueError(f"`columns[{name!r}]` has {len(value)} rows, but this rank owns {count} samples.")
        if count:
            if (self._columns or self._size) and columns.keys() != self._columns.keys():
                raise ValueError(f"`columns` must be {sorted(self._columns)} as before, got {sorted(columns)}.")
            for name, value in columns.items():
                self._describe(name, value)

    @override
    def write(self, slots: Int64Array, columns: Columns, picks: Int64Array) -> None:
        if len(slots):
            for name, value in columns.items():
                if isinstance(value, Tensor):
                    rows = value.detach().index_select(0, torch.from_numpy(picks).to(value.device))
                    self._store(name, self._size, slots, rows.cpu())
                else:
                    self._store(name, self._size, slots, [value[pick] for pick in picks.tolist()])
            self._size = max(self._size, int(slots.max()) + 1)

    @override
    def read(self, slots: Int64Array, sample_ids: Tensor) -> dict[str, Tensor | list[Any]]:
        return {name: column.read(slots) for name, column in self._columns.items()}

    @override
    def remove(self, freed: Int64Array, sources: Int64Array, targets: Int64Array) -> None:
        if len(freed):
            for column in self._columns.values():
                column.remove(freed, sources, targets)
            self._size -= len(freed)

    @override
    def pieces(self) -> dict[str, list[Any]]:
        return {name: column.pieces(self._size) for name, column in self._columns.items()}

    @override
    def load(self, pieces: Mapping[str, list[Any]], picks: Int64Array, total: int) -> None:
        self._columns, self._size = {}, 0
        for name, parts in pieces.items():
            start = 0
            for part in parts:
                rows = piece_rows(part)
                mine = np.arange(*np.searchsorted(picks, (start, start + rows)))
                for block in np.split(mine, range(_BLOCK, len(mine), _BLOCK)):
                    if len(block):
                        self._store(name, int(block[0]), block, read_piece(part, picks[block] - start))
                start += rows
            if start != total:
                raise ValueError(f"The state is inconsistent: column {name!r} has {start} rows for {total} samples.")
        self._size = len(picks)

    def _describe(self, name: str, value: Tensor | list[Any]) -> RowShape | None:
        """Return what all rows of the column have in common with these ones, None for plain Python values."""
        known = self._columns.get(name)
        if isinstance(value, Tensor) and isinstance(known, DenseColumn) and known.row.fits(value):
            return known.row
        if isinstance(value, Tensor):
            kinds = [(value.shape[1:], value.dtype)]
        elif isinstance(value, list) and isinstance(value[0], Tensor):
            kinds = list({(row.shape, row.dtype) for row in value if isinstance(row, Tensor)})
        else:
            kinds = []
        tensors = bool(kinds) and (isinstance(value, Tensor) or all(isinstance(row, Tensor) for row in value))
        if not (tensors or (isinstance(value, list) and all(_is_plain(row) for row in value))):
            raise ValueError(
                f"`columns[{name!r}]` must be a Tensor, a list of Tensors, or a list of str, bytes, numbers, None and "
                f"lists, tuples and dicts of these, got {type(value).__name__}."
            )
        if known is not None and isinstance(known, ListColumn) == tensors:
            raise ValueError(f"`columns[{name!r}]` must hold {'Python values' if tensors else 'tensors'} as before.")
        if not tensors:
            return None
        row = known.row if isinstance(known, DenseColumn | RaggedColumn) else RowShape(name, *kinds[0])
        for shape, dtype in kinds:
            row = row.joined(shape, dtype)
        return row

    def _store(self, name: str, size: int, slots: Int64Array, value: Tensor | list[Any]) -> None:
        row = self._describe(name, value)
        column = self._columns.get(name)
        self._allocate = self._allocate or self._allocator()
        if row is None:
            column = column or ListColumn()
        elif isinstance(value, Tensor) and row.varying is None and not isinstance(column, RaggedColumn):
            column = column or DenseColumn(row, self._capacity, self._allocate, self._budget)
        else:
            value = [part.detach().cpu() for part in value]
            if not isinstance(column, RaggedColumn):
                column = _as_ragged(RaggedColumn(row, self._allocate), column, size)
            column.row = row
        self._columns[name] = column
        column.write(slots, value)


class MemoryStorage(ArrayStorage):
    """The payload in memory, in its own dtype, growing with what the rank really holds."""

    name: ClassVar[str] = "memory"

    @override
    def _allocator(self) -> Allocate:
        return _zeros


class MmapStorage(ArrayStorage):
    """The payload on disk past a size, in memory-mapped files. Lists of Python values stay in memory.

    The files are scratch: a checkpoint does not need them. They go when the buffer goes, or when the next run with the
    same directory and rank begins to store.

    Args:
        directory: Where to put them; made if absent. Ranks may share it, buffers may not. A local disk is best.
        in_memory: Bytes of each rank that stay in memory, such as ``"1GiB"``; what comes after them goes to the files.
    """

    name: ClassVar[str] = "mmap"

    def __init__(self, directory: str | Path, in_memory: int | str = 0) -> None:
        super().__init__()
        self.directory = Path(directory)
        self.in_memory = parse_bytes("in_memory", in_memory)

    @override
    def _allocator(self) -> Allocate:
        # Only now, because a buffer that was made and never filled must not stand in another's way.
        folder = ScratchFolder(self.directory, self._rank)
        left = [self.in_memory]

        def give_back(count: int) -> None:
            left[0] += count

        def allocate(count: int) -> Bytes:
            if count > left[0]:
                return folder.allocate(count)
            left[0] -= count
            array = np.zeros(count, dtype=np.uint8)
            weakref.finalize(array, give_back, count)
            return array

        return allocate


class IndexStorage(MemoryStorage):
    """No inputs: what is drawn is fetched from the dataset by sample id. Columns that it is given all the same stay.

    Needs no memory for samples, but gives them as they are in the dataset, not as they were when they came by.
    """

    name: ClassVar[str] = "index"
    keeps_payload: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self._fetch: Fetch | None = None

    def bind(self, fetch: Fetch) -> None:
        """Set where samples come from: ``fetch(sample_ids) -> columns``, rows in the order of the int64 ids."""
        self._fetch = fetch

    @override
    def read(self, slots: Int64Array, sample_ids: Tensor) -> dict[str, Tensor | list[Any]]:
        if self._fetch is None:
            raise ValueError("`storage='index'` does not know where samples are: call `storage.bind(fetch)` first.")
        return {**self._fetch(sample_ids), **super().read(slots, sample_ids)}


def _zeros(count: int) -> Bytes:
    return np.zeros(count, dtype=np.uint8)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    return type(value) in _PLAIN or (isinstance(value, list | tuple) and all(map(_is_plain, value)))


def _as_ragged(ragged: RaggedColumn, column: Column | None, size: int) -> RaggedColumn:
    """Copy the first ``size`` rows of a column, if there is one, into an empty one."""
    if column is not None:
        for start in range(0, size, _BLOCK):
            slots = np.arange(start, min(start + _BLOCK, size))
            ragged.write(slots, column.read(slots))
    return ragged
