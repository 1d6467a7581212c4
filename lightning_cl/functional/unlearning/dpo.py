r"""Direct preference optimisation for unlearning: a refusal is preferred to the answer that is to be forgotten.

Rafailov et al. 2023, arXiv:2305.18290, eq. 7; with refusals Maini et al. 2024 (TOFU), arXiv:2401.06121.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_cl.functional.unlearning.token_nll import check_above_zero, mean_over_rows

__all__ = ["dpo_loss"]


def dpo_loss(
    preferred_nll_sum: Tensor,
    rejected_nll_sum: Tensor,
    ref_preferred_nll_sum: Tensor,
    ref_rejected_nll_sum: Tensor,
    *,
    beta: float,
    supervised: Tensor | None = None,
) -> Tensor:
    r"""Return the loss of DPO, a mean over rows, on the scale of :func:`~lightning_cl.functional.unlearning.npo_loss`.

    .. math:: -\frac{2}{\beta} \frac{1}{B} \sum_b \log \sigma\left(
        \beta (\ell^{ref}_{b,w} - \ell_{b,w}) - \beta (\ell^{ref}_{b,l} - \ell_{b,l})\right)

    with :math:`\ell` the sums of negative log-likelihoods of the preferred answer w and of the rejected one l, which is
    what is forgotten. At the reference it is :math:`2 \ln 2 / \beta`, and its gradient descends on
    :math:`\ell_w` and ascends on :math:`\ell_l` with weight 1. The paper has no factor :math:`2 / \beta`; with it a
    weight beside a retain term means the same as for NPO, and published unlearning results have it.

    Args:
        preferred_nll_sum: :math:`\ell_w`, [B], of :func:`~lightning_cl.functional.unlearning.token_nll` with
            ``"sequence_sum"``.
        rejected_nll_sum: :math:`\ell_l`, [B].
        ref_preferred_nll_sum: :math:`\ell^{ref}_w`, [B], of the reference model; no gradient goes there.
        ref_rejected_nll_sum: :math:`\ell^{ref}_l`, [B].
        beta: :math:`\beta`, above 0.
        supervised: Which rows count, bool [B]; all if ``None``. Rows where one of the answers has no supervised token
            should not.

    Returns:
        A scalar, float32; 0 with a graph if no row counts.

    Raises:
        ValueError: If ``beta`` is not above 0.

    Example:
        >>> import torch
        >>> at_start = [torch.tensor([4.0]), torch.tensor([1.0])]
        >>> dpo_loss(*at_start, *at_start, beta=0.1)
        tensor(13.8629)
        >>> dpo_loss(torch.tensor([1.0]), torch.tensor([31.0]), *at_start, beta=0.1)
        tensor(0.7244)
    """
    check_above_zero("beta", beta)
    preferred = ref_preferred_nll_sum.detach().float() - preferred_nll_sum.float()
    rejected = ref_rejected_nll_sum.detach().float() - rejected_nll_sum.float()
    return -2 / beta * mean_over_rows(logsigmoid(beta * (preferred - rejected)), supervised)
