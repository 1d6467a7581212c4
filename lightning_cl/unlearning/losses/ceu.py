"""Cross-entropy unlearning."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_cl.core.card import MethodCard
from lightning_cl.functional.unlearning import ceu_loss
from lightning_cl.unlearning.forget_loss import ForgetLoss, Outputs

__all__ = ["CEU"]


class CEU(ForgetLoss):
    r"""Learn from the model's own predictions with the true token made impossible.

    .. math:: -\frac{1}{n} \sum_b \sum_{t \in S_b} \sum_v q_{btv} \log p_{btv}, \qquad
        q_{btv} = \frac{p_{btv} \, [v \ne y_{b,t+1}]}{1 - p_{bt,y}}

    a mean over tokens, with no gradient through q. It needs no reference model, and was published without a retain
    term.

    Args:
        skip: First supervised tokens of each sequence that have no part; a class label always has its part.

    Raises:
        ValueError: If ``skip`` is below 0.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="ceu",
        family="unlearning",
        paper="Yang 2025, arXiv:2503.01224",
        needs="labels",
        state="nothing",
    )

    def __init__(self, skip: int = 1) -> None:
        if isinstance(skip, bool) or not isinstance(skip, int) or skip < 0:
            raise ValueError(f"`skip` must be an integer of at least 0, got {skip!r}.")
        self.skip = skip

    @override
    def __call__(self, forget: Outputs, reference: Outputs | None) -> Tensor:
        return ceu_loss(*forget.predictions, skip=self.skip)
