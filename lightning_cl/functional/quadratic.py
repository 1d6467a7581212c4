r"""The quadratic penalty that holds weights near anchors, and its gradient.

EWC, SI, MAS, RWalk and L2-SP share it and differ in the importances. Everything is elementwise on lists of plain
tensors matched by position, so it runs on local shards as it is; only the value must be summed over shards by the
caller.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_cl.functional.blocks import blocks, buckets

__all__ = ["quadratic_gradient_", "quadratic_penalty"]


def quadratic_penalty(
    params: list[Tensor],
    anchors: list[Tensor],
    importance: list[Tensor] | None,
    strength: float,
    constant: Tensor | float = 0.0,
) -> Tensor:
    r"""Return the scalar :math:`\frac{\lambda}{2}\left(\sum_i \Omega_i(\theta_i-\theta_i^*)^2 + c\right)`.

    Args:
        params: Weights :math:`\theta`.
        anchors: Centres :math:`\theta^*`, one tensor per weight tensor.
        importance: Importances :math:`\Omega`, one tensor per weight tensor; ``None`` for 1 everywhere.
        strength: :math:`\lambda`.
        constant: :math:`c`, what folding several quadratics into one leaves over; it moves the value, not the gradient.

    Example:
        >>> quadratic_penalty([torch.ones(2)], [torch.zeros(2)], [torch.tensor([1.0, 3.0])], strength=2.0)
        tensor(4.)
        >>> quadratic_penalty([torch.ones(2)], [torch.zeros(2)], None, strength=2.0)
        tensor(2.)
    """
    weights: Sequence[Tensor | float] = [1.0] * len(params) if importance is None else importance
    terms = [(f * (p - a).square()).sum() for p, a, f in zip(params, anchors, weights, strict=True)]
    total = torch.stack(terms).sum() if terms else torch.zeros(())
    return 0.5 * strength * (total + constant)


@torch.no_grad()
def quadratic_gradient_(
    grads: list[Tensor],
    params: list[Tensor],
    anchors: list[Tensor],
    importance: list[Tensor] | None,
    strength: float,
) -> None:
    r"""Add the gradient of :func:`quadratic_penalty`, :math:`\lambda\Omega(\theta-\theta^*)`, to ``grads`` in place.

    Gradients and weights may be of half precision while anchors and importances are float32: the sum is formed in
    float32 and rounded once. On the CPU this is a loop of two fused calls per tensor, elsewhere foreach kernels.

    Args:
        grads: Gradients, changed in place.
        params: Weights :math:`\theta`.
        anchors: Centres :math:`\theta^*`.
        importance: Importances :math:`\Omega`; ``None`` for 1 everywhere.
        strength: :math:`\lambda`.

    Example:
        >>> gradient = torch.zeros(2)
        >>> quadratic_gradient_([gradient], [torch.ones(2)], [torch.zeros(2)], [torch.tensor([1.0, 3.0])], strength=2.0)
        >>> gradient
        tensor([2., 6.])
    """
    if not grads:
        return
    if grads[0].device.type == "cpu":
        _gradient_by_loop_(grads, params, anchors, importance, strength)
    else:
        _gradient_by_foreach_(grads, params, anchors, importance, strength)


def _gradient_by_loop_(
    grads: list[Tensor],
    params: list[Tensor],
    anchors: list[Tensor],
    importance: list[Tensor] | None,
    strength: float,
) -> None:
    if importance is None:
        for grad, param, anchor in blocks(grads, params, anchors):
            grad.add_(param - anchor, alpha=strength)
    else:
        for grad, param, anchor, weight in blocks(grads, params, anchors, importance):
            grad.addcmul_(weight, param - anchor, value=strength)


def _gradient_by_foreach_(
    grads: list[Tensor],
    params: list[Tensor],
    anchors: list[Tensor],
    importance: list[Tensor] | None,
    strength: float,
) -> None:
    for bucket in buckets(grads):
        difference = torch._foreach_sub(params[bucket], anchors[bucket])
        if importance is None:
            torch._foreach_add_(grads[bucket], difference, alpha=strength)
        else:
            torch._foreach_addcmul_(grads[bucket], importance[bucket], difference, value=strength)
