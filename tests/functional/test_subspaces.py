"""Subspaces: both ways to keep one project alike, and growing one keeps it orthonormal and small."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_cl.functional import Subspace, complement_basis, extend_basis


def orthonormal(rows: int, columns: int) -> Tensor:
    """Random orthonormal columns in float64."""
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64)).Q


@pytest.mark.parametrize("rank", [0, 1, 4, 5, 7, 8])
def test_component_is_the_projection(rank: int) -> None:
    """It is x M Mᵀ, whichever of basis and complement is kept; the kept one has at most half of the columns."""
    basis, vectors = orthonormal(8, rank), torch.randn(1, 5, 8, dtype=torch.float64)
    subspace = Subspace.spanned_by([basis])
    assert subspace.matrix.shape == (1, 8, min(rank, 8 - rank))
    assert subspace.ranks() == [rank]
    torch.testing.assert_close(subspace.component(vectors), vectors @ basis @ basis.T)
    (again,) = subspace.bases()
    torch.testing.assert_close(again @ again.T, basis @ basis.T)


def test_spaces_of_unequal_rank() -> None:
    """Each is filled up by zeros, which stand for no direction."""
    bases, vectors = [orthonormal(6, 1), orthonormal(6, 5)], torch.randn(2, 3, 6, dtype=torch.float64)
    subspace = Subspace.spanned_by(bases)
    assert subspace.complement
    assert subspace.ranks() == [1, 5]
    expected = torch.stack([v @ b @ b.T for v, b in zip(vectors, bases, strict=True)])
    torch.testing.assert_close(subspace.component(vectors), expected)
    assert [basis.shape[1] for basis in subspace.bases()] == [1, 5]


def test_component_of_parts() -> None:
    """Where each rank has a part of the dimensions, only the coefficients are summed."""
    basis, vectors = orthonormal(6, 2), torch.randn(1, 3, 6, dtype=torch.float64)
    coefficients = vectors @ basis
    for complement in (False, True):
        parts = [Subspace(basis[None, rows], complement) for rows in (slice(0, 2), slice(2, 6))]
        cut = [vectors[..., :2], vectors[..., 2:]]
        joined = [part.component(v, lambda _: coefficients) for part, v in zip(parts, cut, strict=True)]
        expected = Subspace(basis[None], complement).component(vectors)
        torch.testing.assert_close(torch.cat(joined, 2), expected)


def test_to_keeps_float32_or_above() -> None:
    """Half-precision weights are projected in float32."""
    subspace = Subspace(orthonormal(4, 1)[None])
    dtypes = [subspace.to(torch.zeros(1, dtype=d)).matrix.dtype for d in (torch.bfloat16, torch.float32, torch.float64)]
    assert dtypes == [torch.float32, torch.float32, torch.float64]


def test_complement_of_nothing_and_of_all() -> None:
    """The whole space, and no direction."""
    assert torch.equal(complement_basis(torch.zeros(3, 0)), torch.eye(3))
    assert complement_basis(torch.eye(3)).shape == (3, 0)


def test_a_hundred_tasks_stay_orthonormal_and_bounded() -> None:
    """Kept in float32 between tasks, the projection stays one, and takes at most half a square."""
    subspace = Subspace.spanned_by([torch.zeros(40, 0, dtype=torch.float64)])
    largest = 0
    for _ in range(100):
        rows = torch.randn(3, 40, dtype=torch.float64)
        (basis,) = subspace.bases()
        subspace = Subspace.spanned_by([extend_basis(basis, rows.T @ rows, 0.8)]).to(torch.zeros(1))
        largest = max(largest, subspace.matrix.numel())
    (basis,) = subspace.bases()
    assert largest <= 40 * 20
    assert 20 < basis.shape[1] <= 40
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), rtol=0, atol=1e-7)
