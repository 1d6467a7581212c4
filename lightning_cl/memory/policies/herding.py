"""Herding: Rebuffi et al. 2017, "iCaRL", arXiv:1611.07725, algorithms 4 and 5."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from lightning_cl.memory.hashing import Float64Array, Int64Array
from lightning_cl.memory.policies.base import TaskEndPolicy

__all__ = ["Herding"]


class Herding(TaskEndPolicy):
    r"""Keep the samples of every class whose mean feature follows the class mean; classes share the capacity equally.

    With L2-normalised features :math:`\varphi` and their class mean :math:`\mu`, the k-th exemplar is

    .. math:: p_k = \arg\min_x \Big\| \mu - \frac1k\Big[\varphi(x) + \sum_{j<k} \varphi(p_j)\Big] \Big\|

    over the samples not chosen yet (algorithm 4). As classes arrive, earlier ones drop the exemplars chosen last
    (algorithm 5). A class too small for its share leaves the rest to the others, and the remainder of the division goes
    to the largest labels. A class that comes in several tasks shares its part between them by rank, the later task
    first among equals; samples held already keep the rank of their first choice.
    """

    name: ClassVar[str] = "herding"
    needs_labels: ClassVar[bool] = True

    @override
    def groups(self, labels: Int64Array, tasks: Int64Array) -> Int64Array:
        return labels

    @override
    def keys(self, sample_ids: Int64Array, *, seed: int, clock: int, losses: Float64Array | None) -> Int64Array:
        return ((2**31 - 1 - np.arange(len(sample_ids), dtype=np.int64)) << 32) + clock

    @override
    def select(self, features: Tensor, count: int) -> Tensor:
        normalised = functional.normalize(features.double(), dim=1)  # double: ranks must agree to the last choice
        mean = normalised.mean(dim=0)
        squared_norms = normalised.square().sum(dim=1)  # 1, or 0 for a feature vector of zeros
        total = torch.zeros_like(mean)
        chosen = torch.zeros(count, dtype=torch.int64)
        for k in range(1, count + 1):
            # |mu - (phi + total) / k|^2 without its constant term, times k^2
            distance = squared_norms - 2 * normalised @ (k * mean - total)
            chosen[k - 1] = distance.argmin()
            squared_norms[chosen[k - 1]] = torch.inf
            total += normalised[chosen[k - 1]]
        return chosen
