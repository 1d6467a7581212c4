"""Reservoir sampling by keys: Vitter 1985; the mergeable form of Efraimidis and Spirakis 2006 with equal weights."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from typing_extensions import override

from lightning_cl.memory.hashing import Float64Array, Int64Array, sample_keys
from lightning_cl.memory.policies.base import Policy

__all__ = ["Reservoir"]


class Reservoir(Policy):
    r"""Keep a uniform sample of all distinct samples seen.

    Each sample has the key :math:`u(\text{seed}, \text{id})`, uniform over the 64-bit integers, and the ``capacity``
    largest keys are kept. Every one of the :math:`n` distinct samples seen is therefore in the buffer with probability
    :math:`\min(1, M/n)`. A sample shown again in a later epoch changes nothing, there is no counter that a resume could
    lose, and what several ranks keep together does not depend on how many they are.
    """

    name: ClassVar[str] = "reservoir"

    @override
    def groups(self, labels: Int64Array, tasks: Int64Array) -> Int64Array:
        return np.zeros(len(tasks), dtype=np.int64)

    @override
    def keys(self, sample_ids: Int64Array, *, seed: int, clock: int, losses: Float64Array | None) -> Int64Array:
        return sample_keys(sample_ids, seed)

    @override
    def shares(self, counts: Int64Array, capacity: int) -> Int64Array:
        return np.minimum(counts, capacity)  # there is one group
