"""Directions outside a memory, against singular value decompositions of stored inputs."""

from __future__ import annotations

import pytest
import torch

from lightning_cl.functional.inflora import leading_directions, memory_threshold


def random_inputs(features=6, samples=50, seed=0):
    """Stored inputs, columns, with energies that differ."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(1, 3, features, dtype=torch.float64)[:, None]
    return scales * torch.randn(features, samples, generator=generator, dtype=torch.float64)


def random_basis(features=6, size=2):
    """Orthonormal columns."""
    generator = torch.Generator().manual_seed(9)
    return torch.linalg.qr(torch.randn(features, size, generator=generator, dtype=torch.float64)).Q


@pytest.mark.parametrize("size", [0, 2, 4])
def test_they_are_the_leading_left_singular_vectors_of_the_rest(size):
    """Of H - M M^T H, up to the sign, whatever the scale of the covariance."""
    inputs, basis = random_inputs(), random_basis(size=size)
    left = torch.linalg.svd(inputs - basis @ basis.T @ inputs).U[:, :2]
    rows = leading_directions(basis, 0.01 * inputs @ inputs.T, rank=2)
    torch.testing.assert_close(rows.abs(), left.T.abs())
    torch.testing.assert_close(rows @ rows.T, torch.eye(2, dtype=torch.float64))


def test_no_direction_has_a_part_in_the_memory():
    """Not even where the inputs hold nothing outside of it."""
    basis = random_basis(size=3)
    rows = leading_directions(basis, basis @ torch.diag(torch.tensor([3.0, 2.0, 1.0]).double()) @ basis.T, rank=3)
    torch.testing.assert_close(rows @ rows.T, torch.eye(3, dtype=torch.float64))
    assert (rows @ basis).abs().max() < 1e-14


def test_rows_without_room_are_zero():
    """A memory of four of six dimensions leaves two rows of three."""
    inputs = random_inputs()
    rows = leading_directions(random_basis(size=4), inputs @ inputs.T, rank=3)
    torch.testing.assert_close(rows.norm(dim=1), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    assert not leading_directions(torch.eye(6, dtype=torch.float64), inputs @ inputs.T, rank=2).any()


def test_the_threshold_rises_with_the_tasks_and_stops_at_its_end():
    """The first task has the first one; there is no task of the last one but beyond the end."""
    assert [memory_threshold(0.95, 1.0, task, 5) for task in (0, 1, 4, 5, 9)] == pytest.approx(
        [0.95, 0.96, 0.99, 1.0, 1.0]
    )
