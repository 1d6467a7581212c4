"""A sequence of requests: the matrix ``A[i, j]``, the score on forget set ``j`` after request ``i``."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["revival"]


def revival(A: Tensor) -> Tensor:
    r"""Return how much of each forget set came back while later requests were served.

    .. math:: V_j = \max_{i > j} A_{ij} - A_{jj}

    A score is one that is high where the model still knows the set (accuracy, probability, ROUGE-L; negate a loss).
    The matrix is to forgetting what the accuracy matrix is to learning: its diagonal says how far each request got,
    the entries below it whether that lasted.

    Args:
        A: ``Tensor[R, R]``, a row for each request in the order they were served, a column for each forget set; NaN
            where not measured. Above the diagonal (sets that were not requested yet) anything may stand.

    Returns:
        ``Tensor[R]`` of the dtype of ``A``: 0 or below = stayed forgotten, above 0 = came back by so much; NaN for the
        last set, after which nothing was served.

    Raises:
        ValueError: If ``A`` is no square floating-point matrix, or an entry on or below its diagonal is NaN: a set
            that was not measured again may have come back.

    Example:
        >>> revival(torch.tensor([[0.1, 0.9, 0.9], [0.4, 0.2, 0.9], [0.3, 0.1, 0.0]]))
        tensor([ 0.3000, -0.1000,     nan])
    """
    if A.ndim != 2 or A.shape[0] != A.shape[1] or A.shape[0] == 0 or not A.is_floating_point():
        raise ValueError(f"`A` must be a floating-point Tensor[R, R], got {A.dtype} of shape {tuple(A.shape)}.")
    missing = A.isnan().tril().nonzero().tolist()
    if missing:
        row, column = missing[0]
        raise ValueError(
            f"revival needs A[{row}, {column}], which is NaN: forget set {column} was not measured after request {row}."
        )
    later = A.masked_fill(torch.ones_like(A, dtype=torch.bool).triu(), -torch.inf).amax(dim=0)
    back = later - A.diagonal()
    back[-1] = torch.nan
    return back
