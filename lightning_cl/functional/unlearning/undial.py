r"""UNDIAL: self-distillation from logits in which the true token is held down (Dong et al. 2024, arXiv:2402.10052)."""

from __future__ import annotations

from torch import Tensor

from lightning_cl.functional.unlearning.token_nll import IGNORED_LABEL, check_not_negative, shifted

__all__ = ["undial_loss"]


def undial_loss(logits: Tensor, ref_logits: Tensor, labels: Tensor, *, beta: float) -> Tensor:
    r"""Return the cross-entropy to the reference model's adjusted predictions, a mean over supervised tokens.

    .. math:: -\frac{1}{n} \sum_b \sum_{t \in S_b} \sum_v q_{btv} \log p_{btv}, \qquad
        q_{bt} = \mathrm{softmax}\left( z^{ref}_{bt} - \beta \, e_{y_{b,t+1}} \right)

    The target is fixed, so the optimum is bounded: the loss ends at the entropy of q. Published code also distils
    positions that no label supervises, and takes the token at index -100 down there; here they have no part.

    Args:
        logits: Scores, [B, T, V] or [B, C].
        ref_logits: :math:`z^{ref}`, scores of the reference model, of the same shape; no gradient goes there.
        labels: As in :func:`~lightning_cl.functional.unlearning.shifted`.
        beta: :math:`\beta`, what is taken off the true token's logit; at least 0, and at 0 plain distillation.

    Returns:
        A scalar, float32; 0 with a graph if nothing is supervised.

    Raises:
        ValueError: If ``beta`` is below 0, or the shapes do not fit.

    Example:
        >>> import torch
        >>> logits = torch.zeros(1, 3, requires_grad=True)
        >>> undial_loss(logits, logits, torch.tensor([2]), beta=10.0).backward()
        >>> logits.grad  # up to a constant: only the true class goes down
        tensor([[-0.1667, -0.1667,  0.3333]])
    """
    check_not_negative("beta", beta)
    if ref_logits.shape != logits.shape:
        raise ValueError(
            f"`ref_logits` of shape {list(ref_logits.shape)} do not fit `logits` of shape {list(logits.shape)}."
        )
    scores, targets = shifted(logits, labels)
    supervised = targets != IGNORED_LABEL
    true = targets[supervised][:, None]
    adjusted = shifted(ref_logits, labels)[0][supervised].detach().float()
    adjusted = adjusted.scatter_add(1, true, adjusted.new_full(true.shape, -beta)).softmax(1)
    return cross_entropy_to(adjusted, scores[supervised])


def cross_entropy_to(target: Tensor, scores: Tensor) -> Tensor:
    """Return the mean over rows of the cross-entropy to distributions, [n, V], float32; of none 0 with a graph."""
    terms = target * scores.float().log_softmax(1)
    # classes that a mask has closed for both have a probability of 0 and a logarithm of minus infinity
    return -terms.masked_fill(target == 0, 0.0).sum() / max(len(terms), 1)
