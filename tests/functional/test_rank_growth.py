"""Sketches of gradients, and the directions in them that a low-rank update cannot reach."""

from __future__ import annotations

import pytest
import torch

from lightning_cl.functional import add_sketch_, leading_directions_outside, num_probes, probes


def test_sketch_of_all_outputs_is_the_gradient() -> None:
    """Batches and positions add up to autograd's gradient of the weight."""
    layer = torch.nn.Linear(6, 4, bias=False)
    inputs = torch.randn(3, 5, 6)
    outputs = layer(inputs)
    outputs.retain_grad()
    outputs.square().sum().backward()
    omega = probes(4, num_probes(4, 0.1), torch.Generator())
    assert outputs.grad is not None
    sketch = torch.zeros(4, 6)
    for part, gradient in zip(inputs, outputs.grad, strict=True):
        add_sketch_(sketch, part, gradient, omega)
    torch.testing.assert_close(sketch, layer.weight.grad)


def test_sketch_is_linear_in_the_gradient() -> None:
    """With fewer probes than outputs, Ω is Gaussian, and Ωᵀ G is what is kept."""
    omega = probes(200, 20, torch.Generator().manual_seed(1))
    inputs, gradient = torch.randn(9, 6), torch.randn(9, 200)
    found = add_sketch_(torch.zeros(20, 6), inputs, gradient, omega)
    torch.testing.assert_close(found, omega.T @ gradient.T @ inputs, atol=1e-4, rtol=0)
    assert omega.std() == pytest.approx(1.0, abs=0.05)


def test_directions_are_singular_vectors_outside_the_rows() -> None:
    """Orthonormal, orthogonal to the rows, and as many as carry more than the share."""
    generator = torch.Generator().manual_seed(0)
    sketch, rows = torch.randn(8, 6, generator=generator), torch.randn(2, 6, generator=generator)
    directions, share = leading_directions_outside(sketch, rows, 0.15, 4)
    basis = torch.linalg.qr(rows.T).Q
    left = sketch - sketch @ basis @ basis.T
    _, singular, vectors = torch.linalg.svd(left)
    shares = singular.square() / sketch.square().sum()
    count = int((shares > 0.15).sum())
    assert 0 < count < 4
    torch.testing.assert_close((directions @ vectors[:count].T).abs(), torch.eye(count), atol=1e-5, rtol=0)
    torch.testing.assert_close(directions @ rows.T, torch.zeros(count, 2), atol=1e-5, rtol=0)
    assert share == pytest.approx(float(left.square().sum() / sketch.square().sum()))


def test_no_more_directions_than_there_is_room_for() -> None:
    """The leading ones come first."""
    sketch = torch.diag(torch.tensor([1.0, 3.0, 2.0]))
    directions, _ = leading_directions_outside(sketch, torch.zeros(0, 3), 0.0, 2)
    torch.testing.assert_close(directions.abs(), torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    assert len(leading_directions_outside(sketch, torch.zeros(0, 3), 0.0, 0)[0]) == 0


def test_rows_of_zeros_or_twice_the_same_span_no_more() -> None:
    """Only the direction that is there is taken out."""
    sketch = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    rows = torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    directions, share = leading_directions_outside(sketch, rows, 0.0, 3)
    torch.testing.assert_close(directions.abs(), torch.eye(3)[1:])
    assert share == pytest.approx(5 / 14)


@pytest.mark.parametrize("value", [0.0, torch.inf, torch.nan])
def test_a_gradient_of_zero_or_not_finite_asks_for_nothing(value: float) -> None:
    """As a scaler's step that is skipped has it."""
    directions, share = leading_directions_outside(torch.full((2, 3), value), torch.eye(3)[:1], 0.1, 2)
    assert (directions.shape, share) == ((0, 3), 0.0)


def test_noise_has_no_direction_above_the_threshold() -> None:
    """Enough probes: a gradient without structure, wide and tall, lets nothing grow."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(500, 300, generator=generator)
    sketch = probes(500, num_probes(500, 0.1), generator).T @ gradient
    assert len(leading_directions_outside(sketch, torch.zeros(0, 300), 0.1, 8)[0]) == 0


def test_a_direction_in_noise_is_found_through_few_probes() -> None:
    """Close to the leading singular vector of the gradient itself."""
    generator = torch.Generator().manual_seed(0)
    column, row = (torch.nn.functional.normalize(torch.randn(n, generator=generator), dim=0) for n in (500, 300))
    gradient = torch.randn(500, 300, generator=generator) + 400 * torch.outer(column, row)
    sketch = probes(500, num_probes(500, 0.1), generator).T @ gradient
    directions, _ = leading_directions_outside(sketch, torch.zeros(0, 300), 0.1, 8)
    assert len(directions) == 1
    assert float((directions[0] @ row).abs()) > 0.95
