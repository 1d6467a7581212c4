"""What is supervised, and the three reductions, against sums by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_cl.functional.unlearning import (
    connected_zero,
    mean_over_rows,
    shifted,
    supervised_nll,
    supervised_rows,
    token_nll,
)

LOGITS = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([[-100, -100, 3, 6, -100], [2, -100, -100, -100, -100], [1, 0, -100, 5, 4]])
# the first label of a row is predicted by nothing
SUPERVISED = [[(1, 3), (2, 6)], [], [(0, 0), (2, 5), (3, 4)]]


def by_hand(row: int) -> list[float]:
    """The negative log-likelihoods of a row's supervised tokens."""
    return [
        math.log(sum(math.exp(z) for z in LOGITS[row, t].tolist())) - LOGITS[row, t, y].item()
        for t, y in SUPERVISED[row]
    ]


def test_shift_of_sequences() -> None:
    """The label at t + 1 belongs to the scores at t."""
    logits, targets = shifted(LOGITS, LABELS)
    assert torch.equal(logits, LOGITS[:, :4])
    assert torch.equal(targets, LABELS[:, 1:])
    assert logits.data_ptr() == LOGITS.data_ptr()


def test_classes_are_not_shifted() -> None:
    """One supervised token per row, predicted in place; -100 leaves a row out."""
    logits, labels = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([1, -100])
    assert [part.shape for part in shifted(logits, labels)] == [(2, 1, 2), (2, 1)]
    first = math.log1p(math.exp(-2))
    expected = torch.tensor([first, 0.0])
    torch.testing.assert_close(token_nll(logits, labels, reduction="sequence_sum"), expected)
    torch.testing.assert_close(token_nll(logits, labels, reduction="token_mean"), expected[0])
    assert supervised_rows(labels).tolist() == [True, False]


def test_reductions_by_hand() -> None:
    """A mean over tokens of the batch, and a sum and a mean for each row; a row of none is 0."""
    rows = [by_hand(row) for row in range(3)]
    every = [value for row in rows for value in row]
    torch.testing.assert_close(supervised_nll(LOGITS, LABELS), torch.tensor(every))
    found = {name: token_nll(LOGITS, LABELS, reduction=name) for name in ("sequence_sum", "sequence_mean")}
    torch.testing.assert_close(found["sequence_sum"], torch.tensor([sum(row) for row in rows]))
    torch.testing.assert_close(found["sequence_mean"], torch.tensor([sum(row) / max(len(row), 1) for row in rows]))
    token_mean = token_nll(LOGITS, LABELS, reduction="token_mean")
    torch.testing.assert_close(token_mean, torch.tensor(sum(every) / len(every)))
    assert supervised_rows(LABELS).tolist() == [True, False, True]


def test_padding_on_the_right_changes_nothing() -> None:
    """Whatever the scores are there."""
    padded = torch.cat([LOGITS, torch.full((3, 2, 7), 50.0)], dim=1)
    labels = pad(LABELS, (0, 2), value=-100)
    for reduction in ("token_mean", "sequence_sum", "sequence_mean"):
        expected = token_nll(LOGITS, LABELS, reduction=reduction)
        torch.testing.assert_close(token_nll(padded, labels, reduction=reduction), expected, rtol=0, atol=0)


def test_splitting_a_batch_changes_no_row() -> None:
    """Of the token mean the parts weigh by their tokens."""
    for reduction in ("sequence_sum", "sequence_mean"):
        parts = [token_nll(LOGITS[i : i + 1], LABELS[i : i + 1], reduction=reduction) for i in range(3)]
        torch.testing.assert_close(torch.cat(parts), token_nll(LOGITS, LABELS, reduction=reduction))
    head, tail = (token_nll(LOGITS[r], LABELS[r], reduction="token_mean") for r in (slice(0, 1), slice(1, 3)))
    torch.testing.assert_close((2 * head + 3 * tail) / 5, token_nll(LOGITS, LABELS, reduction="token_mean"))


def test_unsupervised_scores_have_no_gradient() -> None:
    """Not even where they are no numbers: a position that nobody asks about cannot spoil a step."""
    logits = LOGITS.clone()
    logits[1] = torch.nan
    logits[0, 4] = torch.inf
    logits.requires_grad_()
    token_nll(logits, LABELS, reduction="sequence_mean").sum().backward()
    supervised = torch.zeros(3, 5, dtype=torch.bool)
    for row, tokens in enumerate(SUPERVISED):
        for t, _ in tokens:
            supervised[row, t] = True
    assert logits.grad.isfinite().all()
    assert (logits.grad[~supervised] == 0).all()
    assert (logits.grad[supervised] != 0).all()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, autocast: bool) -> None:
    """Inside autocast as well: 3000 tokens of 25 nats overflow float16."""
    logits = torch.zeros(1, 3001, 2, dtype=dtype)
    logits[..., 0] = 25
    labels = torch.ones(1, 3001, dtype=torch.int64)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        found = token_nll(logits, labels, reduction="sequence_sum")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([75000.0]))


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_sum", "sequence_mean"])
def test_nothing_supervised_is_a_zero_with_a_graph(reduction: str) -> None:
    """Of sequences, of sequences of one token, and of classes; scores of no number do no harm."""
    for shape, labels in (((2, 3, 4), (2, 3)), ((2, 1, 4), (2, 1)), ((2, 4), (2,))):
        logits = torch.full(shape, torch.inf, requires_grad=True)
        found = token_nll(logits, torch.full(labels, -100), reduction=reduction)
        assert (found == 0).all()
        found.sum().backward()
        assert (logits.grad == 0).all()


def test_means_over_rows() -> None:
    """Over those that count; over none a zero with a graph."""
    values = torch.tensor([2.0, torch.inf, 5.0], requires_grad=True)
    found = mean_over_rows(values, torch.tensor([True, False, True]))
    assert found == 3.5
    found.backward()
    assert values.grad.tolist() == [0.5, 0, 0.5]
    assert mean_over_rows(values.detach()[[0, 2]], None) == 3.5
    values.grad = None
    none = mean_over_rows(values, torch.zeros(3, dtype=torch.bool))
    assert none == 0
    none.backward()
    assert values.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("scores", [torch.full((2, 3), torch.nan), torch.zeros(0, 3), torch.tensor(torch.inf)])
def test_connected_zero(scores: Tensor) -> None:
    """With a gradient of 0, in float32."""
    scores = scores.bfloat16().requires_grad_()
    zero = connected_zero(scores)
    assert (zero.item(), zero.dtype) == (0.0, torch.float32)
    zero.backward()
    assert (scores.grad == 0).all()


def test_what_does_not_fit_is_refused() -> None:
    """Shapes and names."""
    with pytest.raises(ValueError, match=r"\[3, 5, 7\] do not fit labels of shape \[3, 4\]"):
        token_nll(LOGITS, LABELS[:, :4], reduction="token_mean")
    with pytest.raises(ValueError, match=r"\[3, 5, 7\] do not fit labels of shape \[3\]"):
        shifted(LOGITS, LABELS[:, 0])
    with pytest.raises(ValueError, match=r"`reduction` must be one of .*'sequence_mean', got 'sum'"):
        token_nll(LOGITS, LABELS, reduction="sum")
