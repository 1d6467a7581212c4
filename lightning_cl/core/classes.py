"""Which classes the present task has, and which the tasks before it had."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_cl.core.distributed import gather_rows
from lightning_cl.core.shards import PerRank, of_all_ranks
from lightning_cl.core.task import Task

__all__ = ["KnownClasses"]


class KnownClasses:
    """The classes of tasks, as the stream tells them, or else as the labels of the batches show them.

    Attributes:
        told: Whether the stream tells the classes of the present task, so that labels need not be looked at.
    """

    def __init__(self) -> None:
        self.told = False
        self._present: set[int] = set()
        self._old: set[int] = set()

    def start_task(self, task: Task) -> None:
        """Begin a task; its classes are those of the stream, or none yet."""
        self._present = set(task.classes)
        self.told = bool(task.classes)

    def see(self, labels: Tensor) -> None:
        """Add the labels [B] of a batch to the present task; negative ones are no class."""
        self._present.update(label for label in labels.unique().tolist() if label >= 0)

    def gather(self, device: torch.device) -> None:
        """Take what the other ranks have seen too; all ranks must call it."""
        mine = torch.tensor(sorted(self._present), dtype=torch.int64, device=device)
        self._present = set(gather_rows(mine)[0].tolist())

    def end_task(self, device: torch.device) -> None:
        """Let the present classes be old ones from now on; all ranks must call it."""
        self.gather(device)
        self._old |= self._present

    @property
    def present(self) -> list[int]:
        """The classes of the present task, sorted."""
        return sorted(self._present)

    @property
    def old(self) -> list[int]:
        """The classes of the tasks before it, sorted."""
        return sorted(self._old)

    @property
    def seen(self) -> list[int]:
        """The classes of both, sorted."""
        return sorted(self._old | self._present)

    def state_dict(self) -> dict[str, Any]:
        """Return the classes, and whether the stream told them; each rank has seen its own in a running task."""
        return {"present": PerRank(self.present), "old": self.old, "told": self.told}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` returned."""
        self._present, self._old = set().union(*of_all_ranks(state["present"])), set(state["old"])
        self.told = state["told"]
