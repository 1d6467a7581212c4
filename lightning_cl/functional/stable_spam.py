r"""Adaptive clipping and norm scaling of Stable-SPAM (Huang et al. 2025, arXiv:2502.17055), a tensor at a time.

Numbers of tensors stand in one vector, an entry for each of them, so that nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = [
    "absolute_maxima",
    "annealing_scale",
    "clip_to_thresholds_",
    "euclidean_norms",
    "norm_factors_",
    "spike_thresholds_",
]

# the `eta` of the authors' scripts
_ANNEALED = 0.5


def absolute_maxima(gradients: Sequence[Tensor], dtype: torch.dtype, *, foreach: bool = False) -> Tensor:
    r"""Return :math:`\max_i |g_i|` of each tensor, 0 where it is empty.

    Args:
        gradients: Tensors of any shapes, at least one.
        dtype: That of the result.
        foreach: Whether to read all tensors in a few kernels; equal to the bit.

    Returns:
        ``dtype`` [n].

    Example:
        >>> absolute_maxima([torch.tensor([1.0, -3.0]), torch.tensor([])], torch.float32)
        tensor([3., 0.])
    """
    filled = [gradient for gradient in gradients if gradient.numel()]
    found: list[Tensor] = []
    if foreach and filled:
        found = list(torch._foreach_norm(filled, math.inf))
    elif filled:
        # five times as fast as the norm on a CPU
        extremes = [torch.aminmax(gradient) for gradient in filled]
        found = [torch.maximum(-extreme.min, extreme.max) for extreme in extremes]
    return _stacked(gradients, found, dtype)


def euclidean_norms(gradients: Sequence[Tensor], dtype: torch.dtype, *, foreach: bool = False) -> Tensor:
    r"""Return :math:`\lVert g \rVert_2` of each tensor, summed in ``dtype``, 0 where it is empty.

    Args:
        gradients: Tensors of any shapes, at least one.
        dtype: That of the sums and of the result, such as float32 for gradients of half precision.
        foreach: Whether to read all tensors in a few kernels; equal to the bit.

    Returns:
        ``dtype`` [n].

    Example:
        >>> euclidean_norms([torch.tensor([3.0, -4.0]), torch.tensor([])], torch.float32)
        tensor([5., 0.])
    """
    filled = [gradient for gradient in gradients if gradient.numel()]
    # the kernel for lists sums in an order of its own on a GPU, the same for a list of one
    lists = [filled] if foreach and filled else [[gradient] for gradient in filled]
    found = [norm for tensors in lists for norm in torch._foreach_norm(tensors, 2, dtype=dtype)]
    return _stacked(gradients, found, dtype)


def _stacked(gradients: Sequence[Tensor], found: list[Tensor], dtype: torch.dtype) -> Tensor:
    values = iter(found)
    zero = gradients[0].new_zeros((), dtype=dtype)
    return torch.stack([next(values).to(dtype) if gradient.numel() else zero for gradient in gradients])


def spike_thresholds_(averages: Tensor, maxima: Tensor, *, step: float, gamma3: float) -> Tensor:
    r"""Bring the running average of maxima up to date, in place, and return the thresholds.

    .. math::
        T \leftarrow \gamma_3 T + (1 - \gamma_3) \max_i |g_i|, \qquad \hat{T} = \frac{T}{1 - \gamma_3^t}.

    Args:
        averages: :math:`T` [n], from 0.
        maxima: The maxima of these gradients [n].
        step: :math:`t`, maxima in the average, this one included.
        gamma3: :math:`\gamma_3`.

    Returns:
        :math:`\hat{T}` [n].

    Example:
        >>> averages = torch.zeros(1)
        >>> spike_thresholds_(averages, torch.tensor([4.0]), step=1, gamma3=0.5)
        tensor([4.])
        >>> spike_thresholds_(averages, torch.tensor([10.0]), step=2, gamma3=0.5)
        tensor([8.])
    """
    averages.lerp_(maxima, 1 - gamma3)
    corrected: Tensor = averages / (1 - gamma3**step)
    return corrected


def clip_to_thresholds_(gradients: Sequence[Tensor], maxima: Tensor, thresholds: Tensor) -> None:
    r"""Scale down what stands out, in place, so that the largest of it comes to the threshold (AdaClip).

    .. math:: g_i \leftarrow g_i \, \frac{\hat{T}}{\max_j |g_j|} \quad \text{where} \quad |g_i| > \hat{T}.

    Args:
        gradients: Tensors of any shapes.
        maxima: Their largest absolute values [n], over all shards.
        thresholds: :math:`\hat{T}` [n].

    Example:
        >>> gradient = torch.tensor([1.0, -40.0, 100.0])
        >>> clip_to_thresholds_([gradient], torch.tensor([100.0]), torch.tensor([5.0]))
        >>> gradient
        tensor([ 1., -2.,  5.])
    """
    factors = thresholds / maxima
    # elsewhere to ask would be to wait, and a plan has no values to tell
    known = maxima.device.type == "cpu" and not isinstance(maxima, FakeTensor)
    spiked = (maxima > thresholds).tolist() if known else [True] * len(gradients)
    for gradient, any_spike, threshold, factor in zip(
        gradients, spiked, thresholds.unbind(), factors.unbind(), strict=True
    ):
        if any_spike:
            gradient.copy_(torch.where(gradient.abs() > threshold, gradient * factor, gradient))


def norm_factors_(
    first: Tensor, second: Tensor, norms: Tensor, *, step: float, gammas: tuple[float, float], eps: float
) -> Tensor:
    r"""Bring the running averages of norms up to date, in place, and return what to multiply gradients by (AdaGN).

    .. math::
        \mu \leftarrow \gamma_1 \mu + (1 - \gamma_1) \lVert g \rVert, \quad
        \nu \leftarrow \gamma_2 \nu + (1 - \gamma_2) \lVert g \rVert^2, \quad
        \frac{1}{\lVert g \rVert} \cdot \frac{\mu / (1 - \gamma_1^t)}{\sqrt{\nu / (1 - \gamma_2^t)} + \epsilon}.

    A gradient of zeros stays one: its factor is 1.

    Args:
        first: :math:`\mu` [n], from 0.
        second: :math:`\nu` [n], from 0.
        norms: :math:`\lVert g \rVert` [n], over all shards, after clipping.
        step: :math:`t`, norms in the averages, these included.
        gammas: :math:`\gamma_1, \gamma_2`.
        eps: :math:`\epsilon`.

    Returns:
        Factors [n].

    Example:
        A norm a thousand times the usual one leaves a gradient of a norm near 1, as all others have.

        >>> first, second = torch.zeros(1), torch.zeros(1)
        >>> for step, norm in enumerate([2.0, 2.0, 2000.0], start=1):
        ...     norms = torch.tensor([norm])
        ...     print(norms * norm_factors_(first, second, norms, step=step, gammas=(0.7, 0.9), eps=1e-8))
        tensor([1.])
        tensor([1.])
        tensor([0.7526])
    """
    gamma1, gamma2 = gammas
    first.lerp_(norms, 1 - gamma1)
    second.lerp_(norms.square(), 1 - gamma2)
    mean, square = first / (1 - gamma1**step), second / (1 - gamma2**step)
    return torch.where(norms > 0, mean / (square.sqrt() + eps) / norms, 1.0)


def annealing_scale(step: float, steps: int) -> float:
    r"""Return the factor that falls from 1 to 1/2 along half a cosine, for :math:`\beta_1` and :math:`\gamma_1`.

    .. math:: s_t = \tfrac{1}{2} + \tfrac{1}{4} \left(1 + \cos \frac{\pi t}{N + 1}\right), \qquad t \le N + 1

    Args:
        step: :math:`t`, from 1.
        steps: :math:`N`.

    Example:
        >>> [round(annealing_scale(step, 3), 3) for step in range(6)]
        [1.0, 0.927, 0.75, 0.573, 0.5, 0.5]
    """
    progress = min(1.0, step / (steps + 1))
    return _ANNEALED + (1 - _ANNEALED) * (1 + math.cos(math.pi * progress)) / 2
