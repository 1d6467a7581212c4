"""The loss of an assistant that remembers what another model shall forget."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_cl.core.card import MethodCard
from lightning_cl.functional.unlearning import token_nll, uniform_divergence
from lightning_cl.unlearning.forget_loss import ForgetLoss, Outputs

__all__ = ["ULD"]


class ULD(ForgetLoss):
    r"""Train an assistant to know the batch to forget, and nothing of the retained one.

    .. math:: \frac{1}{n_f} \sum_b \sum_{t \in S_b} \ell_{bt} \; + \; c \, \frac{1}{|P|} \sum_{(b,t) \in P}
        \mathrm{KL}(U \,\|\, p_{bt}), \qquad \ell_{bt} = -\log p(y_{b,t+1})

    with P all attended positions of the retained batch, as in ``Unlearn(ULD(), retain="own",
    retain_weight=5.0)``; c is ``retain_weight``, in the paper's experiments 5. It is **no** forgetting: the module that
    trains is the assistant, such as :func:`~lightning_cl.adapters.build_assistant` makes, and the model forgets where
    :class:`~lightning_cl.adapters.LogitDifference` subtracts it.

    Raises:
        ValueError: In ``Unlearn`` with another retain term, which would teach the assistant what the model shall keep.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="uld",
        family="unlearning",
        paper="Ji et al. 2024, arXiv:2406.08607",
        needs="an assistant as the module, and the logit difference where the model is used",
        state="nothing",
    )
    only_retain: ClassVar[str | None] = "own"

    @override
    def __call__(self, forget: Outputs, reference: Outputs | None) -> Tensor:
        return token_nll(*forget.predictions, reduction="token_mean")

    @override
    def retain_term(self, retain: Outputs, reference: Outputs | None) -> Tensor:
        return uniform_divergence(retain.predictions[0], retain.score_mask)
