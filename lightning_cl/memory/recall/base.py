"""What every recall schedule is: a rule that chooses among the samples that a rank keeps."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from lightning_cl.memory.hashing import Int64Array
from lightning_cl.memory.index import Index, SlotChange

__all__ = ["LocalSamples", "Recall"]


class LocalSamples:
    """The samples that a rank keeps and may draw, at positions ``0 .. len - 1``; metadata are read where asked for.

    Args:
        index: The buffer's index.
        slots: The slots to draw from; all of the rank if ``None``, and then the position of a sample is its slot.
    """

    def __init__(self, index: Index, slots: Int64Array | None = None) -> None:
        self._index = index
        self._slots = slots

    def __len__(self) -> int:
        return self._index.local_size if self._slots is None else len(self._slots)

    def slots(self, positions: Int64Array | slice = slice(None)) -> Int64Array:
        """Return where the payload of these samples lies."""
        if self._slots is None:
            return np.arange(len(self))[positions] if isinstance(positions, slice) else positions
        return self._slots[positions]

    def slots_of(self, sample_ids: Int64Array) -> Int64Array:
        """Return where the payload of samples of this rank lies, by their identities; -1 for those it does not keep."""
        rows = self._index.find(sample_ids)
        slots: Int64Array = self._index.slots[: self._index.size][rows].astype(np.int64) if self._index.size else rows
        return np.where(rows >= 0, slots, -1)

    def sample_ids(self, positions: Int64Array | slice = slice(None)) -> Int64Array:
        """Return the identities at these positions."""
        ids: Int64Array = self._index.ids[self._rows(positions)]
        return ids

    def labels(self, positions: Int64Array | slice = slice(None)) -> Int64Array:
        """Return the labels at these positions, 0 if there are none."""
        labels: Int64Array = self._index.labels[self._rows(positions)]
        return labels

    def tasks(self, positions: Int64Array | slice = slice(None)) -> Int64Array:
        """Return the tasks in which the samples at these positions came."""
        tasks: Int64Array = self._index.tasks[self._rows(positions)].astype(np.int64)
        return tasks

    def _rows(self, positions: Int64Array | slice) -> Any:
        if self._slots is not None:
            positions = self._slots[positions]
        return self._index.local_rows[positions]


class Recall(ABC):
    """Chooses what a rank draws. A subclass with a ``name`` can be asked for by it; nothing else has to be edited.

    A schedule may keep values for the samples that its rank keeps, by their slots, and follow what becomes of them.
    Each rank has its own, as it has its own samples.

    Attributes:
        name: What users write for it; the name of the class if it was not given one.
        needs_boundaries: Whether it must know which task a sample came in, and which one is running.
        needs_hits: Whether it must hear by :meth:`observe` what the model gets right.
        bytes_per_sample: About what it keeps for each sample of its rank.
        seed: That of the buffer.
        world_size: Number of ranks that the buffer is shared by.
    """

    registry: ClassVar[dict[str, type[Recall]]] = {}
    name: ClassVar[str]
    needs_boundaries: ClassVar[bool] = False
    needs_hits: ClassVar[bool] = False
    bytes_per_sample: ClassVar[int] = 0
    seed: int = 0
    world_size: int = 1

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Enter a subclass that has a name of its own in the registry."""
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            Recall.registry[cls.name] = cls
        else:
            cls.name = cls.__name__

    @staticmethod
    def resolve(recall: str | Recall) -> Recall:
        """Return a schedule of one's own: a copy of ``recall``, or one with its defaults if it is given by name.

        Raises:
            ValueError: If no schedule has that name.
        """
        if isinstance(recall, Recall):
            # it may keep a state, and one object may be given to several memories
            return copy.deepcopy(recall)
        if recall not in Recall.registry:
            raise ValueError(f"`recall` must be a Recall or one of {sorted(Recall.registry)}, got {recall!r}.")
        return Recall.registry[recall]()

    @abstractmethod
    def choose(self, samples: LocalSamples, size: int, generator: torch.Generator, *, task: int) -> Int64Array:
        """Choose what to draw.

        Args:
            samples: What there is to choose from, at least one.
            size: How many to draw, from 1; if there are fewer, all come.
            generator: The source of all randomness, seeded for this draw.
            task: The running task.

        Returns:
            Positions in ``samples``.
        """

    def follow(self, change: SlotChange, samples: LocalSamples) -> None:  # noqa: B027
        """Hear which samples came and went.

        Args:
            change: What was done to the slots.
            samples: All samples of this rank, as they are after it.
        """

    def observe(self, samples: LocalSamples, sample_ids: Int64Array, hits: Int64Array, *, task: int) -> None:  # noqa: B027
        """Hear what the model gets right in the step that is ending, if :attr:`needs_hits`.

        Args:
            samples: All samples of this rank.
            sample_ids: Identities of this rank's incoming and drawn samples, shape ``[n]``.
            hits: 1 where the model is right, 0 where it is wrong, shape ``[n]``.
            task: The running task.
        """

    def forget(self) -> None:  # noqa: B027
        """Drop what was gathered over samples, because some of them must leave no trace; :meth:`follow` comes too."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank, of tensors and plain containers; values of samples in the order of slots."""
        return {}

    def load_state_dict(  # noqa: B027
        self, parts: Sequence[Mapping[str, Any]], *, kept: Int64Array, rank: int | None, samples: LocalSamples
    ) -> None:
        """Take the states of all ranks.

        Args:
            parts: What :meth:`state_dict` gave on each rank.
            kept: Which samples this rank has now, in the order of their slots: positions in what all parts hold, one
                part after the other.
            rank: The part that this rank saved; ``None`` if there was another number of ranks.
            samples: All samples of this rank.
        """
