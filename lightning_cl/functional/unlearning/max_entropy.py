r"""Maximum entropy: predictions on the forget set become uniform (ME of Yuan et al. 2024, arXiv:2410.08109)."""

from __future__ import annotations

from torch import Tensor

from lightning_cl.functional.masked_scores import MASKED_SCORE
from lightning_cl.functional.unlearning.token_nll import IGNORED_LABEL, shifted

__all__ = ["max_entropy_loss"]


def max_entropy_loss(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Return the divergence of predictions from the uniform distribution, a mean over supervised tokens.

    .. math:: \frac{1}{n} \sum_b \sum_{t \in S_b} \mathrm{KL}(U \,\|\, p_{bt})
        = -\frac{1}{n} \sum_b \sum_{t \in S_b} \left( \log V + \frac{1}{V} \sum_v \log p_{btv} \right)

    It is at least 0, and 0 where all tokens are equally likely. What the true token is has no part. Classes that the
    mask of a head has closed are left out of V.

    Args:
        logits: Scores, [B, T, V] or [B, C].
        labels: As in :func:`~lightning_cl.functional.unlearning.shifted`; only where they are -100 matters.

    Returns:
        A scalar, float32; 0 with a graph if nothing is supervised.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0]], requires_grad=True)
        >>> max_entropy_loss(logits, torch.tensor([0])).backward()
        >>> logits.grad  # p - 1/2
        tensor([[ 0.3808, -0.3808]])
    """
    scores, targets = shifted(logits, labels)
    divergences = divergence_from_uniform(scores[targets != IGNORED_LABEL])
    return divergences.sum() / max(len(divergences), 1)


def divergence_from_uniform(scores: Tensor) -> Tensor:
    r"""Return :math:`\mathrm{KL}(U \,\|\, p)` of rows of scores [n, V], over the classes that are open; float32 [n]."""
    scores = scores.float()
    closed = scores <= MASKED_SCORE
    sizes = (~closed).sum(1)
    log_p = scores.log_softmax(1).masked_fill(closed, 0.0)
    return -sizes.log() - log_p.sum(1) / sizes
