"""Distances of activations, against closed forms."""

from __future__ import annotations

import pytest
import torch

from lightning_cl.functional.unlearning import activation_distance, control_vector, rmu_loss

LENGTHS = torch.tensor([5, 2, 0, 1])
MASK = torch.arange(5) < LENGTHS[:, None]


def test_control_vector_has_its_norm_and_its_seed():
    """In the positive orthant, of the given length, the same for the same seed and another for another."""
    vector = control_vector(64, 6.5, seed=3)
    torch.testing.assert_close(vector.norm(), torch.tensor(6.5))
    assert bool((vector >= 0).all())
    assert torch.equal(vector, control_vector(64, 6.5, seed=3))
    # two directions of positive numbers lie close to each other, but not this close
    other = control_vector(64, 6.5, seed=4)
    assert 0.5 < float(vector @ other) / 6.5**2 < 0.95
    # nothing else that draws moves it
    torch.rand(10)
    assert torch.equal(vector, control_vector(64, 6.5, seed=3))


def test_rows_count_alike_whatever_their_length():
    """The mean over rows of each row's own mean, and not a product of means; a row of padding has no part."""
    torch.manual_seed(0)
    activations, control = torch.randn(4, 5, 3), torch.randn(3)
    rows = [(activations[b, :n] - control).square().mean() for b, n in enumerate(LENGTHS.tolist()) if n]
    expected = torch.stack(rows).mean()
    torch.testing.assert_close(rmu_loss(activations, control, MASK), expected)
    sums = ((activations - control).square().mean(-1) * MASK).sum(1)[LENGTHS > 0]
    broadcast = (sums[:, None] / LENGTHS[LENGTHS > 0][None]).mean()
    assert (broadcast - expected).abs() > 0.1


def test_padding_changes_neither_loss_nor_gradient():
    """Whatever stands there, be it infinite."""
    torch.manual_seed(0)
    activations, control = torch.randn(4, 5, 3), torch.randn(3)
    found = []
    for filler in (0.0, torch.inf):
        leaf = activations.masked_fill(~MASK[..., None], filler).requires_grad_()
        loss = rmu_loss(leaf, control, MASK)
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert found[0][1][~MASK].abs().max() == 0


def test_distance_to_a_reference_is_zero_at_it():
    """And its gradient is 2 (h - ref) / (B n D), with none for the reference."""
    torch.manual_seed(0)
    activations = torch.randn(2, 3, 4, requires_grad=True)
    assert activation_distance(activations, activations) == 0
    reference = torch.randn(2, 3, 4, requires_grad=True)
    activation_distance(activations, reference).backward()
    torch.testing.assert_close(activations.grad, (2 * (activations - reference) / (2 * 3 * 4)).detach())
    assert reference.grad is None


def test_features_of_samples_are_rows_of_one_position():
    """[B, D] without a mask, and with one over the rows."""
    activations, control = torch.tensor([[1.0, 3.0], [5.0, 5.0]]), torch.tensor([1.0, 1.0])
    assert rmu_loss(activations, control) == (2 + 16) / 2
    assert rmu_loss(activations, control, torch.tensor([True, False])) == 2


def test_nothing_to_steer_is_a_zero_with_a_graph():
    """A rank of padding goes backward like the others."""
    activations = torch.full((2, 3, 4), torch.inf, requires_grad=True)
    loss = rmu_loss(activations, torch.ones(4), torch.zeros(2, 3, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert activations.grad.abs().max() == 0


def test_half_precision_is_computed_in_float32():
    """Squares of what bfloat16 holds do not round to it."""
    activations = torch.full((1, 2, 8), 3.0, dtype=torch.bfloat16)
    loss = rmu_loss(activations, torch.full((8,), 0.01))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.tensor(2.99**2))
    one = torch.full((1, 1, 1), 1.0078125, dtype=torch.bfloat16)
    # whose square is no number of bfloat16
    assert activation_distance(one, torch.zeros_like(one)) == 1.0078125**2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h: rmu_loss(h, torch.ones(5)), r"`control` of shape \[5\] does not fit .*\[2, 3, 4\]"),
        (lambda h: activation_distance(h, h[:1]), r"`reference` of shape \[1, 3, 4\] does not fit"),
        (lambda h: rmu_loss(h, torch.ones(4), torch.ones(2, 4) > 0), r"`mask` of shape \[2, 4\] does not fit"),
        # channels of an image stand before its positions, and of what else stands there nothing is known
        (lambda h: rmu_loss(h[:, None], torch.ones(4)), r"\[2, 1, 3, 4\] are neither \[B, T, D\] nor \[B, D\]"),
    ],
)
def test_shapes_must_fit(call, message):
    """No broadcasting by accident."""
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 3, 4))
