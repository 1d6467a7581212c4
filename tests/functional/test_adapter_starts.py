"""Starts of adapters, against decompositions of stored inputs."""

from __future__ import annotations

import torch

from lightning_cl.functional.adapter_starts import least_context_rows, variance_rows

EXACT = torch.float64


def random(*shape, seed=0):
    """Gaussian numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=EXACT)


def same_span(one, other):
    """Rows span the same, as the projections on them say."""
    torch.testing.assert_close(one.T @ torch.linalg.pinv(one.T), other.T @ torch.linalg.pinv(other.T))


def test_rows_beyond_the_inputs_are_zero():
    """Two inputs have no third direction."""
    two = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=EXACT))
    for rows in (
        least_context_rows(random(5, 2), torch.eye(2, dtype=EXACT), rank=3),
        variance_rows(torch.eye(2, dtype=EXACT), rank=3),
    ):
        torch.testing.assert_close(rows @ rows.T, two)


def test_variance_rows_are_the_right_singular_vectors_of_the_activations():
    """Activations in rows, as EVA has them."""
    inputs = random(40, 5) * torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    expected = torch.linalg.svd(inputs).Vh[:2]
    torch.testing.assert_close(variance_rows(inputs.T @ inputs / 40, rank=2).abs(), expected.abs())


def test_least_context_rows_span_what_corda_trains():
    """The last rows of V^T C^-1, of W C = U S V^T, with C as PEFT makes it invertible."""
    weight, inputs = random(4, 6), random(50, 6, seed=1) * torch.arange(1, 7)
    covariance = inputs.T @ inputs / 50
    damped = covariance + 0.01 * covariance.diagonal().mean() * torch.eye(6)
    right = torch.linalg.svd(weight @ damped, full_matrices=False).Vh
    rows = least_context_rows(weight, covariance, rank=2)
    same_span(rows, right[-2:] @ torch.linalg.inv(damped))
    torch.testing.assert_close(rows @ rows.T, torch.eye(2, dtype=EXACT))


def test_least_context_rows_do_without_full_rank():
    """A context of two directions of four leaves the two others, whatever its scale."""
    covariance = torch.diag(torch.tensor([1e-6, 2e-6, 0.0, 0.0], dtype=EXACT))
    rows = least_context_rows(torch.eye(4, dtype=EXACT), covariance, rank=2)
    same_span(rows, torch.eye(4, dtype=EXACT)[2:])
