r"""Columns and rows of a weight, sampled by inverted probabilities (CURLoRA, Fawi 2024, arXiv:2408.14572)."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cl.functional.subspaces import exact_dtype

__all__ = ["inverted_probabilities", "sample_columns_and_rows"]


def inverted_probabilities(weight: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the probabilities to draw columns and rows of a weight with, small norms first.

    .. math:: \tilde p_j = \frac{1 / p_j}{\sum_k 1 / p_k}, \qquad
        p_j = \frac{\lVert W_{:j} \rVert^2}{\lVert W \rVert_F^2} ,

    and the same for rows. What is 0 has the probability 0: it could carry nothing.

    Args:
        weight: :math:`W`, ``[out, in]``.

    Returns:
        Probabilities of the columns, ``[in]``, and of the rows, ``[out]``, in float64 where the device has it.

    Example:
        >>> columns, rows = inverted_probabilities(torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0]]))
        >>> columns, rows
        (tensor([0.8000, 0.2000, 0.0000], dtype=torch.float64), tensor([0.5000, 0.5000], dtype=torch.float64))
    """
    squares = weight.detach().to(exact_dtype(weight.device)).square()
    # not in the weight's dtype: beside a column of nearly 0 the others would get the probability 0
    return _inverted(squares.sum(0)), _inverted(squares.sum(1))


def _inverted(squared_norms: Tensor) -> Tensor:
    present = squared_norms > 0
    inverse = torch.where(present, 1 / torch.where(present, squared_norms, 1.0), 0.0)
    return inverse / inverse.sum()


def sample_columns_and_rows(weight: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    r"""Draw the factors around :math:`U` in :math:`C U R`: columns C and rows R of a weight, each at most once.

    Args:
        weight: :math:`W`, ``[out, in]``.
        rank: How many of each.
        generator: On the CPU, where they are drawn.

    Returns:
        R, ``[rank, in]``, and C, ``[out, rank]``, in the order in which they stand in the weight.

    Raises:
        ValueError: If fewer columns or rows than ``rank`` are not 0.

    Example:
        >>> weight = torch.tensor([[1.0, 9.0], [0.0, 9.0]])
        >>> sample_columns_and_rows(weight, 2, torch.Generator())
        (tensor([[1., 9.],
                [0., 9.]]), tensor([[1., 9.],
                [0., 9.]]))
    """
    chosen = []
    for kind, probabilities in zip(("columns", "rows"), inverted_probabilities(weight), strict=True):
        present = int((probabilities > 0).sum())
        if present < rank:
            raise ValueError(f"{rank} {kind} are to be drawn from a weight of {present} {kind} that are not 0.")
        drawn = torch.multinomial(probabilities.cpu(), rank, generator=generator)
        chosen.append(drawn.sort().values.to(weight.device))
    columns, rows = chosen
    return weight[rows], weight[:, columns]
