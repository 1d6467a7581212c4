r"""Negative preference optimisation: the loss of DPO with the rejected answer only.

Zhang et al. 2024, arXiv:2404.05868, eq. 3.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_cl.functional.unlearning.token_nll import check_above_zero, mean_over_rows, supervised_rows, token_nll

__all__ = ["npo_loss", "npo_loss_from_logits"]


def npo_loss(nll_sum: Tensor, ref_nll_sum: Tensor, *, beta: float, supervised: Tensor | None = None) -> Tensor:
    r"""Return the loss of NPO, a mean over rows, from the sums of negative log-likelihoods.

    .. math:: -\frac{2}{\beta} \frac{1}{B} \sum_b \log \sigma\left(\beta (\ell_b - \ell_b^{ref})\right), \qquad
        \ell_b = \sum_{t \in S_b} -\log p(y_{b,t+1})

    Its gradient is that of ascent on :math:`\frac{1}{B} \sum_b \ell_b`, with the weight
    :math:`W_b = 2 \sigma(-\beta (\ell_b - \ell_b^{ref}))` for each row: 1 at the reference, where the loss is
    :math:`2 \ln 2 / \beta`, and towards 0 as a row is forgotten. The loss is never below 0. For
    :math:`\beta \to 0` the weight is 1 everywhere. The sum grows with the length of a row, so long rows come to rest
    after a smaller change per token.

    Args:
        nll_sum: :math:`\ell`, [B], of :func:`~lightning_cl.functional.unlearning.token_nll` with ``"sequence_sum"``.
        ref_nll_sum: :math:`\ell^{ref}`, [B], of the reference model; no gradient goes there.
        beta: :math:`\beta`, above 0; the larger, the sooner a row comes to rest.
        supervised: Which rows count, bool [B]; all if ``None``. Rows without a supervised token should not.

    Returns:
        A scalar, float32; 0 with a graph if no row counts.

    Raises:
        ValueError: If ``beta`` is not above 0.

    Example:
        >>> import torch
        >>> npo_loss(torch.tensor([3.0]), torch.tensor([3.0]), beta=0.1)
        tensor(13.8629)
        >>> npo_loss(torch.tensor([60.0]), torch.tensor([3.0]), beta=0.1)
        tensor(0.0668)
    """
    check_above_zero("beta", beta)
    terms = logsigmoid(beta * (nll_sum.float() - ref_nll_sum.detach().float()))
    return -2 / beta * mean_over_rows(terms, supervised)


def npo_loss_from_logits(logits: Tensor, ref_logits: Tensor, labels: Tensor, *, beta: float) -> Tensor:
    r"""Return :func:`npo_loss` of a batch, over the rows with something supervised.

    Args:
        logits: Scores of the model, [B, T, V] or [B, C].
        ref_logits: Scores of the reference model, of the same shape.
        labels: As in :func:`~lightning_cl.functional.unlearning.shifted`.
        beta: :math:`\beta`, above 0.

    Raises:
        ValueError: If ``beta`` is not above 0, or shapes do not fit.

    Example:
        >>> import torch
        >>> logits, labels = torch.zeros(2, 3, 4), torch.tensor([[-100, 0, 1], [-100, -100, -100]])
        >>> npo_loss_from_logits(logits, logits, labels, beta=0.1)
        tensor(13.8629)
    """
    nll_sum, ref_nll_sum = (token_nll(scores, labels, reduction="sequence_sum") for scores in (logits, ref_logits))
    return npo_loss(nll_sum, ref_nll_sum, beta=beta, supervised=supervised_rows(labels))
