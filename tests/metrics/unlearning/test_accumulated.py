"""The accumulated metrics: batches of any size, repeated samples, two ranks, one of them empty."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_cl.metrics.unlearning import (
    ExactMemorization,
    ExtractionStrength,
    ForgetQuality,
    MembershipAUC,
    Probability,
    SampleScores,
    TruthRatio,
    exact_memorization,
    extraction_strength,
    forget_quality,
    membership_auc,
    probability,
)
from ranks import Ranks

PAIRS = [
    (Probability, probability),
    (ExactMemorization, exact_memorization),
    (ExtractionStrength, extraction_strength),
]


def batch() -> tuple[Tensor, Tensor]:
    """Return logits ``[7, 5, 6]`` and labels, the model right half of the time, one row with nothing supervised."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 6, (7, 5), generator=generator)
    labels[:, :2] = -100
    labels[3] = -100
    logits = torch.randn(7, 5, 6, generator=generator)
    right = torch.rand(7, 5, generator=generator) < 0.6
    return logits + 5 * right.unsqueeze(-1) * torch.eye(6)[labels.roll(-1, 1).clamp(min=0)], labels


@pytest.mark.parametrize(("metric_class", "function"), PAIRS)
def test_means_over_samples_however_batched(metric_class, function) -> None:
    """Each sample weighs the same, those without a token nothing, and repeated ones count once."""
    logits, labels = batch()
    expected = function(logits, labels).nanmean()
    assert 0 < expected < 1
    metric = metric_class()
    for part in (slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 7)):
        metric.update(logits[part], labels[part])
    torch.testing.assert_close(metric.compute(), expected)
    metric.reset()
    ids = torch.arange(7) + 10
    for part in (slice(0, 5), slice(2, 7), slice(0, 1)):
        metric.update(logits[part], labels[part], ids[part])
    torch.testing.assert_close(metric.compute(), expected)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_nothing_is_nan() -> None:
    """Of no sample there is no mean, no score and no test."""
    assert Probability().compute().isnan()
    assert SampleScores().compute().shape == (0,)
    with pytest.raises(ValueError, match="`scores` must be"):
        ForgetQuality(torch.zeros(3)).compute()
    with pytest.raises(ValueError, match="`forget_scores` must be"):
        MembershipAUC().compute()


def test_scores_come_in_the_order_of_identities() -> None:
    """So that two models can be compared sample by sample, whatever order they read in."""
    scores = SampleScores()
    scores.update(torch.tensor([0.5, torch.nan, 0.125]), torch.tensor([2**40 + 1, 5, 3]))
    scores.update(torch.tensor([0.25]), torch.tensor([2**40]))
    assert scores.compute().tolist() == [0.125, 0.25, 0.5]


def test_scores_refuse() -> None:
    """Shapes, identities that a float64 does not hold, and identities for some batches only."""
    scores = SampleScores()
    with pytest.raises(ValueError, match=r"shape \(2, 2\)"):
        scores.update(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"shape \(2,\) and `ids` of shape \(3,\)"):
        scores.update(torch.zeros(2), torch.zeros(3, dtype=torch.int64))
    for wrong in (-1, 2**53):
        with pytest.raises(ValueError, match="from 0 to"):
            scores.update(torch.zeros(1), torch.tensor([wrong]))
    scores.reset()
    scores.update(torch.zeros(1))
    scores.update(torch.zeros(1), torch.tensor([0]))
    with pytest.raises(ValueError, match="for all or for none"):
        scores.compute()


def test_truth_ratio_of_both_kinds() -> None:
    """0.2 / 0.5 geometric and 0.25 / 0.5 arithmetic, as TOFU averages them."""
    right, wrong = -torch.tensor([0.5]).log(), -torch.tensor([[0.4, 0.1]]).log()
    cases = [("forget", "geometric", 0.4), ("retain", "geometric", 0.6), ("forget", "arithmetic", 0.5)]
    for kind, mean, value in cases:
        metric = TruthRatio(kind, mean=mean)
        metric.update(right, wrong)
        metric.update(right, wrong)
        assert metric.compute().item() == pytest.approx(value)
    with pytest.raises(ValueError, match=r"kind.*'all'"):
        TruthRatio("all")
    with pytest.raises(ValueError, match=r"mean.*'median'"):
        TruthRatio("forget", mean="median")


def test_membership_takes_settings_and_resets() -> None:
    """The retrained model's beside it where it was given; an AUC outside of [0, 1] and labels of ints are refused."""
    metric = MembershipAUC(retrained_auc=0.625)
    metric.update(torch.tensor([0.1, 0.9]), torch.tensor([True, False]))
    assert {name: value.item() for name, value in metric.compute().items()} == {"auc": 1.0, "retrained_auc": 0.625}
    metric.reset()
    metric.update(torch.tensor([0.9, 0.1]), torch.tensor([True, False]))
    assert metric.compute()["auc"] == 0
    with pytest.raises(ValueError, match="`retrained_auc` must be from 0 to 1"):
        MembershipAUC(retrained_auc=1.5)
    with pytest.raises(ValueError, match="`is_forget` must be bool"):
        metric.update(torch.zeros(2), torch.tensor([0, 1]))
    only = MembershipAUC()
    only.update(torch.zeros(2), torch.tensor([True, True]))
    with pytest.raises(ValueError, match="`holdout_scores`"):
        only.compute()


def test_membership_counts_identities_by_set() -> None:
    """Row 3 of the forget set and row 3 of the held-out set are two samples; read twice each is still one."""
    metric = MembershipAUC()
    scores, forget = torch.tensor([0.1, 0.5, 0.3, 0.3]), torch.tensor([True, True, False, False])
    metric.update(scores, forget, torch.tensor([3, 4, 3, 3]))
    metric.update(scores[:1], forget[:1], torch.tensor([3]))
    assert metric.compute()["auc"] == membership_auc(scores[:2], scores[2:3]).auc == 0.5


def test_forget_quality_checks_its_reference() -> None:
    """At construction, not after the epoch."""
    with pytest.raises(ValueError, match="`retrained_scores` holds 1 NaN"):
        ForgetQuality(torch.tensor([torch.nan]))


def measure(parts: list[slice]) -> dict[str, Any]:
    """Return all metrics over the parts that this rank reads; a rank may read nothing."""
    logits, labels = batch()
    part = parts[torch.distributed.get_rank()]
    ids, scores = torch.arange(7)[part], torch.linspace(0, 3, 7)[part]
    metrics: dict[str, Any] = {cls.__name__: cls() for cls, _ in PAIRS}
    metrics["quality"] = ForgetQuality(torch.linspace(1, 2, 5))
    metrics["auc"] = MembershipAUC()
    if len(ids):
        for cls, _ in PAIRS:
            metrics[cls.__name__].update(logits[part], labels[part], ids)
        metrics["quality"].update(scores, ids)
        metrics["auc"].update(scores, torch.tensor([True, True, False, True, False, False, False])[part], ids)
    with warnings.catch_warnings():
        # what torchmetrics says on a rank without a sample
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
        return {name: metric.compute() for name, metric in metrics.items()}


@pytest.mark.distributed
def test_two_ranks_equal_one_process() -> None:
    """With a sample that both read, with unlike shares, and with a rank that reads nothing."""
    pytest.importorskip("scipy", reason="needs the extra `metrics`")
    logits, labels = batch()
    scores = torch.linspace(0, 3, 7)
    forget = torch.tensor([True, True, False, True, False, False, False])
    ranks = Ranks(2)
    for parts in ([slice(0, 4), slice(3, 7)], [slice(0, 7), slice(0, 0)]):
        for found in ranks.run(measure, parts):
            for cls, function in PAIRS:
                torch.testing.assert_close(found[cls.__name__], function(logits, labels).nanmean())
            quality = forget_quality(scores, torch.linspace(1, 2, 5))
            assert found["quality"]["log10_p"].item() == pytest.approx(quality.log10_p)
            assert found["quality"]["statistic"].item() == pytest.approx(quality.statistic)
            assert found["auc"]["auc"].item() == pytest.approx(membership_auc(scores[forget], scores[~forget]).auc)
    ranks.close()
