r"""Representation misdirection for unlearning (RMU; Li et al. 2024, WMDP, arXiv:2403.03218).

Activations :math:`h` of one layer are steered to a fixed random direction on what is to be forgotten, and held where
they were on what is to be kept:

.. math:: L_f = \frac{1}{B} \sum_b \frac{1}{n_b} \sum_t m_{bt} \, \frac{1}{D} \lVert h_{bt} - c \rVert^2, \qquad
    L_r = \frac{1}{B} \sum_b \frac{1}{n_b} \sum_t m_{bt} \, \frac{1}{D} \lVert h_{bt} - h^{ref}_{bt} \rVert^2,
    \qquad n_b = \sum_t m_{bt} .

Every sample counts alike whatever its length and its padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cl.functional.unlearning.token_nll import mean_over_rows

__all__ = ["activation_distance", "control_vector", "rmu_loss"]


def control_vector(width: int, coefficient: float, seed: int) -> Tensor:
    r"""Return :math:`c \, u / \lVert u \rVert` with :math:`u \sim U[0, 1)^D`, float32 [width] on the CPU.

    A pure function of its arguments, so that all ranks steer to one point.

    Args:
        width: :math:`D`, the width of the layer.
        coefficient: :math:`c`, the norm of the result; it must exceed the layer's own norms to matter.
        seed: Seeds the direction.

    Example:
        >>> vector = control_vector(4, 6.5, seed=0)
        >>> vector.norm(), bool((vector >= 0).all())
        (tensor(6.5000), True)
    """
    direction = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    return direction.div_(direction.norm()).mul_(coefficient)


def rmu_loss(activations: Tensor, control: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Return :math:`L_f`, the distance of activations to the control vector.

    Args:
        activations: :math:`h`, [B, T, D] or [B, D], of any dtype.
        control: The control vector, [D].
        mask: :math:`m`, the positions that count, bool [B, T] or [B]; all if ``None``.

    Returns:
        Scalar, float32; 0 without any position.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> activations = torch.tensor([[[3.0], [3.0]], [[2.0], [9.0]]])
        >>> rmu_loss(activations, torch.tensor([1.0]), torch.tensor([[True, True], [True, False]]))
        tensor(2.5000)
    """
    if control.shape != activations.shape[-1:]:
        raise ValueError(
            f"`control` of shape {list(control.shape)} does not fit activations of shape {list(activations.shape)}: it"
            " has the width of the layer."
        )
    return activation_distance(activations, control.to(activations.device).expand_as(activations), mask)


def activation_distance(activations: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Return :math:`L_r`, the mean squared distance of activations to those of a reference model.

    Args:
        activations: :math:`h`, [B, T, D] or [B, D], of any dtype.
        reference: :math:`h^{ref}`, of the same shape; a constant.
        mask: The positions that count, bool [B, T] or [B]; all if ``None``.

    Returns:
        Scalar, float32; 0 without any position. A sample without a position has no part in the mean.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if reference.shape != activations.shape:
        raise ValueError(
            f"`reference` of shape {list(reference.shape)} does not fit activations of shape {list(activations.shape)}."
        )
    if activations.ndim not in (2, 3):
        raise ValueError(
            f"Activations of shape {list(activations.shape)} are neither [B, T, D] nor [B, D], so it is open which of"
            " their numbers belong to one position. Take those of a layer that returns one vector for each position."
        )
    if mask is None:
        mask = torch.ones(activations.shape[:-1], dtype=torch.bool, device=activations.device)
    if mask.shape != activations.shape[:-1]:
        raise ValueError(
            f"`mask` of shape {list(mask.shape)} does not fit activations of shape {list(activations.shape)}: one entry"
            " for each position is needed."
        )
    # selected first: what stands in padding may be infinite, and its gradient then no number
    distances = (activations[mask].float() - reference[mask].detach().float()).square().mean(-1)
    sums = distances.new_zeros(mask.shape).masked_scatter(mask, distances).reshape(len(mask), -1).sum(1)
    counts = mask.reshape(len(mask), -1).sum(1)
    return mean_over_rows(sums / counts.clamp(min=1), counts > 0)
