"""Subspaces that updates must stay out of, kept as the smaller of an orthonormal basis and one of its complement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Subspace", "complement_basis", "exact_dtype"]


@dataclass(frozen=True)
class Subspace:
    """A linear subspace of dimension r in each of g spaces of dimension d.

    Args:
        matrix: Orthonormal columns ``[g, d, k]``, those of a space with fewer than k filled up by zeros.
        complement: Whether the columns span what the subspace leaves out.
    """

    matrix: Tensor
    complement: bool = False

    @staticmethod
    def spanned_by(bases: list[Tensor]) -> Subspace:
        """Return the subspace that is spanned, in each space, by orthonormal columns ``[d, r]``.

        Example:
            >>> Subspace.spanned_by([torch.eye(4)[:, :3]]).matrix.shape  # the complement has one direction
            torch.Size([1, 4, 1])
        """
        complement = max(basis.shape[1] for basis in bases) > bases[0].shape[0] / 2
        columns = [complement_basis(basis) for basis in bases] if complement else bases
        width = max(basis.shape[1] for basis in columns)
        padded = [torch.nn.functional.pad(basis, (0, width - basis.shape[1])) for basis in columns]
        return Subspace(torch.stack(padded), complement)

    def to(self, weight: Tensor) -> Subspace:
        """Return the subspace on the device of a weight, in its precision or float32, whichever is higher."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return Subspace(self.matrix.to(weight.device, dtype), self.complement)

    def cpu(self) -> Subspace:
        """Return the subspace on the CPU."""
        return Subspace(self.matrix.cpu(), self.complement)

    def bases(self) -> list[Tensor]:
        """Return orthonormal columns ``[d, r]`` of the subspace in each space, float64 where the device has it."""
        matrix = self.matrix.to(exact_dtype(self.matrix.device))
        columns = [space[:, space.any(0)] for space in matrix]
        return [complement_basis(basis) for basis in columns] if self.complement else columns

    def ranks(self) -> list[int]:
        """Return r of each space."""
        counts: list[int] = self.matrix.any(1).sum(1).tolist()
        return [self.matrix.shape[1] - count for count in counts] if self.complement else counts

    def component(self, vectors: Tensor, total: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        r"""Return the orthogonal projection on the subspace, :math:`x M M^\top`, or :math:`x - x N N^\top`.

        Args:
            vectors: Rows :math:`x`, ``[g, n, d]``.
            total: Sums a tensor over ranks that each hold a part of the d dimensions, of the rows and of the columns.

        Example:
            >>> Subspace(torch.tensor([[[1.0], [0.0]]])).component(torch.tensor([[[3.0, 4.0]]]))
            tensor([[[3., 0.]]])
            >>> Subspace(torch.tensor([[[1.0], [0.0]]]), complement=True).component(torch.tensor([[[3.0, 4.0]]]))
            tensor([[[0., 4.]]])
        """
        coefficients = vectors @ self.matrix
        if total is not None:
            coefficients = total(coefficients)
        if self.complement:
            return torch.baddbmm(vectors, coefficients, self.matrix.mT, alpha=-1.0)
        return coefficients @ self.matrix.mT


def complement_basis(basis: Tensor) -> Tensor:
    """Return orthonormal columns ``[d, d - r]`` orthogonal to the independent columns of ``basis``, ``[d, r]``.

    Example:
        >>> complement_basis(torch.tensor([[1.0], [0.0]])).abs()
        tensor([[0.],
                [1.]])
    """
    dimension, rank = basis.shape
    if rank == 0:
        return torch.eye(dimension, dtype=basis.dtype, device=basis.device)
    square: Tensor = torch.linalg.qr(basis, mode="complete").Q
    return square[:, rank:]


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating-point type of a device."""
    return torch.float32 if device.type == "mps" else torch.float64
