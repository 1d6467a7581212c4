"""Maximum entropy."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_cl.core.card import MethodCard
from lightning_cl.functional.unlearning import max_entropy_loss
from lightning_cl.unlearning.forget_loss import ForgetLoss, Outputs

__all__ = ["MaximumEntropy"]


class MaximumEntropy(ForgetLoss):
    r"""Make predictions on the forget set uniform.

    .. math:: \frac{1}{n} \sum_b \sum_{t \in S_b} \mathrm{KL}(U \,\|\, p_{bt})

    a mean over the supervised tokens of a batch, at least 0. It knows no true token, so it takes no hint of one either;
    published with ``forget_weight=0.1`` beside a retain term.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="max-entropy",
        family="unlearning",
        paper="Yuan et al. 2024, arXiv:2410.08109",
        needs="which positions to forget; no labels else",
        state="nothing",
    )

    @override
    def __call__(self, forget: Outputs, reference: Outputs | None) -> Tensor:
        return max_entropy_loss(*forget.predictions)
