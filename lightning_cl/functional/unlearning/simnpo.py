"""Simple NPO: the length-normalised likelihood in the place of a reference model.

Fan et al. 2024, arXiv:2410.07163, eq. 4.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_cl.functional.unlearning.token_nll import check_above_zero, mean_over_rows, supervised_rows, token_nll

__all__ = ["simnpo_loss"]


def simnpo_loss(logits: Tensor, labels: Tensor, *, beta: float, delta: float = 0.0) -> Tensor:
    r"""Return the loss of SimNPO, a mean over the rows with something supervised.

    .. math:: -\frac{2}{\beta} \frac{1}{B} \sum_b
        \log \sigma\left(\beta \left(\frac{\ell_b}{n_b} - \delta\right)\right), \qquad
        \ell_b = \sum_{t \in S_b} -\log p(y_{b,t+1})

    with :math:`n_b` the number of supervised tokens of a row. Its gradient is that of ascent on
    :math:`\frac{1}{B} \sum_b \ell_b` with the weight
    :math:`W_b = \frac{2}{n_b} \sigma(-\beta (\ell_b / n_b - \delta))`: a row comes to rest at a mean of some
    :math:`\delta + 3 / \beta`, wherever it started, and a token of a short row weighs more.

    The authors' code counts labels before the shift: where the first label of a row is not -100, its :math:`n_b` is
    larger by one.

    Args:
        logits: Scores, [B, T, V] or [B, C].
        labels: As in :func:`~lightning_cl.functional.unlearning.shifted`.
        beta: :math:`\beta`, above 0. The larger, the harder the stop.
        delta: :math:`\delta`, the margin, in nats per token; the paper's :math:`\gamma` is :math:`\beta \delta`.

    Returns:
        A scalar, float32; 0 with a graph if nothing is supervised.

    Raises:
        ValueError: If ``beta`` is not above 0, or the shapes do not fit.

    Example:
        >>> import torch
        >>> logits, labels = torch.zeros(1, 3, 4), torch.tensor([[-100, 0, 1]])
        >>> simnpo_loss(logits, labels, beta=4.5)  # a guess among four is forgotten
        tensor(0.0009)
        >>> logits[..., 0] = logits[..., 1] = 9.0
        >>> simnpo_loss(logits, labels, beta=4.5)
        tensor(0.0192)
    """
    check_above_zero("beta", beta)
    nll_mean = token_nll(logits, labels, reduction="sequence_mean")
    return -2 / beta * mean_over_rows(logsigmoid(beta * (nll_mean - delta)), supervised_rows(labels))
