r"""Where a gradient leaves the span of a low-rank update, seen through a sketch of it.

The gradient of a weight, :math:`G = \sum_n \delta_n x_n^\top`, moves :math:`B` only along the rows of :math:`A`:
:math:`\nabla_B = s \, G A^\top`. A new row v with a column of zeros changes no output, and gives that column the
gradient :math:`s \, G v`, longest for the leading right singular vectors of G (Evci et al. 2022, GradMax,
arXiv:2201.05125).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_cl.functional.subspaces import exact_dtype

__all__ = ["add_sketch_", "leading_directions_outside", "num_probes", "probes"]


def num_probes(outputs: int, threshold: float) -> int:
    """Return how many probes to look at a gradient with: a gradient of noise then shows no share above a threshold.

    Args:
        outputs: Rows of the gradient; with as many probes the sketch is the gradient itself.
        threshold: Share of a direction that counts.

    Example:
        >>> num_probes(4096, 0.1), num_probes(16, 0.1)
        (40, 16)
    """
    return min(outputs, math.ceil(4 / threshold))


def probes(outputs: int, count: int, generator: torch.Generator) -> Tensor:
    r"""Return :math:`\Omega`, ``[outputs, count]``: Gaussian, or the identity where there are as many as outputs.

    Example:
        >>> probes(2, 2, torch.Generator())
        tensor([[1., 0.],
                [0., 1.]])
    """
    return torch.eye(outputs) if count >= outputs else torch.randn(outputs, count, generator=generator)


@torch.no_grad()
def add_sketch_(sketch: Tensor, inputs: Tensor, gradient: Tensor, omega: Tensor) -> Tensor:
    r"""Add :math:`\Omega^\top G = (\delta \, \Omega)^\top x` of a batch to a sketch, without forming :math:`G`.

    Args:
        sketch: ``[count, in]``, float32; returned.
        inputs: :math:`x`, ``[..., in]``, what the layer got.
        gradient: :math:`\delta`, ``[..., out]``, the gradient of the loss at what the layer returned.
        omega: :math:`\Omega`, ``[out, count]``.

    Example:
        >>> add_sketch_(torch.zeros(1, 2), torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), torch.eye(1))
        tensor([[3., 6.]])
    """
    seen = gradient.reshape(-1, gradient.shape[-1]).to(sketch.dtype) @ omega
    return sketch.addmm_(seen.T, inputs.reshape(-1, inputs.shape[-1]).to(sketch.dtype))


def leading_directions_outside(sketch: Tensor, rows: Tensor, threshold: float, most: int) -> tuple[Tensor, float]:
    r"""Return directions outside the span of rows that each carry more than a share of the gradient's energy.

    With :math:`P` the projection on the span of the rows and singular values :math:`\sigma_i` of
    :math:`S (I - P)`, they are the leading right singular vectors with
    :math:`\sigma_i^2 / \lVert S \rVert_F^2 > \tau`.

    Args:
        sketch: :math:`S`, ``[count, in]``.
        rows: Rows of :math:`A` that are in use, ``[k, in]``.
        threshold: :math:`\tau`, from 0 to below 1.
        most: How many directions at most.

    Returns:
        The directions, orthonormal rows, ``[n, in]``, and the share of the energy outside of the span of ``rows``.

    Example:
        >>> sketch = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> directions, share = leading_directions_outside(sketch, torch.eye(3)[:1], threshold=0.1, most=2)
        >>> directions.abs(), round(share, 3)  # of energies 9, 4 and 1 the second is free and above a tenth
        (tensor([[0., 1., 0.]]), 0.357)
    """
    exact = sketch.to(exact_dtype(sketch.device))
    energy = exact.square().sum()
    if not torch.isfinite(energy) or energy == 0:
        return sketch.new_empty(0, sketch.shape[1]), 0.0
    basis = _basis(rows.to(exact))
    left = exact - exact @ basis.T @ basis
    _, singular, directions = torch.linalg.svd(left, full_matrices=False)
    shares = singular.square() / energy
    count = min(int((shares > threshold).sum()), most)
    return directions[:count].to(sketch.dtype), float(shares.sum())


def _basis(rows: Tensor) -> Tensor:
    """Return orthonormal rows that span the same."""
    _, singular, directions = torch.linalg.svd(rows, full_matrices=False)
    largest = singular.max() if len(singular) else 0.0
    basis: Tensor = directions[singular > largest * 1e-6]
    return basis
