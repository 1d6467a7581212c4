r"""Riemannian Walk: a moving average of Fisher terms, and the loss gained per distance in KL divergence.

Chaudhry, Dokania, Ajanthan, Torr 2018, arXiv:1801.10112, section 4. What the moves of a weight did to the loss is
:func:`~lightning_cl.functional.path_integral.path_integral_`. Everything is elementwise on lists of plain tensors
matched by position, so it runs on local shards as it is; only the peaks that normalise must be taken over shards by the
caller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cl.functional.blocks import blocks

__all__ = ["add_squares_", "average_score_", "moving_fisher_", "rwalk_importance", "walk_score_"]


@torch.no_grad()
def add_squares_(squares: list[Tensor], grads: list[Tensor]) -> None:
    r"""Add the squared gradients of a step to ``squares``, in place.

    Args:
        squares: Sums; changed in place.
        grads: Gradients of the task's loss.

    Example:
        >>> squares = [torch.tensor([1.0])]
        >>> add_squares_(squares, [torch.tensor([3.0])])
        >>> squares
        [tensor([10.])]
    """
    if squares and squares[0].device.type != "cpu":
        torch._foreach_addcmul_(squares, grads, grads)
        return
    for total, grad in zip(squares, grads, strict=True):
        total.addcmul_(grad, grad)


@torch.no_grad()
def moving_fisher_(fisher: list[Tensor], squares: list[Tensor], steps: int, alpha: float) -> None:
    r"""Update the Fisher terms in place: :math:`F^t = \alpha F^t + (1 - \alpha) F^{t-1}` (eq. 6, EWC++).

    The term of now is the mean of the squared gradients since the update before.

    Args:
        fisher: :math:`F^{t-1}`; changed in place.
        squares: Squared gradients, summed over ``steps``.
        steps: Steps since the update before.
        alpha: :math:`\alpha`, from 0 to 1; 1 takes the new term alone, as the first one must be.

    Example:
        >>> fisher = [torch.tensor([2.0])]
        >>> moving_fisher_(fisher, [torch.tensor([40.0])], steps=10, alpha=0.5)
        >>> fisher
        [tensor([3.])]
    """
    for average, total in blocks(fisher, squares):
        average.mul_(1 - alpha).add_(total, alpha=alpha / steps)


@torch.no_grad()
def walk_score_(
    score: list[Tensor],
    path: list[Tensor],
    fisher: list[Tensor],
    before: list[Tensor],
    after: list[Tensor],
    damping: float,
) -> None:
    r"""Add an interval of the walk to the score, in place.

    .. math:: s \leftarrow s + \frac{\Delta L}{\frac{1}{2} F \, (\theta(t + \Delta t) - \theta(t))^2 + \epsilon}

    The loss gained over the way gone, measured in KL divergence.

    Args:
        score: :math:`s` of the task, zeros at its start; changed in place.
        path: :math:`\Delta L`, by how much the moves of each weight lowered the loss within the interval (eq. 7).
        fisher: :math:`F`.
        before: :math:`\theta(t)`, at the interval's start.
        after: :math:`\theta(t + \Delta t)`.
        damping: :math:`\epsilon`, above 0.

    Example:
        >>> score = [torch.zeros(1)]
        >>> before, after = [torch.tensor([1.0])], [torch.tensor([3.0])]
        >>> walk_score_(score, [torch.tensor([0.5])], [torch.tensor([2.0])], before, after, damping=1.0)
        >>> score
        [tensor([0.1000])]
    """
    for total, drop, term, old, new in blocks(score, path, fisher, before, after):
        total.addcdiv_(drop, (new - old).square_().mul_(term).mul_(0.5).add_(damping))


@torch.no_grad()
def average_score_(kept: list[Tensor], score: list[Tensor], first: bool) -> None:
    r"""Take a task's score into that of all tasks, in place: :math:`s \leftarrow \frac{1}{2}(s + \max(s_{task}, 0))`.

    Args:
        kept: :math:`s`; changed in place.
        score: :math:`s_{task}`; negative influence does not count.
        first: Whether it is the first task, whose score is taken as it is.

    Example:
        >>> kept = [torch.tensor([4.0, 4.0])]
        >>> average_score_(kept, [torch.tensor([2.0, -2.0])], first=False)
        >>> kept
        [tensor([3., 2.])]
    """
    for average, new in blocks(kept, score):
        positive = new.clamp(min=0)
        if first:
            average.copy_(positive)
        else:
            average.add_(positive).mul_(0.5)


def rwalk_importance(fisher: Tensor, score: Tensor, fisher_peak: float, score_peak: float) -> Tensor:
    r"""Return :math:`F / \max F + s / \max s`, each part from 0 to 1 (eq. 8, and the paragraph after it).

    Args:
        fisher: :math:`F` at a task's end.
        score: :math:`s`, not negative.
        fisher_peak: The largest Fisher term of all weights; 0 leaves that part out.
        score_peak: The largest score of all weights; 0 leaves that part out.

    Example:
        >>> rwalk_importance(torch.tensor([1.0, 4.0]), torch.tensor([3.0, 0.0]), fisher_peak=4.0, score_peak=6.0)
        tensor([0.7500, 1.0000])
    """
    parts = [part / peak for part, peak in ((fisher, fisher_peak), (score, score_peak)) if peak]
    return sum(parts, torch.zeros_like(fisher))
