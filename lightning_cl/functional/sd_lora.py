r"""Magnitudes and directions of low-rank updates (SD-LoRA, Wu et al. 2025, arXiv:2501.13198, eq. 4 and 7).

An update :math:`B A` has the norm :math:`\lVert B A \rVert_F` and the direction :math:`B A / \lVert B A \rVert_F`. Both
come from products of rank size, :math:`\langle B A, D C \rangle_F = \sum_{ij} (B^\top D)_{ij} (A C^\top)_{ij}`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_cl.functional.low_rank import product_norm
from lightning_cl.functional.subspaces import exact_dtype

__all__ = ["direction_and_magnitude", "fit_direction"]


def direction_and_magnitude(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return factors of :math:`B A / \lVert B A \rVert_F`, and the norm.

    Each factor is divided by the root of the norm. A product of 0 has the norm 0 and no direction: the factors are 0.

    Args:
        down: :math:`A`, ``[r, in]``.
        up: :math:`B`, ``[out, r]``.

    Example:
        >>> direction_and_magnitude(torch.tensor([[2.0]]), torch.tensor([[0.0], [8.0]]))
        (tensor([[0.5000]]), tensor([[0.],
                [2.]]), tensor(16.))
    """
    norm = product_norm(down, up).to(down.dtype)
    if norm == 0:
        return torch.zeros_like(down), torch.zeros_like(up), norm
    return down / norm.sqrt(), up / norm.sqrt(), norm


def fit_direction(down: Tensor, up: Tensor, directions: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    r"""Return the coefficients nearest to an update in the span of others, and what they leave of its norm.

    .. math:: \min_c \left\lVert B A - \sum_i c_i B_i A_i \right\rVert_F ,

    solved by the Gram matrix of the directions; of those that depend on others, the shortest solution.

    Args:
        down: :math:`A`, ``[r, in]``.
        up: :math:`B`, ``[out, r]``.
        directions: :math:`A_i` and :math:`B_i`.

    Returns:
        The coefficients, one for each direction, and the residual as a share of :math:`\lVert B A \rVert_F`; 0 for an
        update of 0.

    Example:
        >>> eye = torch.eye(3)
        >>> fit_direction(torch.tensor([[3.0, 4.0, 0.0]]), eye[:, :1], [(eye[:1], eye[:, :1]), (eye[2:], eye[:, :1])])
        (tensor([3., 0.]), tensor(0.8000))
    """
    exact = exact_dtype(down.device)
    target = (down.to(exact), up.to(exact))
    others = [(a.to(exact), b.to(exact)) for a, b in directions]
    norm = _inner(*target, *target)
    if not others or norm <= 0:
        return down.new_zeros(len(others)), (norm > 0).to(down.dtype)
    gram = torch.stack([torch.stack([_inner(*one, *other) for other in others]) for one in others])
    products = torch.stack([_inner(*target, *one) for one in others])
    coefficients = torch.linalg.pinv(gram, hermitian=True) @ products
    # at the minimum the rest is orthogonal to what fits
    left = norm - coefficients @ products
    return coefficients.to(down.dtype), (left.clamp(min=0) / norm).sqrt().to(down.dtype)


def _inner(down: Tensor, up: Tensor, other_down: Tensor, other_up: Tensor) -> Tensor:
    return ((up.T @ other_up) * (down @ other_down.T)).sum()
