"""What a sample takes of several adapters that lie in one: its part of their rank, and its classes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["pooled_features", "rank_masks", "scores_of_tasks"]

# behind the largest score that stays: exp(-50) is nothing beside 1 in any dtype
_BEHIND = 50.0


def rank_masks(offsets: Sequence[int], rank: int) -> Tensor:
    r"""Return for each task which part of a rank is its own, as 0 and 1.

    The factors of all tasks lie side by side, :math:`A = [A_1; \dots; A_T]` and :math:`B = [B_1 \dots B_T]`, so that
    with the mask m of task i :math:`B \, \mathrm{diag}(m) \, A = B_i A_i`.

    Args:
        offsets: Task i has the rows from the i-th number to the next, T + 1 numbers.
        rank: R, at least the last of them.

    Returns:
        [T + 1, R]; the last row, for what is in no segment, is 0.

    Example:
        >>> rank_masks([0, 1, 3], rank=4).int()
        tensor([[1, 0, 0, 0],
                [0, 1, 1, 0],
                [0, 0, 0, 0]], dtype=torch.int32)
    """
    masks = torch.zeros(len(offsets), rank)
    for task, (start, stop) in enumerate(pairwise(offsets)):
        masks[task, start:stop] = 1
    return masks


def scores_of_tasks(scores: Sequence[Tensor], tasks: Tensor, classes: Tensor) -> Tensor:
    """Return class scores that join those of the tasks chosen for each sample, each for its own classes.

    A class of several of them gets the score of the first. A class of none gets a score 50 below the largest of the
    others and below -50: its probability is 0 in every precision, and a loss that looks at it stays finite.

    Args:
        scores: For the j-th choice, the scores [N, C] with that task's adapter; k of them.
        tasks: The chosen tasks, the best one first, int64 [N, k].
        classes: The classes of each task, bool [T, C].

    Returns:
        [N, C]. A sample whose tasks have no class keeps its first scores.

    Example:
        >>> scores = [torch.tensor([[1.0, 9.0, 0.0]]), torch.tensor([[7.0, 2.0, 8.0]])]
        >>> classes = torch.tensor([[True, False, False], [False, True, False]])
        >>> scores_of_tasks(scores, torch.tensor([[0, 1]]), classes)
        tensor([[  1.,   2., -50.]])
    """
    joined = scores[0]
    for choice in reversed(range(len(scores))):
        joined = torch.where(classes[tasks[:, choice]], scores[choice], joined)
    kept = classes[tasks].any(1)
    kept = kept | ~kept.any(1, keepdim=True)
    largest = joined.masked_fill(~kept, -torch.inf).amax(1, keepdim=True)
    return torch.where(kept, joined, largest.clamp(max=0) - _BEHIND)


def pooled_features(features: Tensor, present: Tensor | None = None) -> Tensor:
    """Return one row of features for each sample, in float32.

    Args:
        features: [B, D]; or [B, T, D], of whose positions the mean is taken; or of more dimensions, which are joined.
        present: Which positions are no padding, bool [B, T]; all if ``None``, or of another shape.

    Example:
        >>> features = torch.tensor([[[1.0, 1.0], [3.0, 5.0], [9.0, 9.0]]])
        >>> pooled_features(features, torch.tensor([[True, True, False]]))
        tensor([[2., 3.]])
    """
    features = features.float()
    if features.ndim != 3:
        return features.flatten(1)
    if present is None or present.shape != features.shape[:2]:
        return features.mean(1)
    weights = present.to(features)[..., None]
    return (features * weights).sum(1) / weights.sum(1).clamp(min=1)
