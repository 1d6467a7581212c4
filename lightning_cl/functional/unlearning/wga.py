r"""Weighted gradient ascent: every token ascends in proportion to a power of its own probability.

Wang et al. 2025 ("Rethinking LLM unlearning objectives: a gradient perspective and go beyond"), arXiv:2502.19301.
"""

from __future__ import annotations

from torch import Tensor

from lightning_cl.functional.unlearning.token_nll import check_not_negative, supervised_nll

__all__ = ["wga_loss"]


def wga_loss(logits: Tensor, labels: Tensor, *, beta: float) -> Tensor:
    r"""Return the loss of WGA, a mean over the supervised tokens of the batch.

    .. math:: -\frac{1}{n} \sum_b \sum_{t \in S_b} p_{bt}^{\beta} \, \ell_{bt}, \qquad
        p_{bt} = p(y_{b,t+1}), \quad \ell_{bt} = -\log p_{bt}

    with no gradient through the weight. A token's pull fades with its probability, so the model is not torn on; at
    :math:`\beta = 0` it is gradient ascent.

    Args:
        logits: Scores, [B, T, V] or [B, C].
        labels: As in :func:`~lightning_cl.functional.unlearning.shifted`.
        beta: :math:`\beta`, at least 0.

    Returns:
        A scalar, float32; 0 with a graph if nothing is supervised.

    Raises:
        ValueError: If ``beta`` is below 0, or the shapes do not fit.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 5.0]], requires_grad=True)
        >>> wga_loss(logits, torch.tensor([0, 0]), beta=1.0).backward()
        >>> logits.grad  # the sample that is unlikely already hardly moves
        tensor([[ 0.0525, -0.0525],
                [ 0.0033, -0.0033]])
    """
    check_not_negative("beta", beta)
    nll = supervised_nll(logits, labels)
    weight = nll.detach().neg().exp() ** beta
    # of an impossible token 0 * inf, whose limit is 0
    return -(weight * nll.masked_fill(weight == 0, 0.0)).sum() / max(nll.numel(), 1)
