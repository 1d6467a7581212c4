"""Self-distillation from adjusted logits."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor
from typing_extensions import override

from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_positive
from lightning_cl.functional.unlearning import undial_loss
from lightning_cl.unlearning.forget_loss import ForgetLoss, Outputs

__all__ = ["UNDIAL"]


class UNDIAL(ForgetLoss):
    r"""Learn from the reference model with the true token's logit held down.

    .. math:: -\frac{1}{n} \sum_b \sum_{t \in S_b} \sum_v q_{btv} \log p_{btv}, \qquad
        q_{bt} = \mathrm{softmax}\left( z^{ref}_{bt} - \beta \, e_{y_{b,t+1}} \right)

    a mean over the supervised tokens of a batch; published code takes all positions. The target is fixed, so many
    epochs do no harm, and a retain term may be left out.

    Args:
        beta: :math:`\beta`, what is taken off the true token's logit; above 0. Where the true one leads by more than
            this, it stays the answer of the target too.

    Raises:
        ValueError: If ``beta`` is not above 0.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="undial",
        family="unlearning",
        paper="Dong et al. 2024, arXiv:2402.10052",
        needs="labels; all logits of a reference model",
        state="a second model, or none with adapters",
    )
    reference: ClassVar[Literal["none", "sequences", "scores"]] = "scores"

    def __init__(self, beta: float = 10.0) -> None:
        check_positive("beta", beta)
        self.beta = beta

    @override
    def __call__(self, forget: Outputs, reference: Outputs | None) -> Tensor:
        assert reference is not None
        logits, labels = forget.predictions
        assert reference.logits is not None
        return undial_loss(logits, reference.logits, labels, beta=self.beta)
