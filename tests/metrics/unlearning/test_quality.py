"""Forget quality, utility, KLoM, recovery and revival, by hand and against scipy."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_cl.metrics.unlearning import (
    class_margins,
    forget_quality,
    klom,
    model_utility,
    recovery_ratio,
    revival,
)


def test_forget_quality_by_counting_paths() -> None:
    """Four and four that do not overlap: 2 of the C(8, 4) orders; equal samples: p = 1."""
    pytest.importorskip("scipy", reason="needs the extra `metrics`")
    apart = forget_quality(torch.arange(4.0), torch.arange(4.0) + 10)
    assert apart.log10_p == pytest.approx(math.log10(2 / 70))
    assert apart.statistic == 1
    assert forget_quality(torch.arange(4.0), torch.arange(4.0)) == (0.0, 0.0)


@pytest.mark.parametrize(("n", "m"), [(40, 40), (40, 37)])
def test_forget_quality_is_that_of_scipy(n, m) -> None:
    """The exact method, which differs from the asymptotic one at these sizes."""
    stats = pytest.importorskip("scipy.stats", reason="needs the extra `metrics`")
    first, second = torch.randn(n), torch.randn(m) + 0.7
    exact = stats.ks_2samp(first.numpy(), second.numpy(), method="exact")
    asymptotic = stats.ks_2samp(first.numpy(), second.numpy(), method="asymp")
    result = forget_quality(first, second)
    assert 10**result.log10_p == pytest.approx(exact.pvalue, rel=1e-9)
    assert 10**result.log10_p != pytest.approx(asymptotic.pvalue, rel=1e-3)
    assert result.statistic == pytest.approx(exact.statistic)
    assert forget_quality(1 / first.exp(), 1 / second.exp()).log10_p == pytest.approx(result.log10_p)


def test_forget_quality_below_the_smallest_float() -> None:
    """A finite number that sorts below all others, where the logarithm of 0 would end a plot."""
    pytest.importorskip("scipy", reason="needs the extra `metrics`")
    result = forget_quality(torch.arange(600.0), torch.arange(600.0) + 1000)
    assert result == (pytest.approx(-307.65, abs=0.01), 1.0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_forget_quality_refuses() -> None:
    """Nothing, NaN, matrices; and sizes for which scipy would quietly take another method."""
    pytest.importorskip("scipy", reason="needs the extra `metrics`")
    good = torch.arange(3.0)
    with pytest.raises(ValueError, match=r"`scores` must be Tensor.N. with at least one"):
        forget_quality(torch.zeros(0), good)
    with pytest.raises(ValueError, match="`retrained_scores` holds 1 NaN"):
        forget_quality(good, torch.tensor([0.0, torch.nan]))
    with pytest.raises(ValueError, match="No exact p-value for 50000 and 49999"):
        forget_quality(torch.arange(50000.0), torch.arange(49999.0))


def test_model_utility() -> None:
    """Harmonic, 0 with any 0, between the smallest and the largest."""
    assert model_utility([0.5, 1.0, 1.0]) == pytest.approx(3 / 4)
    assert model_utility([0.5, 0.0]) == 0
    assert model_utility([0.3]) == pytest.approx(0.3)
    for wrong in ([], [0.5, math.nan], [0.5, -0.1], [math.inf]):
        with pytest.raises(ValueError, match="`scores`"):
            model_utility(wrong)


def test_recovery_ratio() -> None:
    """None, half, all, more than all; undefined where nothing was lost."""
    values = [recovery_ratio(clean=0.75, corrupted=0.25, unlearned=score) for score in (0.25, 0.5, 0.75, 1.0, 0.0)]
    assert values == [0, 0.5, 1, 1.5, -0.5]
    with pytest.raises(ValueError, match="nothing was destroyed"):
        recovery_ratio(clean=0.5, corrupted=0.5, unlearned=0.5)
    with pytest.raises(ValueError, match="must be finite"):
        recovery_ratio(clean=0.5, corrupted=math.nan, unlearned=0.5)


def test_class_margins() -> None:
    """The value is log p / (1 - p) of the own class."""
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    p = logits.softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(class_margins(logits, labels), (p / (1 - p)).log())
    with pytest.raises(ValueError, match="from 0 to 4"):
        class_margins(logits, torch.full((6,), -100))
    for wrong in (logits[:, :1], logits[0]):
        with pytest.raises(ValueError, match="C of at least 2"):
            class_margins(wrong, labels)


def test_klom_by_hand() -> None:
    """Two bins: p = (1/2, 1/2), q = (1/4, 3/4); samples do not mix."""
    retrained = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    unlearned = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.9, 1.0]])
    result = klom(retrained, unlearned, bins=2)
    expected = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), -math.log(1e-5)]
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64))


def test_klom_keeps_the_largest_margin() -> None:
    """All retrained models at the joint maximum: in no bin they would be at no distance from anything."""
    retrained, unlearned = torch.full((3, 1), 2.0), torch.tensor([[0.0], [0.0], [2.0]])
    torch.testing.assert_close(klom(retrained, unlearned), torch.tensor([math.log(3)], dtype=torch.float64))


def test_klom_of_equal_models_clips_and_takes_the_order_given() -> None:
    """Equal constants give 0, infinite margins are cut, and the divergence is not symmetric."""
    same = torch.full((4, 2), 7.0)
    assert klom(same, same).tolist() == [0, 0]
    endless = torch.tensor([[math.inf], [0.0]])
    torch.testing.assert_close(klom(endless, endless.clamp(max=100.0)), torch.zeros(1, dtype=torch.float64))
    a, b = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [1.0]])
    torch.testing.assert_close(klom(b, a), torch.tensor([math.log(2)], dtype=torch.float64))
    assert klom(a, b).item() > 4


def test_klom_refuses() -> None:
    """Other samples, no models, NaN, settings out of range."""
    good = torch.zeros(3, 2)
    for wrong in (torch.zeros(3, 4), torch.zeros(0, 2), torch.zeros(2)):
        with pytest.raises(ValueError, match="one row for each model"):
            klom(good, wrong)
    with pytest.raises(ValueError, match="NaN"):
        klom(good, good * torch.nan)
    for setting in ({"bins": 0}, {"clip": 0.0}, {"floor": 0.0}):
        with pytest.raises(ValueError, match=f"`{next(iter(setting))}`"):
            klom(good, good, **setting)


def test_revival_is_the_most_that_came_back() -> None:
    """Over later requests, against the score right after the set's own; above the diagonal anything may stand."""
    A = torch.tensor([[0.1, torch.nan, torch.inf], [0.4, 0.2, 0.9], [0.3, 0.1, 0.0]])
    result = revival(A)
    torch.testing.assert_close(result, torch.tensor([0.3, -0.1, torch.nan]), equal_nan=True)
    assert revival(torch.tensor([[0.5]])).isnan().all()


def test_revival_of_endless_losses() -> None:
    """A negated loss may be minus infinity, which is not the mark of a missing row."""
    A = torch.tensor([[-1.0, 0.0], [-torch.inf, 0.0]])
    assert revival(A)[0] == -torch.inf


def test_revival_refuses() -> None:
    """What was not measured may have come back; and matrices that are none."""
    with pytest.raises(ValueError, match=r"A\[1, 0\].*forget set 0 was not measured after request 1"):
        revival(torch.tensor([[0.1, 0.9], [torch.nan, 0.2]]))
    for wrong in (torch.zeros(2, 3), torch.zeros(0, 0), torch.zeros(2, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"floating-point Tensor.R, R."):
            revival(wrong)
