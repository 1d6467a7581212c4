"""Weighted gradient ascent."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_positive
from lightning_cl.functional.unlearning import wga_loss
from lightning_cl.unlearning.forget_loss import ForgetLoss, Outputs

__all__ = ["WGA"]


class WGA(ForgetLoss):
    r"""Ascend on every token in proportion to its probability, so that what is forgotten comes to rest.

    .. math:: -\frac{1}{n} \sum_b \sum_{t \in S_b} p_{bt}^{\beta} \, \ell_{bt}, \qquad
        p_{bt} = p(y_{b,t+1}), \quad \ell_{bt} = -\log p_{bt}

    a mean over the supervised tokens of a batch, with no gradient through the weight.

    Args:
        beta: :math:`\beta`, at least 0; 0 is gradient ascent without a bound.

    Raises:
        ValueError: If ``beta`` is below 0.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="wga",
        family="unlearning",
        paper="Wang et al. 2025, arXiv:2502.19301",
        needs="labels",
        state="nothing",
    )

    def __init__(self, beta: float = 1.0) -> None:
        check_positive("beta", beta, zero_allowed=True)
        self.beta = beta

    @override
    def __call__(self, forget: Outputs, reference: Outputs | None) -> Tensor:
        return wga_loss(*forget.predictions, beta=self.beta)
