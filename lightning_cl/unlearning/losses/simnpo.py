"""Simple negative preference optimisation."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_positive
from lightning_cl.functional.unlearning import simnpo_loss
from lightning_cl.unlearning.forget_loss import ForgetLoss, Outputs

__all__ = ["SimNPO"]


class SimNPO(ForgetLoss):
    r"""Make answers unlikely, each to about the same likelihood per token; no reference model.

    .. math:: -\frac{2}{\beta} \frac{1}{B} \sum_b
        \log \sigma\left(\beta \left(\frac{\ell_b}{n_b} - \delta\right)\right), \qquad
        \ell_b = \sum_{t \in S_b} -\log p(y_{b,t+1})

    a mean over rows of a function of **means** over the :math:`n_b` supervised tokens of a row.

    Args:
        beta: :math:`\beta`, above 0. A row comes to rest at a mean of some :math:`\delta + 3 / \beta` nats per token,
            so this decides how far forgetting goes.
        delta: :math:`\delta`, the margin, in nats per token; any number.

    Raises:
        ValueError: If ``beta`` is not above 0.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="simnpo",
        family="unlearning",
        paper="Fan et al. 2024, arXiv:2410.07163",
        needs="labels",
        state="nothing",
    )

    def __init__(self, beta: float = 4.5, delta: float = 0.0) -> None:
        check_positive("beta", beta)
        self.beta = beta
        self.delta = delta

    @override
    def __call__(self, forget: Outputs, reference: Outputs | None) -> Tensor:
        return simnpo_loss(*forget.predictions, beta=self.beta, delta=self.delta)
