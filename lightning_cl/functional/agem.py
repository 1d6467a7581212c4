"""Averaged gradient episodic memory (Chaudhry et al. 2019, arXiv:1812.00420)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["agem_coefficient"]


def agem_coefficient(product: Tensor, square: Tensor) -> Tensor:
    r"""Return :math:`v = \max(0, -\frac{g^\top g_{ref}}{g_{ref}^\top g_{ref}})`; the step is :math:`g + v \, g_{ref}`.

    It solves :math:`\min_{\tilde g} \frac{1}{2} \lVert \tilde g - g \rVert^2` subject to
    :math:`\tilde g^\top g_{ref} \ge 0` (eqs. 10 and 11 of the paper): a gradient that agrees with the reference stays
    as it is. A reference of zeros forbids nothing.

    Args:
        product: :math:`g^\top g_{ref}`.
        square: :math:`g_{ref}^\top g_{ref}`, of the same shape.

    Example:
        >>> gradient, reference = torch.tensor([-3.0, 1.0]), torch.tensor([2.0, 0.0])
        >>> v = agem_coefficient(gradient @ reference, reference @ reference)
        >>> gradient + v * reference
        tensor([0., 1.])
    """
    # a reference that is no number goes on as one, as a loss that is none does
    return torch.where(square == 0, 0.0, (-product / square).clamp_min(0))
