r"""Interference-free low-rank adaptation (Liang & Li 2024, arXiv:2404.00228): which input directions a task may use."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cl.functional.subspaces import complement_basis, exact_dtype

__all__ = ["leading_directions", "memory_threshold"]


@torch.no_grad()
def leading_directions(basis: Tensor, covariance: Tensor, rank: int) -> Tensor:
    r"""Return the directions outside a subspace that hold most of the inputs, as orthonormal rows ``[rank, d]``.

    They are the leading left singular vectors of :math:`\hat H = H - M M^\top H`, or the leading eigenvectors of
    :math:`(I - M M^\top) \, C \, (I - M M^\top)` with :math:`C \propto H H^\top`. None of them has a part in M, even
    where the inputs hold nothing outside of it. If fewer than ``rank`` dimensions are left, the last rows are zero.

    Args:
        basis: Orthonormal columns M, ``[d, k]``.
        covariance: C, ``[d, d]``, of any scale.
        rank: Rows to return.

    Returns:
        Rows in the dtype of ``covariance``, decomposed in float64 where the device has it.

    Example:
        >>> covariance = torch.diag(torch.tensor([9.0, 4.0, 1.0]))
        >>> leading_directions(torch.zeros(3, 0), covariance, rank=1).abs()
        tensor([[1., 0., 0.]])
        >>> leading_directions(torch.eye(3)[:, :1], covariance, rank=1).abs()  # the first direction is taken
        tensor([[0., 1., 0.]])
    """
    exact = exact_dtype(covariance.device)
    free = complement_basis(basis.to(covariance.device, exact))
    vectors = torch.linalg.eigh(free.mT @ covariance.to(exact) @ free).eigenvectors.flip(1)
    rows = (free @ vectors[:, :rank]).mT.to(covariance.dtype)
    return torch.nn.functional.pad(rows, (0, 0, 0, rank - len(rows)))


def memory_threshold(first: float, final: float, task: int, n_tasks: int) -> float:
    r"""Return the share of a task's input energy that the memory is to hold after it.

    .. math:: \epsilon_t = \epsilon_0 + (\epsilon_T - \epsilon_0) \, t / T

    Args:
        first: :math:`\epsilon_0`, of the first task.
        final: :math:`\epsilon_T`, that tasks come near to.
        task: t, from 0; beyond T the threshold stays at its final value.
        n_tasks: T.

    Example:
        >>> [round(memory_threshold(0.9, 1.0, task, 4), 3) for task in range(4)]
        [0.9, 0.925, 0.95, 0.975]
    """
    return first + (final - first) * min(task / n_tasks, 1.0)
