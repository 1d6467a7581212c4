r"""Elastic weight consolidation: the quadratic penalty, its gradient, and how Fisher terms of tasks are merged.

Kirkpatrick et al. 2017, arXiv:1612.00796, eq. 3, holds weights near the old ones with one quadratic per task. Schwarz
et al. 2018, arXiv:1805.06370, keeps one running quadratic around the latest weights (online EWC). Both end here as one
Fisher term and one centre per weight, so that a step costs the same whatever the number of tasks.

Everything is elementwise on lists of plain tensors matched by position, so it runs on local shards as it is; only the
scalars (:func:`ewc_penalty`, the constant of :func:`merge_separate_`) must be summed over shards by the caller.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["ewc_gradient_", "ewc_penalty", "merge_online_", "merge_separate_"]

# 4 MB of float32: a larger difference is fresh memory on each call, and its page faults cost more than the arithmetic
_CPU_BLOCK = 1 << 20
# 256 MB of float32 beside the gradients, instead of one more copy of all parameters
_GPU_BUCKET = 1 << 26


def ewc_penalty(
    params: list[Tensor],
    anchors: list[Tensor],
    fisher: list[Tensor],
    strength: float,
    constant: Tensor | float = 0.0,
) -> Tensor:
    r"""Return the scalar :math:`\frac{\lambda}{2}\left(\sum_i F_i(\theta_i-\theta_i^*)^2 + c\right)`.

    Args:
        params: Weights :math:`\theta`.
        anchors: Centres :math:`\theta^*`, one tensor per weight tensor.
        fisher: Fisher terms :math:`F \ge 0`, one tensor per weight tensor.
        strength: :math:`\lambda`.
        constant: :math:`c`, the sum of what :func:`merge_separate_` returned; it moves the value, not the gradient.

    Example:
        >>> ewc_penalty([torch.ones(2)], [torch.zeros(2)], [torch.tensor([1.0, 3.0])], strength=2.0)
        tensor(4.)
    """
    terms = [(f * (p - a).square()).sum() for p, a, f in zip(params, anchors, fisher, strict=True)]
    total = torch.stack(terms).sum() if terms else torch.zeros(())
    return 0.5 * strength * (total + constant)


@torch.no_grad()
def ewc_gradient_(
    grads: list[Tensor],
    params: list[Tensor],
    anchors: list[Tensor],
    fisher: list[Tensor],
    strength: float,
) -> None:
    r"""Add the gradient of :func:`ewc_penalty`, :math:`\lambda F(\theta-\theta^*)`, to ``grads`` in place.

    Gradients and weights may be of half precision while anchors and Fisher terms are float32: the sum is formed in
    float32 and rounded once. On the CPU this is a loop of two fused calls per tensor, elsewhere foreach kernels.

    Args:
        grads: Gradients, changed in place.
        params: Weights :math:`\theta`.
        anchors: Centres :math:`\theta^*`.
        fisher: Fisher terms :math:`F`.
        strength: :math:`\lambda`.

    Example:
        >>> gradient = torch.zeros(2)
        >>> ewc_gradient_([gradient], [torch.ones(2)], [torch.zeros(2)], [torch.tensor([1.0, 3.0])], strength=2.0)
        >>> gradient
        tensor([2., 6.])
    """
    if not grads:
        return
    if grads[0].device.type == "cpu":
        _gradient_by_loop_(grads, params, anchors, fisher, strength)
    else:
        _gradient_by_foreach_(grads, params, anchors, fisher, strength)


def _gradient_by_loop_(
    grads: list[Tensor],
    params: list[Tensor],
    anchors: list[Tensor],
    fisher: list[Tensor],
    strength: float,
) -> None:
    for tensors in zip(grads, params, anchors, fisher, strict=True):
        for grad, param, anchor, weight in _blocks(tensors):
            grad.addcmul_(weight, param - anchor, value=strength)


def _blocks(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Cut large contiguous tensors alike; others come whole, as a flat view of them does not exist."""
    if tensors[0].numel() <= _CPU_BLOCK or not all(tensor.is_contiguous() for tensor in tensors):
        yield tensors
    else:
        yield from zip(*(torch.split(tensor.view(-1), _CPU_BLOCK) for tensor in tensors), strict=True)


def _gradient_by_foreach_(
    grads: list[Tensor],
    params: list[Tensor],
    anchors: list[Tensor],
    fisher: list[Tensor],
    strength: float,
) -> None:
    start = size = 0
    for stop, grad in enumerate(grads, start=1):
        size += grad.numel()
        if size >= _GPU_BUCKET or stop == len(grads):
            bucket = slice(start, stop)
            difference = torch._foreach_sub(params[bucket], anchors[bucket])
            torch._foreach_addcmul_(grads[bucket], fisher[bucket], difference, value=strength)
            start, size = stop, 0


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
