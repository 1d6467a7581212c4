"""Adaptive clipping and norm scaling on plain tensors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_cl.functional.stable_spam import (
    absolute_maxima,
    annealing_scale,
    clip_to_thresholds_,
    euclidean_norms,
    norm_factors_,
    spike_thresholds_,
)


def gradients(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Tensors of several shapes and sizes, an empty and a single one among them."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(100, 70), (3,), (0, 5), (), (17, 2, 3)]
    return [(10**row * torch.randn(shape, generator=generator)).to(dtype) for row, shape in enumerate(shapes)]


@pytest.mark.parametrize("foreach", [False, True])
def test_numbers_of_tensors(foreach: bool) -> None:
    """Largest magnitude and norm of each, 0 for the empty one; also where the largest is negative."""
    tensors = gradients()
    tensors[1] = torch.tensor([1.0, -7.0, 2.0])
    maxima = absolute_maxima(tensors, torch.float32, foreach=foreach)
    assert maxima.tolist() == [max((abs(x) for x in t.flatten().tolist()), default=0.0) for t in tensors]
    norms = euclidean_norms(tensors, torch.float32, foreach=foreach)
    expected = [math.sqrt(math.fsum(x * x for x in t.flatten().tolist())) for t in tensors]
    assert norms.tolist() == pytest.approx(expected, rel=1e-6)
    assert absolute_maxima(tensors[2:3], torch.float32, foreach=foreach).tolist() == [0.0]
    assert euclidean_norms(tensors[2:3], torch.float32, foreach=foreach).tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_together_and_one_by_one_to_the_bit(dtype: torch.dtype) -> None:
    """The same bits, in the dtype that was asked for."""
    wide = torch.promote_types(dtype, torch.float32)
    for measure in (absolute_maxima, euclidean_norms):
        together, alone = (measure(gradients(dtype), wide, foreach=foreach) for foreach in (True, False))
        assert together.dtype == wide
        assert torch.equal(together, alone)


def test_norms_of_half_precision_are_not_rounded() -> None:
    """In bfloat16 this one would be 256."""
    found = euclidean_norms([torch.ones(65_600, dtype=torch.bfloat16)], torch.float32)
    assert found.item() == pytest.approx(math.sqrt(65_600))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_seen(value: float) -> None:
    """By the maximum, in both ways."""
    for foreach in (False, True):
        found = absolute_maxima([torch.tensor([1.0, value])], torch.float32, foreach=foreach).item()
        assert found == value or (math.isnan(found) and math.isnan(value))


def test_thresholds_are_weighted_means() -> None:
    """Bias-corrected: the weighted mean of all maxima so far, each decayed by its age."""
    averages, history = torch.zeros(2, dtype=torch.float64), []
    for step in range(1, 40):
        history.append(torch.tensor([float(step), 5.0], dtype=torch.float64))
        found = spike_thresholds_(averages, history[-1], step=step, gamma3=0.9)
        weights = [0.9 ** (step - row - 1) for row in range(step)]
        expected = sum(w * h for w, h in zip(weights, history, strict=True)) / sum(weights)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_only_what_exceeds_is_scaled() -> None:
    """By threshold over maximum, with its sign; what equals the threshold stays, and so do tensors below theirs."""
    spiked, calm = torch.tensor([[2.0, -2.5], [8.0, -10.0]]), torch.tensor([1.0, -3.0])
    clip_to_thresholds_([spiked, calm], torch.tensor([10.0, 3.0]), torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(spiked, torch.tensor([[2.0, -0.5], [1.6, -2.0]]))
    assert calm.tolist() == [1.0, -3.0]


def test_clipped_where_it_lies() -> None:
    """A gradient that is a view of another tensor, and not contiguous: the tensor changes."""
    base = torch.tensor([[1.0, 100.0], [1.0, -50.0], [1.0, 1.0]])
    clip_to_thresholds_([base[:, 1]], torch.tensor([100.0]), torch.tensor([10.0]))
    torch.testing.assert_close(base, torch.tensor([[1.0, 10.0], [1.0, -5.0], [1.0, 1.0]]))


def test_shards_are_clipped_by_the_whole() -> None:
    """A part of a tensor with the maximum of all of it."""
    part = torch.tensor([6.0, 1.0])
    clip_to_thresholds_([part], torch.tensor([12.0]), torch.tensor([3.0]))
    torch.testing.assert_close(part, torch.tensor([1.5, 1.0]))


def test_norm_factors() -> None:
    """Bias-corrected first over root of second moment of norms, over the norm."""
    first, second = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    history: list[Tensor] = []
    for step in range(1, 30):
        history.append(torch.tensor([float(step), 1000.0 if step == 20 else 1.0], dtype=torch.float64))
        found = norm_factors_(first, second, history[-1], step=step, gammas=(0.7, 0.9), eps=0.125)
        means = []
        for gamma, power in ((0.7, 1), (0.9, 2)):
            weights = [gamma ** (step - row - 1) for row in range(step)]
            means.append(sum(w * h**power for w, h in zip(weights, history, strict=True)) / sum(weights))
        expected = means[0] / (means[1].sqrt() + 0.125) / history[-1]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_zeros_stay_zeros_and_count() -> None:
    """A gradient of zeros keeps its factor of 1, from the first on, and lowers the averages."""
    first, second = torch.zeros(1), torch.zeros(1)
    assert norm_factors_(first, second, torch.zeros(1), step=1, gammas=(0.7, 0.9), eps=1e-8).tolist() == [1.0]
    norm_factors_(first, second, torch.ones(1), step=2, gammas=(0.7, 0.9), eps=1e-8)
    assert norm_factors_(first, second, torch.zeros(1), step=3, gammas=(0.7, 0.9), eps=1e-8).tolist() == [1.0]
    assert first.item() == pytest.approx(0.3 * 0.7)
    assert second.item() == pytest.approx(0.1 * 0.9)


def test_annealing_is_half_a_cosine() -> None:
    """1 at the start, 3/4 half-way, 1/2 at the end and from there on."""
    assert annealing_scale(0, 99) == 1.0
    assert annealing_scale(25, 99) == pytest.approx(0.75 + 0.25 * math.sqrt(0.5))
    assert annealing_scale(50, 99) == pytest.approx(0.75)
    assert [annealing_scale(step, 99) for step in (100, 150, 200)] == [0.5] * 3
