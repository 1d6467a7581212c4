"""The deviation of a loss from those before it."""

from __future__ import annotations

import math

import pytest

from lightning_cl.functional import loss_deviation


def test_of_a_normal_distribution_it_counts_standard_deviations() -> None:
    """Of evenly spaced quantiles with mean 3 and deviation 0.5, 5 lies 4 deviations above."""
    from statistics import NormalDist

    normal = NormalDist(3.0, 0.5)
    history = [normal.inv_cdf((rank + 0.5) / 1001) for rank in range(1001)]
    assert loss_deviation(5.0, history) == pytest.approx(4.0, rel=0.01)
    assert loss_deviation(2.0, history) == pytest.approx(-2.0, rel=0.01)


def test_spikes_in_the_history_hide_none() -> None:
    """With 2 of 9 losses at 100, median and scale are those of 1, 2, 3 and their like."""
    history = [1.0, 2.0, 3.0, 2.0, 1.0, 3.0, 2.0, 100.0, 100.0]
    # median 2, absolute deviations 1 0 1 0 1 1 0 98 98: median 1
    assert loss_deviation(12.0, history) == pytest.approx(10 / 1.4826)


def test_losses_that_hardly_differ_have_a_least_scale() -> None:
    """A hundredth of the median, whatever its sign."""
    assert loss_deviation(2.1, [2.0] * 20) == pytest.approx(5.0)
    assert loss_deviation(-1.9, [-2.0] * 20) == pytest.approx(5.0)
    # above it, the losses' own scale holds
    assert loss_deviation(2.1, [1.9, 2.1] * 10) == pytest.approx(0.1 / (0.1 * 1.4826))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_infinitely_far(loss: float) -> None:
    """Also below all others, and before there are any."""
    assert loss_deviation(loss, [1.0, 2.0]) == math.inf
    assert loss_deviation(loss, []) == math.inf


def test_losses_of_zero() -> None:
    """Without any scale every other loss is infinitely far."""
    assert [loss_deviation(loss, [0.0] * 3) for loss in (0.0, 1e-9, -1e-9)] == [0.0, math.inf, -math.inf]
