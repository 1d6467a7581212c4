"""Adam with decoupled weight decay (Kingma & Ba 2015, arXiv:1412.6980; Loshchilov & Hutter 2019, arXiv:1711.05101)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["adam_update_"]


def adam_update_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first_moments: Sequence[Tensor],
    second_moments: Sequence[Tensor],
    *,
    step: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
    scale: float = 1.0,
    corrected: bool = False,
    foreach: bool = False,
) -> None:
    r"""Take one step, in place.

    .. math::
        \theta \leftarrow (1 - \eta \lambda) \theta, \quad
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        \theta \leftarrow \theta - \eta s \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}.

    Args:
        parameters: :math:`\theta`, tensors of any shapes.
        gradients: :math:`g`, of the same shapes and of the dtype of the moments.
        first_moments: :math:`m`.
        second_moments: :math:`v`.
        step: :math:`t`, gradients in the moments, this one included.
        lr: :math:`\eta`.
        betas: :math:`\beta_1, \beta_2`.
        eps: :math:`\epsilon`, above 0.
        weight_decay: :math:`\lambda`.
        scale: :math:`s`, a factor of the step that does not scale the decay.
        corrected: Whether the moments hold bias-corrected estimates already: no correction then.
        foreach: Whether to move all tensors in a few kernels; equal to the bit.

    Example:
        >>> weight, m, v = torch.ones(1), torch.zeros(1), torch.zeros(1)
        >>> adam_update_([weight], [torch.tensor([3.0])], [m], [v], step=1, lr=0.1, betas=(0.9, 0.999), eps=1e-8)
        >>> weight
        tensor([0.9000])
    """
    beta1, beta2 = betas
    correction1, correction2 = (1.0, 1.0) if corrected else (1 - beta1**step, math.sqrt(1 - beta2**step))
    size = -lr * scale * correction2 / correction1
    if foreach:
        parameters, gradients = list(parameters), list(gradients)
        first_moments, second_moments = list(first_moments), list(second_moments)
        if weight_decay:
            # not a product with what remains, which float32 would round alike in every step
            torch._foreach_add_(parameters, parameters, alpha=-lr * weight_decay)
        torch._foreach_lerp_(first_moments, gradients, 1 - beta1)
        torch._foreach_mul_(second_moments, beta2)
        torch._foreach_addcmul_(second_moments, gradients, gradients, 1 - beta2)
        roots = list(torch._foreach_sqrt(second_moments))
        torch._foreach_add_(roots, eps * correction2)
        torch._foreach_addcdiv_(parameters, first_moments, roots, size)
        return
    for parameter, gradient, first, second in zip(parameters, gradients, first_moments, second_moments, strict=True):
        if weight_decay:
            parameter.add_(parameter, alpha=-lr * weight_decay)
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        parameter.addcdiv_(first, second.sqrt().add_(eps * correction2), value=size)
