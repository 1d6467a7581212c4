"""Recall that is uniform over tasks, as in Song et al. 2023, arXiv:2309.14763."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from typing_extensions import override

from lightning_cl.memory.hashing import Float64Array, Int64Array
from lightning_cl.memory.recall.by_task import ByTask

__all__ = ["TaskUniform"]


class TaskUniform(ByTask):
    r"""Every earlier task is as likely as any other, however many samples of it there are.

    Of the samples that are left, one of task j, which has :math:`n_j`, is drawn with

    .. math:: P(i) \propto \frac{1}{n_{j(i)}}

    and no sample comes twice in a draw. ``"uniform"`` recall draws a task in proportion to what the policy keeps of it.
    Samples of the running task come where there are too few of earlier ones: they are in the incoming batches.
    """

    name: ClassVar[str] = "task_uniform"

    @override
    def weights(self, counts: Int64Array, task: int) -> Float64Array:
        earlier = (np.arange(len(counts)) < task) & (counts > 0)
        chances: Float64Array = np.divide(1.0, counts, where=earlier, out=np.zeros(len(counts)))
        return chances
