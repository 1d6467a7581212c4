"""Soft thresholds, when they act, and what they leave."""

from __future__ import annotations

import pytest
import torch

from lightning_cl.functional import soft_threshold_, surviving_factors, threshold_at


def test_soft_threshold_is_the_proximal_step() -> None:
    """It minimises ½(v - w)² + κ|v|; what is above κ keeps more than 0, unlike with a threshold of 2κ."""
    gates, threshold = torch.linspace(-1, 1, 41, dtype=torch.float64), 0.33
    candidates = torch.linspace(-1, 1, 20001, dtype=torch.float64)[:, None]
    best = candidates[(0.5 * (candidates - gates).square() + threshold * candidates.abs()).argmin(0), 0]
    found = gates.clone()
    soft_threshold_([found], threshold)
    torch.testing.assert_close(found, best, atol=1e-4, rtol=0)
    assert ((found == 0) == (gates.abs() <= threshold)).all()


def test_a_threshold_of_zero_changes_nothing() -> None:
    """To the bit."""
    gates = torch.randn(9)
    found = gates.clone()
    soft_threshold_([found], 0.0)
    assert torch.equal(found, gates)


@pytest.mark.parametrize("dense", [0.0, 0.5, 0.9])
def test_threshold_grows_from_the_dense_phase_to_the_last_step(dense: float) -> None:
    """Linear in between."""
    values = [threshold_at(step, 10, dense, 0.2) for step in range(1, 11)]
    start = round(10 * dense)
    assert values[:start] == [0.0] * start
    assert values[start:] == pytest.approx([0.2 * (i + 1) / (10 - start) for i in range(10 - start)])
    assert threshold_at(15, 10, dense, 0.2) == pytest.approx(0.2)


def test_survivors_keep_the_product() -> None:
    """Ranks at 0 go, negative gates stay."""
    down, up, gates = torch.randn(4, 6), torch.randn(5, 4), torch.tensor([0.5, 0.0, -2.0, 0.0])
    new_down, new_up = surviving_factors(down, up, gates)
    assert (new_down.shape, new_up.shape) == ((2, 6), (5, 2))
    torch.testing.assert_close(new_up @ new_down, up @ gates.diag() @ down)
    assert surviving_factors(down, up, torch.zeros(4))[1].shape == (5, 0)
