r"""Ranks chosen by soft-thresholded gates (CoDyRA, Lu et al. 2024, arXiv:2412.01004).

An update is :math:`B \, \mathrm{diag}(w) A`, with a gate for each rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["soft_threshold_", "surviving_factors", "threshold_at"]


def threshold_at(step: int, steps: int, dense: float, largest: float) -> float:
    r"""Return the threshold :math:`\kappa` after a step: 0 in the dense phase, then growing linearly to the largest.

    .. math:: \kappa_n = \kappa_{max} \frac{\max(n - dN, 0)}{N - dN}

    Args:
        step: :math:`n`, from 1 to N.
        steps: :math:`N`, the steps of the task.
        dense: :math:`d`, the share of the steps without a threshold, from 0 to below 1.
        largest: :math:`\kappa_{max}`.

    Example:
        >>> [threshold_at(step, 4, dense=0.5, largest=0.1) for step in (1, 2, 3, 4)]
        [0.0, 0.0, 0.05, 0.1]
    """
    start = dense * steps
    return largest * min(max(step - start, 0.0) / (steps - start), 1.0)


@torch.no_grad()
def soft_threshold_(gates: Sequence[Tensor], threshold: float) -> None:
    r"""Apply the proximal step of :math:`\kappa \lVert w \rVert_1` in place.

    .. math:: w \leftarrow \mathrm{sign}(w) \max(|w| - \kappa, 0)

    Example:
        >>> gates = torch.tensor([0.3, -0.3, 0.1, -0.15])
        >>> soft_threshold_([gates], 0.1)
        >>> gates
        tensor([ 0.2000, -0.2000,  0.0000, -0.0500])
    """
    for gate in gates:
        gate.copy_(torch.nn.functional.softshrink(gate, threshold))


def surviving_factors(down: Tensor, up: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the factors of :math:`B \, \mathrm{diag}(w) A` without the ranks whose gate is 0.

    Args:
        down: :math:`A`, ``[r, in]``; the gates go into it.
        up: :math:`B`, ``[out, r]``.
        gates: :math:`w`, ``[r]``.

    Returns:
        ``[k, in]`` and ``[out, k]``, for the k gates that are not 0.

    Example:
        >>> surviving_factors(torch.ones(2, 1), torch.ones(1, 2), torch.tensor([0.0, 3.0]))
        (tensor([[3.]]), tensor([[1.]]))
    """
    kept = gates != 0
    return gates[kept, None] * down[kept], up[:, kept]
