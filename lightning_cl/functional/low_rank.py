r"""Sums of low-rank matrices :math:`\sum_i B_i A_i`, kept as factors.

Factors beside one another add exactly, :math:`B_1 A_1 + B_2 A_2 = [B_1, B_2] [A_1; A_2]`, and the best approximation of
a lower rank needs no product of their size: with :math:`B = Q_B R_B` and :math:`A^\top = Q_A R_A`, the singular values
of :math:`B A` are those of the small :math:`R_B R_A^\top` (Eckart and Young 1936).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cl.functional.subspaces import exact_dtype

__all__ = ["product_norm", "truncate_factors", "wide"]


@torch.no_grad()
def truncate_factors(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    r"""Return factors of the best approximation of ``up @ down`` with at most ``rank`` columns and rows.

    .. math:: B A = U \Sigma V^\top, \qquad A' = \Sigma_r^{1/2} V_r^\top, \qquad B' = U_r \Sigma_r^{1/2}.

    Args:
        down: :math:`A`, ``[R, in]``.
        up: :math:`B`, ``[out, R]``.
        rank: :math:`r`, at least 1.

    Returns:
        :math:`A'` and :math:`B'` in the dtype of ``down``, with zeros where the product has a lower rank, and the
        error :math:`\lVert B A - B' A' \rVert_F / \lVert B A \rVert_F`, 0 for a product of zeros.

    Example:
        >>> down, up, error = truncate_factors(torch.eye(2), torch.diag(torch.tensor([4.0, 3.0])), rank=1)
        >>> (up @ down).abs(), error
        (tensor([[4., 0.],
                [0., 0.]]), 0.6)
    """
    exact = exact_dtype(down.device)
    left, right = torch.linalg.qr(up.to(exact)), torch.linalg.qr(down.to(exact).mT)
    vectors, values, covectors = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
    # the others are rounding of zeros
    real = values > values.max() * max(len(up), down.shape[1]) * torch.finfo(exact).eps
    kept = min(rank, int(real.sum()))
    root = values[:kept].sqrt()
    new_down = down.new_zeros(rank, down.shape[1])
    new_up = up.new_zeros(up.shape[0], rank)
    new_down[:kept] = (root[:, None] * (covectors[:kept] @ right.Q.mT)).to(down.dtype)
    new_up[:, :kept] = (left.Q @ vectors[:, :kept] * root).to(up.dtype)
    total = float(values.square().sum())
    lost = float(values[rank:].square().sum())
    return new_down, new_up, (lost / total) ** 0.5 if total else 0.0


@torch.no_grad()
def product_norm(down: Tensor, up: Tensor) -> Tensor:
    r"""Return :math:`\lVert B A \rVert_F = \sqrt{\operatorname{tr}(B^\top B \, A A^\top)}`, without the product.

    Args:
        down: :math:`A`, ``[r, in]``.
        up: :math:`B`, ``[out, r]``.

    Returns:
        A scalar, float64 where the device has it.

    Example:
        >>> product_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0], [0.0]]))
        tensor(10., dtype=torch.float64)
    """
    exact = exact_dtype(down.device)
    down, up = down.to(exact), up.to(exact)
    return ((up.mT @ up) * (down @ down.mT)).sum().clamp(min=0).sqrt()


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is if its dtype is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
