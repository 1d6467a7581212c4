r"""Spike-aware clipping and the schedule of momentum resets of SPAM (Huang et al. 2025, arXiv:2501.06842)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Schedule", "clip_spikes_", "count_spikes", "schedule_", "spam_update_", "warmup_scale"]

# keeps the cheap test for spikes on the safe side of the rounding of the exact one
_MARGIN = 1e-5


def warmup_scale(step: int, warmup_steps: int) -> float:
    r"""Return the factor of the learning rate in a step after a momentum reset.

    .. math::
        s_k = 1 - 0.99 \cdot \tfrac{1}{2} \left(1 + \cos \frac{\pi k}{N + 1}\right) \; (k < N), \qquad 1 \; (k \ge N)

    The factor 0.99, which no step of zero length follows from, is that of the authors' code.

    Args:
        step: :math:`k`, steps since the reset, from 0.
        warmup_steps: :math:`N`, 0 or more.

    Example:
        >>> [round(warmup_scale(step, 3), 3) for step in range(5)]
        [0.01, 0.155, 0.505, 1.0, 1.0]
    """
    if step >= warmup_steps:
        return 1.0
    return 1.0 - 0.99 * (1.0 + math.cos(math.pi * step / (warmup_steps + 1))) / 2.0


def clip_spikes_(
    gradients: Sequence[Tensor], second_moments: Sequence[Tensor], threshold: float, *, foreach: bool | None = None
) -> None:
    r"""Clip gradients against the second moments of those before them, in place, element by element.

    .. math:: g \leftarrow \operatorname{sign}(g) \sqrt{\theta v} \quad \text{where} \quad g^2 > \theta v > 0.

    Where :math:`v = 0` there was no gradient yet that the new one could stand out from. The paper's rule would set it
    to zero, and so for ever keep still what is rarely touched, such as the embedding of a new token.

    Args:
        gradients: Tensors of any shapes.
        second_moments: Tensors of the same shapes, 0 or more, from before these gradients.
        threshold: :math:`\theta`, above 0; infinity clips nothing.
        foreach: Whether to clip all tensors in a few kernels, without waiting for the device; otherwise one after the
            other, and only those that have spikes. Equal to the bit in float32. ``None`` is ``False`` on the CPU.

    Example:
        >>> gradient = torch.tensor([1.0, -300.0, 300.0])
        >>> clip_spikes_([gradient], [torch.tensor([1.0, 1.0, 0.0])], threshold=5000.0)
        >>> gradient
        tensor([  1.0000, -70.7107, 300.0000])
    """
    if math.isinf(threshold):
        return
    if foreach is None:
        foreach = any(gradient.device.type != "cpu" for gradient in gradients)
    if foreach and gradients:
        gradients, second_moments = list(gradients), list(second_moments)
        bounds = list(torch._foreach_mul(second_moments, threshold))
        torch._foreach_sqrt_(bounds)
        # 0 where there is a bound, infinity where the second moment is zero
        unbounded = list(torch._foreach_sign(second_moments))
        torch._foreach_reciprocal_(unbounded)
        torch._foreach_sub_(unbounded, 1.0)
        torch._foreach_add_(bounds, unbounded)
        torch._foreach_minimum_(gradients, bounds)
        torch._foreach_neg_(bounds)
        torch._foreach_maximum_(gradients, bounds)
        return
    for gradient, second_moment in zip(gradients, second_moments, strict=True):
        # the sign of what is nowhere near a spike is certain; not a number takes the exact way too
        if gradient.numel() and not _headroom(gradient, second_moment, threshold) >= 0:
            bound = torch.where(second_moment > 0, torch.sqrt(second_moment * threshold), torch.inf)
            torch.clamp(gradient, -bound, bound, out=gradient)


def _headroom(gradient: Tensor, second_moment: Tensor, threshold: float) -> float:
    room = torch.addcmul(second_moment, gradient, gradient, value=-(1.0 + _MARGIN) / threshold)
    return room.amin().item()


def count_spikes(gradient: Tensor, second_moment: Tensor, threshold: float) -> Tensor:
    r"""Return the number of spikes :math:`g^2 > \theta v > 0`, and the largest :math:`g^2 / v` where :math:`v > 0`.

    Args:
        gradient: Any shape.
        second_moment: The same shape, from before this gradient.
        threshold: :math:`\theta`.

    Returns:
        float64 [2], on the device of ``gradient``.

    Example:
        >>> count_spikes(torch.tensor([1.0, 100.0, 300.0]), torch.tensor([1.0, 1.0, 0.0]), threshold=5000.0)
        tensor([1.0000e+00, 1.0000e+04], dtype=torch.float64)
    """
    if not gradient.numel():
        return torch.zeros(2, dtype=torch.float64, device=gradient.device)
    ratio = gradient.square().div_(second_moment).masked_fill_(second_moment == 0, 0.0)
    return torch.stack([torch.count_nonzero(ratio > threshold).double(), ratio.amax().double()])


class Schedule(NamedTuple):
    """What a step of SPAM takes from its clock: float64 numbers on the device of the weights, see :func:`schedule_`."""

    due: Tensor
    threshold: Tensor
    size: Tensor
    eps: Tensor


def schedule_(
    steps: Sequence[Tensor],
    resets: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    threshold: float,
    reset_interval: int | None,
    warmup_steps: int,
    clip_delay: int,
) -> Schedule:
    """Advance the clocks of several tensors by a step, without waiting for their device.

    Args:
        steps: Scalars, in place: gradients that the moments of each tensor hold.
        resets: Scalars, in place: how often they were reset.
        lr: Learning rate.
        betas: Decays of the moments.
        eps: Added to the root of the second moment.
        threshold: Of a spike's square to the second moment.
        reset_interval: Steps between resets, or ``None``.
        warmup_steps: Steps of warm-up after a reset.
        clip_delay: Steps after a reset without clipping.

    Returns:
        Whether the moments are to be reset, the threshold in this step, the length of the step with its bias
        correction, and what to add to the root of the second moment; each [n].
    """
    count = torch.stack(list(steps)).double()
    due = count >= (math.inf if reset_interval is None else reset_interval)
    torch._foreach_add_(list(resets), list(due.to(resets[0].dtype).unbind()))
    count = count.masked_fill(due, 0)
    rising = 1.0 - 0.99 * (1.0 + torch.cos(math.pi * count / (warmup_steps + 1))) / 2.0
    warming = (torch.stack(list(resets)) > 0) & (count < warmup_steps)
    bounded = torch.where(count >= clip_delay, count.new_tensor(threshold), math.inf)
    count += 1
    torch._foreach_copy_(list(steps), list(count.unbind()))
    correction2 = torch.sqrt(1 - betas[1] ** count)
    size = lr * torch.where(warming, rising, 1.0) * correction2 / (1 - betas[0] ** count)
    return Schedule(due, bounded, size, eps * correction2)


def spam_update_(
    parameter: Tensor,
    gradient: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    schedule: Schedule,
    decay: float | Tensor,
    betas: tuple[float, float],
) -> None:
    """Take a step of SPAM in place, without a branch: one kernel when it is compiled, and fit for a CUDA graph.

    Args:
        parameter: Any shape.
        gradient: The same shape, of the dtype of the moments; it stays as it is.
        first_moment: The same shape.
        second_moment: The same shape.
        schedule: Scalars, from :func:`schedule_`.
        decay: What part of the weights is taken from them: the learning rate times the weight decay.
        betas: Decays of the moments.
    """
    first_moment.masked_fill_(schedule.due, 0)
    second_moment.masked_fill_(schedule.due, 0)
    bound = torch.where(second_moment > 0, torch.sqrt(second_moment * schedule.threshold), math.inf)
    gradient = torch.clamp(gradient, -bound, bound)
    first_moment.lerp_(gradient, 1 - betas[0])
    second_moment.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    step = first_moment / (torch.sqrt(second_moment) + schedule.eps) * schedule.size
    parameter.copy_(parameter - parameter * decay - step)
