r"""Primal-dual unlearning: flat logits on the forget set, subject to a bound on the retain loss.

Entesari et al. 2025, "Constrained entropic unlearning: a primal-dual framework for large language models",
arXiv:2506.05314.
"""

from __future__ import annotations

from torch import Tensor

from lightning_cl.functional.masked_scores import MASKED_SCORE
from lightning_cl.functional.unlearning.token_nll import IGNORED_LABEL, shifted

__all__ = ["dual_update", "pdu_loss"]


def pdu_loss(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Return how far the logits of supervised tokens are from flat, a mean over the tokens of the batch.

    .. math:: \frac{1}{n} \sum_b \sum_{t \in S_b} \left( \max_v z_{btv} - \frac{1}{V} \sum_v z_{btv} \right)^2

    It is quadratic in the scale of the logits and unchanged by a shift of them. Classes that the mask of a
    head has closed are left out of V. Published code reads the positions of
    the labels without the shift, so the last token counts there in place of the first.

    Args:
        logits: Scores, [B, T, V] or [B, C].
        labels: As in :func:`~lightning_cl.functional.unlearning.shifted`; only where they are -100 matters.

    Returns:
        A scalar, float32; 0 with a graph if nothing is supervised.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> import torch
        >>> pdu_loss(torch.tensor([[3.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), torch.tensor([1, 2]))
        tensor(2.)
    """
    scores, targets = shifted(logits, labels)
    scores = scores[targets != IGNORED_LABEL].float()
    closed = scores <= MASKED_SCORE
    means = scores.masked_fill(closed, 0.0).sum(1) / (~closed).sum(1)
    return (scores.amax(1) - means).square().sum() / max(len(scores), 1)


def dual_update(mu: float, retain_loss: float, *, eta: float, epsilon: float) -> float:
    r"""Return the multiplier of the constraint after a step, :math:`\max(0, \mu + \eta (L_r - \epsilon))`.

    Args:
        mu: :math:`\mu`, the multiplier of the step.
        retain_loss: :math:`L_r`, the retain loss of the step, over its micro-batches and all ranks.
        eta: :math:`\eta`, the step size.
        epsilon: :math:`\epsilon`, the bound on the retain loss.

    Example:
        >>> dual_update(1.0, 0.5, eta=2.0, epsilon=0.25), dual_update(1.0, 0.5, eta=2.0, epsilon=1.25)
        (1.5, 0.0)
    """
    return max(0.0, mu + eta * (retain_loss - epsilon))
