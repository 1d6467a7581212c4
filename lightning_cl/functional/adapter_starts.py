r"""Where the factor A of a LoRA adapter starts, with B = 0: which input directions :math:`\Delta W = s B A` sees.

The rows are orthonormal; if A has more of them than there are directions, the last ones are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cl.functional.inflora import leading_directions

__all__ = ["least_context_rows", "variance_rows"]


def variance_rows(covariance: Tensor, rank: int) -> Tensor:
    r"""Return the leading eigenvectors of the coming inputs' :math:`C = \frac{1}{n} \sum x x^\top`, ``[rank, d]``.

    The start of EVA (Paischer et al. 2024, arXiv:2410.07170), which takes them from the singular value decomposition of
    the activations :math:`X = [x_1, \ldots, x_n]`. Its redistribution of ranks among layers is not in it.

    Args:
        covariance: C, ``[d, d]``, of any scale.
        rank: Rows to return.

    Example:
        >>> variance_rows(torch.diag(torch.tensor([1.0, 9.0, 4.0])), rank=2).abs()
        tensor([[0., 1., 0.],
                [0., 0., 1.]])
    """
    return leading_directions(covariance.new_zeros(len(covariance), 0), covariance, rank)


@torch.no_grad()
def least_context_rows(weight: Tensor, covariance: Tensor, rank: int, *, damping: float = 0.01) -> Tensor:
    r"""Return the input directions that the weight makes least of in a context, ``[rank, d]``.

    The knowledge-preserving start of CorDA (Yang et al. 2024, arXiv:2406.05223) decomposes
    :math:`W C = U S V^\top`, so that :math:`W = U S \, V^\top C^{-1}`, and trains the r smallest components,
    :math:`B = U_r \sqrt{S_r}` and :math:`A = \sqrt{S_r} \, V_r^\top C^{-1}`. Here are orthonormal rows with the span of
    that A. :math:`C` is made invertible by adding ``damping`` times the mean of its diagonal to the diagonal.

    Args:
        weight: W, ``[out, d]``.
        covariance: C of the context, the inputs whose outputs are to be kept, ``[d, d]``, of any scale but zero.
        rank: Rows to return.
        damping: Above 0.

    Example:
        >>> covariance = torch.diag(torch.tensor([9.0, 0.1, 4.0]))
        >>> least_context_rows(torch.eye(3), covariance, rank=1).abs()
        tensor([[0., 1., 0.]])
    """
    damped = covariance + damping * covariance.diagonal().mean() * torch.eye(len(covariance)).to(covariance)
    right = torch.linalg.svd(weight.to(damped) @ damped, full_matrices=False).Vh
    columns = torch.linalg.solve(damped, right[-rank:].mT)
    rows = torch.linalg.qr(columns).Q.mT
    return torch.nn.functional.pad(rows, (0, 0, 0, rank - len(rows)))
