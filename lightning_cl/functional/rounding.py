"""Stochastic rounding to bfloat16: right on average where rounding to nearest would lose every small change."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["stochastic_bfloat16"]

_DROPPED_BITS = 16


def stochastic_bfloat16(values: Tensor, generator: torch.Generator) -> Tensor:
    r"""Round up with the probability of the fraction that is dropped, so that :math:`E[\operatorname{round}(x)] = x`.

    A running average that moves by :math:`1 - \beta_2 = 0.001` of itself never falls when it is rounded to the nearest
    of the numbers of bfloat16, which lie 0.004 to 0.008 apart.

    Args:
        values: float32, any shape; infinities and what is not a number stay so.
        generator: On the device of ``values``.

    Returns:
        bfloat16, of the shape of ``values``.

    Example:
        >>> rounded = stochastic_bfloat16(torch.full((100_000,), 1.001), torch.Generator().manual_seed(0))
        >>> rounded.unique(), round(rounded.double().mean().item(), 4)
        (tensor([1.0000, 1.0078], dtype=torch.bfloat16), 1.001)
    """
    noise = torch.randint(
        1 << _DROPPED_BITS, values.shape, dtype=torch.int32, generator=generator, device=values.device
    )
    bits = values.contiguous().view(torch.int32) + noise
    bits &= -(1 << _DROPPED_BITS)
    return torch.where(values.isfinite(), bits.view(torch.float32), values).to(torch.bfloat16)
