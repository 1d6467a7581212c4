r"""Saturation and importance: ascent weighted by how likely a token still is, and how unlikely already.

Yang et al. 2025 ("Exploring criteria of loss reweighting to enhance LLM unlearning"), arXiv:2505.11953.
"""

from __future__ import annotations

from torch import Tensor

from lightning_cl.functional.unlearning.token_nll import check_not_negative, supervised_nll

__all__ = ["satimp_loss"]


def satimp_loss(logits: Tensor, labels: Tensor, *, beta1: float, beta2: float) -> Tensor:
    r"""Return the loss of SatImp, a mean over the supervised tokens of the batch.

    .. math:: -\frac{1}{n} \sum_b \sum_{t \in S_b} p_{bt}^{\beta_1} (1 - p_{bt})^{\beta_2} \, \ell_{bt}, \qquad
        p_{bt} = p(y_{b,t+1}), \quad \ell_{bt} = -\log p_{bt}

    with no gradient through the weight. The first factor (saturation) rests tokens that are forgotten, the second one
    (importance) those that the model takes for certain, mostly words that carry no fact. At :math:`\beta_2 = 0` it is
    :func:`~lightning_cl.functional.unlearning.wga_loss`.

    Args:
        logits: Scores, [B, T, V] or [B, C].
        labels: As in :func:`~lightning_cl.functional.unlearning.shifted`.
        beta1: :math:`\beta_1`, at least 0.
        beta2: :math:`\beta_2`, at least 0.

    Returns:
        A scalar, float32; 0 with a graph if nothing is supervised.

    Raises:
        ValueError: If one of them is below 0, or the shapes do not fit.

    Example:
        >>> import torch
        >>> logits, labels = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
        >>> satimp_loss(logits, labels, beta1=5.0, beta2=1.0)
        tensor(-0.0080)
        >>> satimp_loss(logits, labels, beta1=5.0, beta2=0.0)
        tensor(-0.0673)
    """
    check_not_negative("beta1", beta1)
    check_not_negative("beta2", beta2)
    nll = supervised_nll(logits, labels)
    p = nll.detach().neg().exp()
    weight = p**beta1 * (1 - p) ** beta2
    # of an impossible token 0 * inf, whose limit is 0
    return -(weight * nll.masked_fill(weight == 0, 0.0)).sum() / max(nll.numel(), 1)
