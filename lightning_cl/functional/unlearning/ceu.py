r"""CE-U: cross-entropy to the model's own predictions without the true token (Yang 2025, arXiv:2503.01224)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cl.functional.unlearning.token_nll import IGNORED_LABEL, shifted
from lightning_cl.functional.unlearning.undial import cross_entropy_to

__all__ = ["ceu_loss"]


def ceu_loss(logits: Tensor, labels: Tensor, *, skip: int = 1) -> Tensor:
    r"""Return the cross-entropy to predictions in which the true token is impossible, a mean over tokens.

    .. math:: -\frac{1}{n} \sum_b \sum_{t \in S_b} \sum_v q_{btv} \log p_{btv}, \qquad
        q_{btv} = \frac{p_{btv} \, [v \ne y_{b,t+1}]}{1 - p_{bt,y}}

    with no gradient through q: the true token goes down, and the others keep their ratios. It is the limit of
    :func:`~lightning_cl.functional.unlearning.undial_loss` with the model as its own reference and a large beta. The
    loss cannot fall below the entropy of q.

    Args:
        logits: Scores, [B, T, V] or [B, C].
        labels: As in :func:`~lightning_cl.functional.unlearning.shifted`.
        skip: First supervised tokens of each sequence that have no part, because they follow from the question alone;
            a class of [B, C] always has its part.

    Returns:
        A scalar, float32; 0 with a graph if no token is left.

    Raises:
        ValueError: If ``skip`` is below 0, or the shapes do not fit.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0]], requires_grad=True)
        >>> ceu_loss(logits, torch.tensor([0])).backward()
        >>> logits.grad  # the gap between the other two stays
        tensor([[ 0.6652, -0.4863, -0.1789]])
    """
    if skip < 0:
        raise ValueError(f"`skip` must be at least 0, got {skip!r}.")
    scores, targets = shifted(logits, labels)
    taking_part = targets != IGNORED_LABEL
    if labels.ndim > 1:
        taking_part &= taking_part.cumsum(1) > skip
    scores = scores[taking_part].float()
    target = scores.detach().scatter(1, targets[taking_part][:, None], -torch.inf).softmax(1)
    return cross_entropy_to(target, scores)
