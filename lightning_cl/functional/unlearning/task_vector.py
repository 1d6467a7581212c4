r"""Forgetting by negation of a task vector (Ilharco et al. 2023, arXiv:2212.04089).

With :math:`\theta_{ft}` the weights after fine-tuning on what is to be forgotten,

.. math:: \theta' = \theta - \alpha \, (\theta_{ft} - \theta) .

Weights in factors, :math:`W = W_0 + s B A`, are negated as the product that they stand for,

.. math:: B' A' = (1 + \alpha) B A - \alpha B_{ft} A_{ft} ,

which negating each factor is not: for :math:`B = 0` it would turn :math:`\alpha = 1` into
:math:`-B_{ft} (2 A - A_{ft})`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["negate_weights_", "negated_factors"]


@torch.no_grad()
def negate_weights_(weights: Sequence[Tensor], tuned: Sequence[Tensor], alpha: float) -> None:
    r"""Set weights to :math:`\theta - \alpha (\theta_{ft} - \theta)`, in place.

    Args:
        weights: :math:`\theta`.
        tuned: :math:`\theta_{ft}`.
        alpha: How far to go against what fine-tuning did; 0 changes nothing.

    Example:
        >>> weights = [torch.tensor([1.0, 2.0])]
        >>> negate_weights_(weights, [torch.tensor([1.5, 2.0])], alpha=2.0)
        >>> weights
        [tensor([0., 2.])]
    """
    for weight, other in zip(weights, tuned, strict=True):
        # in float32, because differences of half-precision weights are small
        exact = torch.promote_types(weight.dtype, torch.float32)
        start = weight.to(exact)
        weight.copy_(start - alpha * (other.to(exact) - start))


@torch.no_grad()
def negated_factors(
    up: Tensor, down: Tensor, tuned_up: Tensor, tuned_down: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    r"""Return factors of :math:`(1 + \alpha) B A - \alpha B_{ft} A_{ft}`, of the same rank as those given.

    Exact where that product has their rank: with a factor that fine-tuning left alone, or where a factor was 0. Else
    the nearest in the Frobenius norm.

    Args:
        up: :math:`B`, [out, r].
        down: :math:`A`, [r, in].
        tuned_up: :math:`B_{ft}`.
        tuned_down: :math:`A_{ft}`.
        alpha: As in :func:`negate_weights_`.

    Example:
        >>> up, down = torch.zeros(2, 1), torch.tensor([[1.0, 0.0]])
        >>> new_up, new_down = negated_factors(up, down, torch.ones(2, 1), torch.tensor([[2.0, 1.0]]), alpha=0.5)
        >>> new_up @ new_down
        tensor([[-1.0000, -0.5000],
                [-1.0000, -0.5000]])
    """
    exact = torch.promote_types(up.dtype, torch.float32)
    start_up, start_down, end_up, end_down = (t.to(exact) for t in (up, down, tuned_up, tuned_down))
    if torch.equal(start_down, end_down):
        return (start_up - alpha * (end_up - start_up)).to(up.dtype), down.clone()
    if torch.equal(start_up, end_up):
        return up.clone(), (start_down - alpha * (end_down - start_down)).to(down.dtype)
    # the product of rank 2r, whose singular vectors lie in the spans of the two factors' columns and rows
    left, upper = torch.linalg.qr(torch.cat([(1 + alpha) * start_up, -alpha * end_up], dim=1))
    right, lower = torch.linalg.qr(torch.cat([start_down, end_down]).T)
    vectors, values, rows = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    rank = up.shape[1]
    roots = values[:rank].sqrt()
    new_up, new_down = left @ vectors[:, :rank] * roots, roots[:, None] * (rows[:rank] @ right.T)
    return new_up.to(up.dtype), new_down.to(down.dtype)
