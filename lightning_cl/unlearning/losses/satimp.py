"""Saturation and importance."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_positive
from lightning_cl.functional.unlearning import satimp_loss
from lightning_cl.unlearning.forget_loss import ForgetLoss, Outputs

__all__ = ["SatImp"]


class SatImp(ForgetLoss):
    r"""Ascend on tokens that are neither forgotten yet nor certain anyway.

    .. math:: -\frac{1}{n} \sum_b \sum_{t \in S_b} p_{bt}^{\beta_1} (1 - p_{bt})^{\beta_2} \, \ell_{bt}, \qquad
        p_{bt} = p(y_{b,t+1}), \quad \ell_{bt} = -\log p_{bt}

    a mean over the supervised tokens of a batch, with no gradient through the weight.

    Args:
        beta1: :math:`\beta_1`, at least 0: how soon a token that is forgotten comes to rest (saturation).
        beta2: :math:`\beta_2`, at least 0: how much certain tokens are spared (importance); 0 is
            :class:`~lightning_cl.unlearning.WGA`.

    Raises:
        ValueError: If one of them is below 0.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="satimp",
        family="unlearning",
        paper="Yang et al. 2025, arXiv:2505.11953",
        needs="labels",
        state="nothing",
    )

    def __init__(self, beta1: float = 5.0, beta2: float = 1.0) -> None:
        check_positive("beta1", beta1, zero_allowed=True)
        check_positive("beta2", beta2, zero_allowed=True)
        self.beta1 = beta1
        self.beta2 = beta2

    @override
    def __call__(self, forget: Outputs, reference: Outputs | None) -> Tensor:
        return satimp_loss(*forget.predictions, beta1=self.beta1, beta2=self.beta2)
