r"""Elastic weight consolidation: how the Fisher terms of tasks are merged.

Kirkpatrick et al. 2017, arXiv:1612.00796, eq. 3, holds weights near the old ones with one quadratic per task. Schwarz
et al. 2018, arXiv:1805.06370, keeps one running quadratic around the latest weights (online EWC). Both end here as one
Fisher term and one centre per weight, so that a step costs the same whatever the number of tasks.

Everything is elementwise on lists of plain tensors matched by position, so it runs on local shards as it is; only the
constant of :func:`merge_separate_` must be summed over shards by the caller.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["merge_online_", "merge_separate_"]


@torch.no_grad()
def merge_online_(fisher: list[Tensor], new_fisher: list[Tensor], decay: float) -> None:
    r"""Update ``fisher`` in place: :math:`F \leftarrow \gamma F + F_{new}` (Schwarz et al. 2018, section 3.2).

    The penalty is then centred on the latest weights, which the caller takes as the only anchor.

    Args:
        fisher: Running Fisher terms, zeros before the first task; changed in place.
        new_fisher: Fisher terms of the task just learnt.
        decay: :math:`\gamma`, from 0 to 1; 1 forgets nothing.
    """
    for total, new in zip(fisher, new_fisher, strict=True):
        total.mul_(decay).add_(new)


@torch.no_grad()
def merge_separate_(
    fisher: list[Tensor],
    anchors: list[Tensor],
    new_fisher: list[Tensor],
    new_anchors: list[Tensor],
) -> Tensor:
    r"""Fold the quadratic of one more task into the single quadratic kept, in place (Kirkpatrick et al. 2017).

    Completing the square turns :math:`A(\theta-c)^2 + F(\theta-a)^2` into :math:`A'(\theta-c')^2 + r` with

    .. math:: A' = A + F, \qquad c' = \frac{A c + F a}{A'}, \qquad r = \frac{A F}{A'} (c - a)^2,

    so one Fisher term and one centre stand for all tasks exactly, at O(weights) per step and in memory. Where
    :math:`A' = 0` no task cares, and the centre takes the new anchor.

    Args:
        fisher: :math:`A`, the sum over earlier tasks, zeros before the first one; changed in place.
        anchors: :math:`c`, any finite value before the first task; changed in place.
        new_fisher: :math:`F` of the task just learnt.
        new_anchors: :math:`a`, the weights at its end.

    Returns:
        :math:`\sum r` over these tensors, a float64 scalar: the rise of ``constant`` of :func:`ewc_penalty`.

    Example:
        >>> fisher, anchors = [torch.tensor([1.0])], [torch.tensor([0.0])]
        >>> merge_separate_(fisher, anchors, [torch.tensor([3.0])], [torch.tensor([4.0])])
        tensor(12., dtype=torch.float64)
        >>> fisher, anchors
        ([tensor([4.])], [tensor([3.])])
    """
    rise = torch.zeros((), dtype=torch.float64, device=fisher[0].device if fisher else None)
    for total, centre, new, anchor in zip(fisher, anchors, new_fisher, new_anchors, strict=True):
        merged = total + new
        old_share = torch.where(merged > 0, total / merged, 0.0)
        rise += (old_share * new * (centre - anchor).square()).sum(dtype=torch.float64)
        # lerp is exact at both ends: untouched where the new Fisher is 0, the new anchor where the old one is
        centre.copy_(torch.lerp(anchor.to(centre.dtype), centre, old_share))
        total.copy_(merged)
    return rise
