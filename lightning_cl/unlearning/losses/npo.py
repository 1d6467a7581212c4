"""Negative preference optimisation."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor
from typing_extensions import override

from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_positive
from lightning_cl.functional.unlearning import npo_loss
from lightning_cl.unlearning.forget_loss import ForgetLoss, Outputs

__all__ = ["NPO"]


class NPO(ForgetLoss):
    r"""Make answers less likely than the reference model finds them, ever more gently.

    .. math:: -\frac{2}{\beta} \frac{1}{B} \sum_b \log \sigma\left(\beta (\ell_b - \ell_b^{ref})\right), \qquad
        \ell_b = \sum_{t \in S_b} -\log p(y_{b,t+1})

    a mean over rows of a function of **sums** over tokens. Of the reference it needs one number per row.

    Args:
        beta: :math:`\beta`, above 0. The larger, the sooner a row comes to rest; towards 0 it is gradient ascent.

    Raises:
        ValueError: If ``beta`` is not above 0.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="npo",
        family="unlearning",
        paper="Zhang et al. 2024, arXiv:2404.05868",
        needs="labels; the negative log-likelihoods of a reference model",
        state="1 number per forgotten row, or a second model",
    )
    reference: ClassVar[Literal["none", "sequences", "scores"]] = "sequences"

    def __init__(self, beta: float = 0.1) -> None:
        check_positive("beta", beta)
        self.beta = beta

    @override
    def __call__(self, forget: Outputs, reference: Outputs | None) -> Tensor:
        assert reference is not None
        return npo_loss(forget.nll_sum, reference.nll_sum, beta=self.beta, supervised=forget.supervised)
