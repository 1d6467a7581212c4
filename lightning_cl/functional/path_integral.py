r"""Synaptic Intelligence: what each weight's moves did to the loss, and the importance made of it.

Zenke, Poole, Ganguli 2017, arXiv:1703.04200, eqs. 3 to 5. Everything is elementwise on lists of plain tensors matched
by position, so it runs on local shards as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cl.functional.blocks import blocks

__all__ = ["path_importance_", "path_integral_"]


@torch.no_grad()
def path_integral_(path: list[Tensor], grads: list[Tensor], before: list[Tensor], after: list[Tensor]) -> None:
    r"""Add one step to the path integral, in place: :math:`\omega \leftarrow \omega - g \, (\theta_{t+1} - \theta_t)`.

    Eq. 3 with its sign turned, as in the paper: :math:`\sum_i \omega_i` is, to first order, by how much the loss fell.
    No temporary result is made: on the CPU its memory would cost as much as the arithmetic.

    Args:
        path: :math:`\omega`, zeros at the start of a task; changed in place.
        grads: :math:`g`, the gradients of the task's loss at :math:`\theta_t`.
        before: :math:`\theta_t`; overwritten by :math:`\theta_t - \theta_{t+1}`.
        after: :math:`\theta_{t+1}`.

    Example:
        A step of 0.1 down the slope of :math:`\theta^2` at 1 lowers it by 0.36; to first order by 0.4.

        >>> path = [torch.zeros(1)]
        >>> path_integral_(path, [torch.tensor([2.0])], [torch.tensor([1.0])], [torch.tensor([0.8])])
        >>> path
        [tensor([0.4000])]
    """
    if path and path[0].device.type != "cpu":
        torch._foreach_sub_(before, after)
        torch._foreach_addcmul_(path, grads, before)
        return
    for drop, grad, old, new in zip(path, grads, before, after, strict=True):
        drop.addcmul_(grad, old.sub_(new))


@torch.no_grad()
def path_importance_(
    importance: list[Tensor],
    path: list[Tensor],
    start: list[Tensor],
    end: list[Tensor],
    damping: float,
    clamp: bool = False,
) -> None:
    r"""Add a task to the importance, in place: :math:`\Omega \leftarrow \Omega + \omega / (\Delta^2 + \xi)` (eq. 5).

    Args:
        importance: :math:`\Omega`, zeros before the first task; changed in place.
        path: :math:`\omega` of the task.
        start: Weights at the task's start.
        end: Weights at its end; :math:`\Delta` is their difference.
        damping: :math:`\xi`, above 0.
        clamp: Raise what is then below 0 to 0.

    Example:
        >>> importance = [torch.tensor([0.0, 0.0])]
        >>> path, start, end = [torch.tensor([0.6, -0.1])], [torch.tensor([1.0, 1.0])], [torch.tensor([0.5, 1.0])]
        >>> path_importance_(importance, path, start, end, damping=0.05)
        >>> importance
        [tensor([ 2., -2.])]
    """
    for total, drop, old, new in blocks(importance, path, start, end):
        total.addcdiv_(drop, (new - old).square_().add_(damping))
        if clamp:
            total.clamp_(min=0)
