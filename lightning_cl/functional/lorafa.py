r"""The factor A of a LoRA that stays as it was drawn.

Zhang et al. 2023, arXiv:2308.03303, freeze A as LoRA draws it. Zhu et al. 2024, arXiv:2402.16842, draw it with
orthonormal rows: :math:`A A^\top = I`.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

__all__ = ["orthonormal_rows"]


def orthonormal_rows(rows: int, columns: int, generator: Generator) -> Tensor:
    r"""Return a random matrix with :math:`A A^\top = I`, drawn evenly among all such (the Haar measure).

    Args:
        rows: r, at most ``columns``.
        columns: The inputs of the layer.
        generator: Of the CPU; equal ones give equal matrices.

    Returns:
        :math:`A`, ``[rows, columns]``, float32 on the CPU.

    Raises:
        ValueError: If there are more rows than columns.

    Example:
        >>> down = orthonormal_rows(2, 5, torch.Generator().manual_seed(0))
        >>> torch.allclose(down @ down.mT, torch.eye(2), atol=1e-6)
        True
    """
    if rows > columns:
        raise ValueError(f"{rows} rows of {columns} entries cannot be orthonormal.")
    normal = torch.randn(columns, rows, generator=generator, dtype=torch.float64)
    orthonormal, triangular = torch.linalg.qr(normal)
    # without the signs, rows would lean towards one side
    drawn: Tensor = orthonormal * triangular.diagonal().sign()
    return drawn.mT.float().contiguous()
