"""ROUGE-L: that it is per text, of the value named, and stemmed."""

from __future__ import annotations

import pytest
import torch

from lightning_cl.metrics.unlearning import rouge_l

PREDICTIONS = ["Ada was born in Rome.", "nothing at all"]
TARGETS = ["She was born in ROME in 1950", "a poet"]


def test_values_by_hand() -> None:
    """The common subsequence is `was born in rome`: 4 of 7 and 4 of 5 words; the second pair shares nothing."""
    recall, precision, f = (
        rouge_l(PREDICTIONS, TARGETS, value=value, stem=False) for value in ("recall", "precision", "fmeasure")
    )
    torch.testing.assert_close(recall, torch.tensor([4 / 7, 0.0]))
    torch.testing.assert_close(precision, torch.tensor([4 / 5, 0.0]))
    torch.testing.assert_close(f, torch.tensor([2 * (4 / 7) * (4 / 5) / (4 / 7 + 4 / 5), 0.0]))


def test_stems() -> None:
    """`painted` and `paints` are one word to it, and an empty prediction scores 0."""
    pytest.importorskip("nltk", reason="needs the extra `metrics`")
    pairs = ["she painted", ""], ["she paints", "something"]
    assert rouge_l(*pairs).tolist() == [1, 0]
    assert rouge_l(*pairs, stem=False).tolist() == [0.5, 0]


def test_refuses() -> None:
    """No text, other numbers of texts, an unknown value."""
    with pytest.raises(ValueError, match="got 2 and 1"):
        rouge_l(PREDICTIONS, TARGETS[:1])
    with pytest.raises(ValueError, match="at least one"):
        rouge_l([], [])
    with pytest.raises(ValueError, match=r"value.*'f1'"):
        rouge_l(PREDICTIONS, TARGETS, value="f1")
