r"""Component-wise gradient norm clipping (Yang & Ma 2022, arXiv:2210.10325).

Every component c of a network has a norm of its own and is clipped by it:

.. math:: g_c \leftarrow g_c \cdot \min\left(1, \frac{\tau}{\lVert g_c \rVert_2}\right).

Gradients are matched by position with the numbers of their components and may be local shards: squares are summed here,
and the caller adds them up over ranks before the gradients are scaled.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["clip_components_", "squared_norms"]


@torch.no_grad()
def squared_norms(grads: list[Tensor], components: Tensor, num_components: int) -> Tensor:
    r"""Return :math:`\lVert g_c \rVert_2^2` of each component, in float32 or above [num_components].

    Args:
        grads: Gradients.
        components: The number of the component that each gradient belongs to, int64 [len(grads)].
        num_components: Components; one without a gradient has a norm of 0.

    Example:
        >>> grads = [torch.tensor([3.0]), torch.tensor([4.0]), torch.ones(2)]
        >>> squared_norms(grads, torch.tensor([0, 0, 1]), num_components=2).round(decimals=3)
        tensor([25.,  2.])
    """
    # a norm in half precision would be rounded to three digits
    dtype = functools.reduce(torch.promote_types, {grad.dtype for grad in grads}, torch.float32)
    total = torch.zeros(num_components, dtype=dtype, device=components.device)
    if grads:
        total.index_add_(0, components, torch.stack(torch._foreach_norm(grads, 2, dtype=dtype)).square())
    return total


@torch.no_grad()
def clip_components_(grads: list[Tensor], components: Tensor, squared: Tensor, max_norm: float) -> None:
    r"""Scale gradients in place by :math:`\min(1, \tau / (\lVert g_c \rVert_2 + 10^{-6}))` of their component.

    This is what :func:`torch.nn.utils.clip_grad_norm_` does to one component, its constant and its dealing with norms
    that are not finite included: an infinite one leaves zeros and NaN, a NaN spreads over its component.

    Args:
        grads: Gradients, changed in place.
        components: The number of the component that each gradient belongs to, int64 [len(grads)].
        squared: :math:`\lVert g_c \rVert_2^2` over all ranks, from :func:`squared_norms`.
        max_norm: :math:`\tau`.

    Example:
        >>> grads, components = [torch.tensor([3.0, 4.0]), torch.tensor([0.5])], torch.tensor([0, 1])
        >>> clip_components_(grads, components, squared_norms(grads, components, 2), max_norm=1.0)
        >>> grads
        [tensor([0.6000, 0.8000]), tensor([0.5000])]
    """
    if not grads:
        return
    factors = (max_norm / (squared.sqrt() + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, list(factors[components].unbind()))
