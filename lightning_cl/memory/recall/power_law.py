"""Recall by a power law of time (Gandhi et al. 2024, arXiv:2401.10393)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from typing_extensions import override

from lightning_cl.memory.hashing import Float64Array, Int64Array
from lightning_cl.memory.recall.by_task import ByTask

__all__ = ["PowerLaw"]


class PowerLaw(ByTask):
    r"""The chance of a sample falls as a power of the time since its task was seen.

    In task T, of the samples that are left, one of task j is drawn with

    .. math:: P(i) \propto (T - j(i))^{-b}

    Time is counted in tasks, and no sample comes twice in a draw. A task thus gets a share in proportion to
    :math:`n_j (T - j)^{-b}` for its :math:`n_j` samples; where the policy keeps as many of each task (``"ring"``), that
    is the paper's law of how often a task is met again. Samples of the running task come where there are too few of
    earlier ones: they are in the incoming batches.

    Gandhi et al. 2024, arXiv:2401.10393, first named "Catastrophic Interference is Mitigated in Naturalistic Power-Law
    Learning Environments".

    Args:
        exponent: b, above 0; the larger, the less old tasks come back. ``"uniform"`` recall is the limit of 0.

    Raises:
        ValueError: If ``exponent`` is not above 0.
    """

    name: ClassVar[str] = "power_law"

    def __init__(self, exponent: float = 1.0) -> None:
        if not exponent > 0:
            raise ValueError(f"`exponent` must be above 0 (`recall='uniform'` forgets time), got {exponent!r}.")
        super().__init__()
        self.exponent = exponent

    @override
    def weights(self, counts: Int64Array, task: int) -> Float64Array:
        ages = task - np.arange(len(counts), dtype=np.float64)
        # of the ages above 0
        weights: Float64Array = np.power(ages, -self.exponent, where=ages > 0, out=np.zeros_like(ages))
        return weights
