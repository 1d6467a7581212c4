"""Class scores that the mask of a head has put out of reach."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["MASKED_SCORE", "all_masked", "mask_scores"]

MASKED_SCORE = -1e3
"""A class score of this or less is one that a mask has put there."""


def all_masked(scores: Tensor, columns: Tensor) -> bool:
    """Return whether there are scores [N, C] in these columns, int64 [K], and all of them are masked.

    Example:
        >>> import torch
        >>> scores = torch.tensor([[0.5, -1e9, -1e9]])
        >>> all_masked(scores, torch.tensor([1, 2])), all_masked(scores, torch.tensor([0, 1]))
        (True, False)
    """
    compared = scores.detach()[:, columns]
    return compared.numel() > 0 and bool((compared <= MASKED_SCORE).all())


def mask_scores(scores: Tensor, allowed: Tensor) -> Tensor:
    """Return class scores [..., C] with a very negative value where ``allowed``, bool [C], is not set.

    Far from the limits of the dtype, so that a loss over a few masked labels is large but neither NaN nor infinite.

    Example:
        >>> import torch
        >>> mask_scores(torch.zeros(1, 3), torch.tensor([True, False, True])).softmax(-1)
        tensor([[0.5000, 0.0000, 0.5000]])
    """
    return scores.masked_fill(~allowed, max(-1e9, torch.finfo(scores.dtype).min / 8))
