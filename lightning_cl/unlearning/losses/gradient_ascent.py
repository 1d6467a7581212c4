"""Gradient ascent and gradient difference."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_positive
from lightning_cl.functional.unlearning import Bound, gradient_ascent
from lightning_cl.unlearning.forget_loss import ForgetLoss, Outputs

__all__ = ["GradientAscent"]


class GradientAscent(ForgetLoss):
    r"""Raise the negative log-likelihood of what is to be forgotten, up to a bound.

    .. math:: \frac{1}{n} \sum_{b} \sum_{t \in S_b} \max(0, \kappa - \ell_{bt}), \qquad \ell_{bt} = -\log p(y_{b,t+1})

    a mean over the supervised tokens of a batch. With ``Unlearn(retain="nll")`` it is gradient difference (GradDiff),
    with ``retain=None`` gradient ascent (GA).

    Args:
        bound: :math:`\kappa`, in nats per token, above 0. ``"uniform"``: the logarithm of the number of classes, what a
            guess costs. ``None`` is the form of the papers, :math:`-\frac{1}{n} \sum \ell`, which has no minimum: it
            destroys the model unless the steps are few.

    Raises:
        ValueError: If the bound is neither above 0, nor ``"uniform"``, nor ``None``.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="gradient-ascent",
        family="unlearning",
        paper="Maini et al. 2024, arXiv:2401.06121; Liu et al. 2022, arXiv:2203.12817",
        needs="labels",
        state="nothing",
    )

    def __init__(self, bound: Bound = "uniform") -> None:
        if bound is not None and bound != "uniform":
            check_positive("bound", bound)
        self.bound = bound

    @override
    def __call__(self, forget: Outputs, reference: Outputs | None) -> Tensor:
        return gradient_ascent(*forget.predictions, bound=self.bound)
