"""Probability, truth ratio, exact memorisation and extraction strength by numbers worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_cl.metrics.unlearning import (
    exact_memorization,
    extraction_strength,
    probability,
    truth_ratio,
    truth_ratio_score,
)

V = 4


def says(rows: list[list[int]]) -> Tensor:
    """Return logits ``[B, T, V]`` whose largest entry is the given token."""
    return 5 * torch.eye(V)[torch.tensor(rows)]


def sequences(probabilities: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Return logits and labels of an answer of token 0 whose tokens have these probabilities, after two of prompt."""
    rows = torch.tensor([[0.25, *row, 0.25] for row in probabilities])
    logits = torch.stack([rows, *[(1 - rows) / (V - 1)] * (V - 1)], dim=-1).log()
    labels = torch.zeros(rows.shape, dtype=torch.int64)
    labels[:, :2] = -100
    return logits, labels


def test_probability_is_the_geometric_mean_over_supervised_tokens() -> None:
    """Of 0.5 and 0.125, whatever the prompt and the positions that predict nothing hold."""
    logits, labels = sequences([[0.5, 0.125]])
    torch.testing.assert_close(probability(logits, labels), torch.tensor([0.25]))
    logits[:, [0, -1]] = torch.nan
    torch.testing.assert_close(probability(logits, labels), torch.tensor([0.25]))


def test_probability_counts_after_the_shift() -> None:
    """A label on the first token is predicted by nothing: it is in neither the sum nor the count."""
    logits, labels = sequences([[0.5, 0.125]])
    labels[:, 0] = 3
    torch.testing.assert_close(probability(logits, labels), torch.tensor([0.25]))


def test_probability_of_half_precision_is_computed_in_float32() -> None:
    """The result is float32 and equals that of the rounded logits."""
    logits, labels = sequences([[0.5, 0.125], [0.9, 0.7]])
    result = probability(logits.bfloat16(), labels)
    assert result.dtype == torch.float32
    assert torch.equal(result, probability(logits.bfloat16().float(), labels))


@pytest.mark.parametrize("score", [probability, exact_memorization, extraction_strength])
def test_rows_without_supervision_are_nan_and_padding_changes_nothing(score) -> None:
    """A row says nothing without a token, and the same with more padding."""
    logits, labels = sequences([[0.5, 0.125], [0.9, 0.7]])
    labels[1] = -100
    padded = torch.cat([logits, torch.randn(2, 3, V)], dim=1)
    longer = torch.cat([labels, torch.full((2, 3), -100)], dim=1)
    expected = score(logits, labels)
    assert expected.isnan().tolist() == [False, True]
    torch.testing.assert_close(score(padded, longer), expected, equal_nan=True)


@pytest.mark.parametrize("score", [probability, exact_memorization, extraction_strength])
def test_shapes_that_do_not_fit_are_refused(score) -> None:
    """By the shift rule's own message."""
    with pytest.raises(ValueError, match="do not fit labels"):
        score(torch.zeros(2, 3, V), torch.zeros(2, 4, dtype=torch.int64))


def test_exact_memorization_counts_the_last_token() -> None:
    """Two of three; code that drops the last one would say 1."""
    labels = torch.tensor([[-100, 1, 2, 3]])
    torch.testing.assert_close(exact_memorization(says([[1, 2, 0, 3]]), labels), torch.tensor([2 / 3]))


def test_exact_memorization_of_classes_is_the_accuracy() -> None:
    """A class is one token, predicted in place."""
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9]])
    torch.testing.assert_close(exact_memorization(logits, torch.tensor([0, 1, -100])).nanmean(), torch.tensor(0.5))


@pytest.mark.parametrize(
    ("said", "strength"),
    [
        ([1, 2, 3, 1, 0], 1.0),  # the whole of it
        ([0, 2, 3, 1, 0], 0.75),  # all but the first
        ([1, 2, 0, 1, 0], 0.25),  # the last only: what is right before a miss does not count
        ([1, 2, 3, 0, 0], 0.0),  # the last one wrong: a true zero
    ],
)
def test_extraction_strength_is_the_right_suffix(said, strength) -> None:
    """1 - k / n with k the length of the shortest prefix after which all is right."""
    labels = torch.tensor([[-100, 1, 2, 3, 1]])
    torch.testing.assert_close(extraction_strength(says([said]), labels), torch.tensor([strength]))


def test_extraction_strength_reads_past_unsupervised_tokens() -> None:
    """A miss between two answers that nobody asked for breaks nothing, and counts for nothing."""
    labels = torch.tensor([[-100, 1, -100, 3, 1]])
    torch.testing.assert_close(extraction_strength(says([[1, 2, 3, 1, 0]]), labels), torch.tensor([1.0]))
    torch.testing.assert_close(extraction_strength(says([[0, 2, 3, 1, 0]]), labels), torch.tensor([2 / 3]))


def test_truth_ratio_by_both_means() -> None:
    """Right 0.5; wrong 0.4 and 0.1: their geometric mean is 0.2, the arithmetic one 0.25."""
    right, wrong = -torch.tensor([0.5, 0.5]).log(), -torch.tensor([[0.4, 0.1], [0.5, 0.5]]).log()
    geometric, arithmetic = truth_ratio(right, wrong), truth_ratio(right, wrong, mean="arithmetic")
    torch.testing.assert_close(geometric, torch.tensor([0.4, 1.0], dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(arithmetic, torch.tensor([0.5, 1.0], dtype=torch.float64), rtol=1e-6, atol=0)


def test_truth_ratio_of_tiny_probabilities() -> None:
    """Both probabilities underflow in float32, their ratio does not; a sum with 1e-10 below would be 0."""
    ratio = truth_ratio(torch.tensor([200.0]), torch.tensor([[201.0]]))
    torch.testing.assert_close(ratio, torch.tensor([-1.0], dtype=torch.float64).exp())


def test_truth_ratio_refuses() -> None:
    """Unknown means, shapes that do not fit, no wrong answer, and negative ratios."""
    with pytest.raises(ValueError, match=r"mean.*'harmonic'"):
        truth_ratio(torch.zeros(2), torch.zeros(2, 3), mean="harmonic")
    for wrong in (torch.zeros(3, 2), torch.zeros(2, 0), torch.zeros(2)):
        with pytest.raises(ValueError, match="J of at least 1"):
            truth_ratio(torch.zeros(2), wrong)
    with pytest.raises(ValueError, match=r"kind.*'all'"):
        truth_ratio_score(torch.ones(1), "all")
    with pytest.raises(ValueError, match="not its logarithm"):
        truth_ratio_score(torch.tensor([-0.5]), "forget")


def test_truth_ratio_scores() -> None:
    """Forget: min(R, 1/R); retain: max(0, 1 - R); defined at 0."""
    ratio = torch.tensor([0.0, 0.25, 1.0, 4.0])
    assert truth_ratio_score(ratio, "forget").tolist() == [0.0, 0.25, 1.0, 0.25]
    assert truth_ratio_score(ratio, "retain").tolist() == [1.0, 0.75, 0.0, 0.0]
