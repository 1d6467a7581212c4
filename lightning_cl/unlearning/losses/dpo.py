"""Direct preference optimisation towards other answers."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor
from typing_extensions import override

from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_positive
from lightning_cl.functional.unlearning import dpo_loss
from lightning_cl.unlearning.forget_loss import ForgetLoss, Outputs

__all__ = ["DPO"]


class DPO(ForgetLoss):
    r"""Prefer another answer, a refusal for example, to the one that is to be forgotten.

    .. math:: -\frac{2}{\beta} \frac{1}{B} \sum_b \log \sigma\left(
        \beta (\ell^{ref}_{b,w} - \ell_{b,w}) - \beta (\ell^{ref}_{b,l} - \ell_{b,l})\right), \qquad
        \ell_b = \sum_{t \in S_b} -\log p(y_{b,t+1})

    with w the preferred answer, which the batch brings as ``alternate_input_ids``, ``alternate_attention_mask`` and
    ``alternate_labels``, and l the batch's own. Of the reference it needs one number for each of the two. They may be
    computed once, so the preferred answer to a sample must be the same whenever it is read.

    Args:
        beta: :math:`\beta`, above 0.

    Raises:
        ValueError: If ``beta`` is not above 0; in a step for batches without a preferred answer.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="dpo",
        family="unlearning",
        paper="Rafailov et al. 2023, arXiv:2305.18290; Maini et al. 2024, arXiv:2401.06121",
        needs="labels; another answer to each prompt; the negative log-likelihoods of a reference model",
        state="2 numbers per forgotten row, or a second model",
    )
    reference: ClassVar[Literal["none", "sequences", "scores"]] = "sequences"

    def __init__(self, beta: float = 0.1) -> None:
        check_positive("beta", beta)
        self.beta = beta

    @override
    def __call__(self, forget: Outputs, reference: Outputs | None) -> Tensor:
        if forget.alternate is None:
            raise ValueError(
                "`DPO` prefers another answer to the forgotten one, and the forget batch holds none. Give each of its"
                " rows `alternate_input_ids`, `alternate_attention_mask` and `alternate_labels`, or use `NPO`."
            )
        assert reference is not None
        assert reference.alternate is not None
        return dpo_loss(
            forget.alternate.nll_sum,
            forget.nll_sum,
            reference.alternate.nll_sum,
            reference.nll_sum,
            beta=self.beta,
            supervised=forget.supervised & forget.alternate.supervised,
        )
