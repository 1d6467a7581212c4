"""Loss-aware reservoir: Buzzega et al. 2020, arXiv:2010.05595, section 3.5, by the keys of Efraimidis and Spirakis."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from typing_extensions import override

from lightning_cl.memory.hashing import Float64Array, Int64Array, exponentials, sample_keys
from lightning_cl.memory.policies.reservoir import Reservoir

__all__ = ["LossAware"]

_INFINITY = np.array([np.inf]).view(np.int64)


class LossAware(Reservoir):
    r"""Keep a sample of all distinct samples seen, weighted by the model's loss: what is hard is likelier to stay.

    The key of a sample with loss :math:`\ell_i` is :math:`\log(u_i) / \ell_i`, mapped to the integers in the same
    order, for a :math:`u_i` that depends on seed and id and is uniform over (0, 1). The ``capacity`` :math:`M` largest
    keys are kept. So the content is distributed as the first :math:`M` of successive draws without replacement, each of
    which takes one of the samples that are left with a chance in proportion to its loss:

    .. math:: P(i_1, \dots, i_M) = \prod_{k=1}^{M} \frac{\ell_{i_k}}{\sum_j \ell_j - \sum_{m<k} \ell_{i_m}}

    Samples whose loss is infinite come before all others; samples whose loss is 0 fill the places that all others
    leave. Within both, every sample is as likely. Equal losses leave what ``"reservoir"`` leaves.

    Of a sample that is presented again the largest loss counts. The content depends on these losses only, not on the
    order, the batches or the number of ranks.

    Differs from the paper, whose buffer lets a sample go at random by its present loss and draws the places for new
    samples uniformly: that law depends on the order of the stream. The paper renews losses when samples are replayed;
    here the losses of a sample's own presentations count, which cost no forward.

    Raises:
        ValueError: From ``ReplayBuffer.insert``, for a loss that is negative or not a number.
    """

    name: ClassVar[str] = "loss_aware"
    needs_losses: ClassVar[bool] = True
    renews: ClassVar[bool] = True

    @override
    def keys(self, sample_ids: Int64Array, *, seed: int, clock: int, losses: Float64Array | None) -> Int64Array:
        assert losses is not None
        if not (losses >= 0).all():
            worst = int((~(losses >= 0)).argmax())
            raise ValueError(
                f"`losses` must be at least 0 for `policy={self.name!r}`, got {losses[worst]} for sample"
                f" {sample_ids[worst]}. Has the training diverged? `policy='reservoir'` needs no losses."
            )
        uniform = sample_keys(sample_ids, seed)
        # larger where log(u) / loss is; positive floating-point numbers are ordered as the integers of their bits
        scores = losses / exponentials(uniform)
        keys = scores.view(np.int64)
        if not scores.all():
            keys = np.where(scores == 0, (uniform >> 1) - (1 << 62), keys)
        if np.isinf(scores).any():
            keys = np.where(np.isinf(scores), _INFINITY + (uniform >> 12) + (1 << 51), keys)
        return keys
