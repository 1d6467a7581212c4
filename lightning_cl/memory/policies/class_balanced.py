"""Class-balanced reservoir: the memory of GDumb (Prabhu et al. 2020) and CBRS (Chrysakis and Moens 2020), by keys."""

from __future__ import annotations

from typing import ClassVar

from typing_extensions import override

from lightning_cl.memory.hashing import Float64Array, Int64Array, sample_keys
from lightning_cl.memory.policies.base import Policy

__all__ = ["ClassBalanced"]


class ClassBalanced(Policy):
    """Keep equally many samples of every class, chosen uniformly within the class.

    In a full buffer a new sample drives out the smallest key of the largest class; among classes of equal size the one
    with the smallest label gives way. So classes that are cut differ by one sample at most, a class with fewer samples
    keeps them all, and the content depends on the set of samples seen, not on their order or their repetition.
    """

    name: ClassVar[str] = "class_balanced"
    needs_labels: ClassVar[bool] = True

    @override
    def groups(self, labels: Int64Array, tasks: Int64Array) -> Int64Array:
        return labels

    @override
    def keys(self, sample_ids: Int64Array, *, seed: int, clock: int, losses: Float64Array | None) -> Int64Array:
        return sample_keys(sample_ids, seed)
