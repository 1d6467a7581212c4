"""Random labels."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from lightning_cl.core.card import MethodCard
from lightning_cl.functional.masked_scores import MASKED_SCORE
from lightning_cl.functional.unlearning import random_labels, token_nll
from lightning_cl.unlearning.forget_loss import ForgetLoss, Outputs

__all__ = ["RandomLabel"]


class RandomLabel(ForgetLoss):
    r"""Learn a wrong label for every sample of the forget set.

    .. math:: \frac{1}{n} \sum_b \sum_{t \in S_b} -\log p(\tilde y_{b,t+1}), \qquad
        \tilde y \sim U(\mathcal{C} \setminus \{y\})

    a mean over the supervised tokens of a batch. The wrong label is a function of the request's seed and the sample's
    identity: drawn once, the same in all epochs and on all ranks, and nothing is stored but the seed.

    Args:
        forgotten_classes: Classes that are forgotten as a whole, so that no sample gets one of them as its wrong label.

    Raises:
        ValueError: In a step for samples without identities, or if no wrong label is left to draw.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="random-label",
        family="unlearning",
        paper="Graves et al. 2021, arXiv:2010.10981",
        needs="labels; identities of the samples",
        state="1 seed",
    )

    def __init__(self, forgotten_classes: list[int] | None = None) -> None:
        self.forgotten_classes = forgotten_classes
        self._seed = 0

    @override
    def start(self, seed: int) -> None:
        self._seed = seed

    @override
    def __call__(self, forget: Outputs, reference: Outputs | None) -> Tensor:
        logits, labels = forget.predictions
        if forget.ids is None:
            raise ValueError(
                "`RandomLabel` gives every sample a wrong label of its own, and these have no identities. Fit with a"
                " `TaskStreamDataModule` or an `UnlearningDataModule`."
            )
        wrong = random_labels(labels, forget.ids, classes=self._classes(logits), seed=self._seed)
        return token_nll(logits, wrong, reduction="token_mean")

    def _classes(self, logits: Tensor) -> Tensor:
        # classes that a mask has closed are no answers
        open_ = (logits.detach() > MASKED_SCORE).flatten(0, -2).all(0)
        open_[self.forgotten_classes or []] = False
        return open_.nonzero().flatten()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seed": self._seed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seed = state_dict["seed"]
