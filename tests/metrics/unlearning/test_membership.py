"""Membership scores, their sign, and the AUC beside the retrained model's."""

from __future__ import annotations

import zlib

import pytest
import torch

from lightning_cl.metrics.unlearning import (
    loss_score,
    membership_auc,
    min_k_plus_plus_score,
    min_k_score,
    zlib_score,
)


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits ``[3, 9, 7]`` and labels with 6, 2 and no supervised tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, 9, 7, generator=generator)
    labels = torch.randint(0, 7, (3, 9), generator=generator)
    labels[0, :3] = -100
    labels[1, :7] = -100
    labels[2, 1:] = -100
    return logits, labels


def test_loss_is_the_mean_over_the_row() -> None:
    """By torch's own cross entropy, row by row."""
    logits, labels = batch()
    expected = [torch.nn.functional.cross_entropy(logits[i, :-1], labels[i, 1:]) for i in range(2)]
    result = loss_score(logits, labels)
    torch.testing.assert_close(result[:2], torch.stack(expected))
    assert result[2].isnan()


def test_zlib_divides_by_the_compressed_bytes() -> None:
    """UTF-8, a length for each row."""
    logits, labels = batch()
    texts = ["aaaaaaaaaaaaaaaaaaaaaaaa", "été à Zürich", ""]
    sizes = torch.tensor([len(zlib.compress(text.encode())) for text in texts])
    torch.testing.assert_close(zlib_score(logits, labels, texts), loss_score(logits, labels) / sizes, equal_nan=True)
    with pytest.raises(ValueError, match="2 texts for 3 rows"):
        zlib_score(logits, labels, texts[:2])


@pytest.mark.parametrize(("k", "counts"), [(0.4, (2, 1)), (0.5, (3, 1)), (0.01, (1, 1)), (1.0, (6, 2))])
def test_min_k_means_the_lowest_tokens(k, counts) -> None:
    """max(1, floor(n k)) of them: never none."""
    logits, labels = batch()
    result = min_k_score(logits, labels, k=k)
    for row, count in enumerate(counts):
        losses = torch.nn.functional.cross_entropy(logits[row, :-1], labels[row, 1:], reduction="none")
        torch.testing.assert_close(result[row], losses.topk(count).values.mean())
    assert result[2].isnan()


def test_min_k_plus_plus_by_a_plain_loop() -> None:
    """Mean and deviation of the log-probabilities under the model itself."""
    logits, labels = batch(1)
    result = min_k_plus_plus_score(logits, labels, k=0.4)
    for row, count in enumerate((2, 1)):
        scores = []
        for position in range(8):
            target = int(labels[row, position + 1])
            if target == -100:
                continue
            p = logits[row, position].softmax(-1)
            mean = float((p * p.log()).sum())
            deviation = float((p * (p.log() - mean) ** 2).sum()) ** 0.5
            scores.append((float(p[target].log()) - mean) / deviation)
        assert float(result[row]) == pytest.approx(-sum(sorted(scores)[:count]) / count, rel=1e-5)
    assert result[2].isnan()


def test_min_k_plus_plus_of_extreme_distributions() -> None:
    """A uniform one has no deviation, a masked token no probability: both give numbers."""
    uniform = min_k_plus_plus_score(torch.zeros(1, 4), torch.tensor([2]))
    torch.testing.assert_close(uniform, torch.zeros(1), atol=1e-3, rtol=0)
    masked = torch.tensor([[0.7, 0.3, 0.0]]).log()
    torch.testing.assert_close(min_k_plus_plus_score(masked, torch.tensor([1])), torch.tensor([(0.7 / 0.3) ** 0.5]))


def test_scores_refuse() -> None:
    """Shares outside of (0, 1], shapes that do not fit."""
    logits, labels = batch()
    for k in (0.0, 1.5):
        for score in (min_k_score, min_k_plus_plus_score):
            with pytest.raises(ValueError, match="`k` must be above 0 and at most 1"):
                score(logits, labels, k=k)
    with pytest.raises(ValueError, match="do not fit labels"):
        loss_score(logits, labels[:, 1:])


@pytest.mark.parametrize("name", ["loss", "zlib", "min_k", "min_k_plus_plus"])
def test_high_means_non_member(name) -> None:
    """A model sure of its sequences gives all scores lower on them than on others."""
    labels = torch.randint(0, 5, (20, 8))
    logits = 3 * torch.eye(5)[labels.roll(-1, dims=1)] + torch.randn(20, 8, 5)
    other = torch.randint(0, 5, (20, 8))
    texts = ["some text"] * 20
    scores = {
        "loss": loss_score,
        "zlib": lambda x, y: zlib_score(x, y, texts),
        "min_k": min_k_score,
        "min_k_plus_plus": min_k_plus_plus_score,
    }
    assert membership_auc(scores[name](logits, labels), scores[name](logits, other)).auc > 0.95


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_auc_is_that_of_scikit_learn(scale) -> None:
    """With ties, and with scores so large that a sigmoid would tie them."""
    metrics = pytest.importorskip("sklearn.metrics", reason="needs the extra `metrics`")
    forget = scale * (torch.randint(0, 9, (60,)) + 0.25)
    holdout = scale * (torch.randint(0, 12, (45,)) + 0.25)
    expected = metrics.roc_auc_score([0] * 60 + [1] * 45, torch.cat([forget, holdout]).numpy())
    assert membership_auc(forget, holdout).auc == pytest.approx(expected, abs=1e-6)
    forget, holdout = torch.randn(200), torch.randn(200) + 1
    expected = metrics.roc_auc_score([0] * 200 + [1] * 200, torch.cat([forget, holdout]).numpy())
    assert membership_auc(scale * forget, scale * holdout).auc == pytest.approx(expected, abs=1e-6)


def test_auc_at_its_ends() -> None:
    """1: members are recognised; 0: over-forgotten; equal sets: one half."""
    low, high = torch.tensor([0.1, 0.2]), torch.tensor([30.0, 40.0])
    assert membership_auc(low, high).auc == 1
    assert membership_auc(high, low).auc == 0
    assert membership_auc(low, low).auc == 0.5


def test_retrained_auc_stands_beside() -> None:
    """And their difference; without it nothing is claimed."""
    low, high = torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4])
    result = membership_auc(low, high, retrained_forget_scores=low, retrained_holdout_scores=low)
    assert (result.auc, result.retrained_auc, result.difference) == (1.0, 0.5, 0.5)
    assert membership_auc(low, high) == (1.0, None)
    assert membership_auc(low, high).difference is None


def test_auc_refuses() -> None:
    """Nothing, NaN, matrices, and one of the retrained model's two without the other."""
    good = torch.tensor([0.1, 0.2])
    with pytest.raises(ValueError, match=r"`forget_scores` must be Tensor.N. with at least one"):
        membership_auc(torch.zeros(0), good)
    with pytest.raises(ValueError, match=r"`holdout_scores` must be Tensor.N."):
        membership_auc(good, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="`holdout_scores` holds 1 NaN"):
        membership_auc(good, torch.tensor([0.1, torch.nan]))
    with pytest.raises(ValueError, match="go together"):
        membership_auc(good, good, retrained_forget_scores=good)
    with pytest.raises(ValueError, match="`retrained_holdout_scores` holds 2 NaN"):
        membership_auc(good, good, retrained_forget_scores=good, retrained_holdout_scores=good * torch.nan)
