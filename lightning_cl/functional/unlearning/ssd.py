r"""Selective synaptic dampening (SSD; Foster et al. 2024, arXiv:2308.07707).

With :math:`I_D` the importance of a weight for all data and :math:`I_f` that for what is to be forgotten,

.. math:: \theta_i \leftarrow \begin{cases} \min\left( \lambda \frac{I_{D,i}}{I_{f,i}}, 1 \right) \theta_i
    & \text{if } I_{f,i} > \alpha I_{D,i} \\ \theta_i & \text{otherwise.} \end{cases}

An importance is the diagonal of the Fisher information, a mean over samples of squared per-sample gradients; without
labels (LFSSD, Foster et al. 2024, arXiv:2402.19308) a mean of absolute gradients of the squared norm of the output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["dampen_weights_", "subtract_importance_"]


@torch.no_grad()
def dampen_weights_(
    weights: Sequence[Tensor],
    full_importance: Sequence[Tensor],
    forget_importance: Sequence[Tensor],
    *,
    alpha: float,
    lambda_: float,
) -> int:
    r"""Dampen weights that matter much more for the forget set than for all data, in place.

    Args:
        weights: :math:`\theta`, of any dtype.
        full_importance: :math:`I_D`, of all data, the forget set included; mean over samples.
        forget_importance: :math:`I_f`, of the forget set; mean over samples.
        alpha: How many times more a weight must matter to be selected; infinite selects nothing.
        lambda_: :math:`\lambda`, how much of a selected weight stays.

    Returns:
        How many weights were selected.

    Example:
        >>> weights, forget_importance = [torch.ones(3)], [torch.tensor([1.0, 20.0, 40.0])]
        >>> dampen_weights_(weights, [torch.ones(3)], forget_importance, alpha=10.0, lambda_=1.0)
        2
        >>> weights
        [tensor([1.0000, 0.0500, 0.0250])]
    """
    count = 0
    for weight, full, forget in zip(weights, full_importance, forget_importance, strict=True):
        # strictly above, so that a weight without importance for either is left alone; of infinite alpha, 0 * inf is
        # no number and selects nothing
        selected = forget > alpha * full
        factors = (lambda_ * full / forget).clamp_(max=1.0)
        weight.copy_(torch.where(selected, weight * factors.to(weight.dtype), weight))
        count += int(selected.sum())
    return count


@torch.no_grad()
def subtract_importance_(full_sums: Sequence[Tensor], forget_sums: Sequence[Tensor]) -> None:
    r"""Take what was forgotten out of the importance of all data: sums over samples, in place, not below 0.

    Args:
        full_sums: :math:`N_D I_D`.
        forget_sums: :math:`N_f I_f`.

    Example:
        >>> sums = [torch.tensor([5.0, 1.0])]
        >>> subtract_importance_(sums, [torch.tensor([2.0, 1.5])])
        >>> sums
        [tensor([3., 0.])]
    """
    for full, forget in zip(full_sums, forget_sums, strict=True):
        full.sub_(forget).clamp_(min=0.0)
