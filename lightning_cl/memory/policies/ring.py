"""Ring buffer: Chaudhry et al. 2019, "On tiny episodic memories in continual learning", arXiv:1902.10486."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from typing_extensions import override

from lightning_cl.memory.hashing import Float64Array, Int64Array
from lightning_cl.memory.policies.base import Policy

__all__ = ["Ring"]


class Ring(Policy):
    """Keep the most recent distinct samples of every task, first in first out; tasks share the capacity equally.

    Differs from the paper, which gives every class a queue: here every task has one, so that labels are not needed. A
    first task may use the whole capacity; as later ones fill up, the earlier shrink evenly, their oldest samples first,
    and a task with few samples leaves the rest of its share to the others. If the shares are not equal by division,
    later tasks get the remainder.

    A sample shown again counts as recent from then on, in the task in which it came first. Within one batch the larger
    sample id counts as more recent, so that the content does not depend on how ranks are ordered in the batch.
    """

    name: ClassVar[str] = "ring"
    needs_boundaries: ClassVar[bool] = True
    renews: ClassVar[bool] = True

    @override
    def groups(self, labels: Int64Array, tasks: Int64Array) -> Int64Array:
        return tasks

    @override
    def keys(self, sample_ids: Int64Array, *, seed: int, clock: int, losses: Float64Array | None) -> Int64Array:
        return (clock << 32) + np.arange(len(sample_ids), dtype=np.int64)
