"""NPO, SimNPO and DPO against values by hand and closed gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from forget_losses import check_half_precision, check_nothing_supervised, gradient
from lightning_cl.functional.unlearning import dpo_loss, npo_loss, npo_loss_from_logits, simnpo_loss, token_nll

GENERATOR = torch.Generator().manual_seed(1)
LOGITS, REFERENCE = 2 * torch.randn(2, 3, 5, 7, generator=GENERATOR)
LABELS = torch.tensor([[-100, -100, 3, 6, -100], [2, -100, -100, -100, -100], [1, 0, -100, 5, 4]])


def npo(logits: Tensor, labels: Tensor) -> Tensor:
    """NPO against a guess."""
    return npo_loss_from_logits(logits, torch.zeros_like(logits), labels, beta=0.4)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "npo": npo,
    "simnpo": partial(simnpo_loss, beta=2.0, delta=0.5),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def ascent_on_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient ascent on the mean over the two supervised rows of the summed loss."""
    return -token_nll(logits, labels, reduction="sequence_sum").sum() / 2


def softplus(value: float) -> float:
    """-log of the logistic function of -value."""
    return math.log1p(math.exp(value))


def test_npo_by_hand() -> None:
    """A mean over rows, with the factor 2 / beta."""
    found = npo_loss(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 4.0]), beta=0.5)
    torch.testing.assert_close(found, torch.tensor(4 * (softplus(-1.0) + softplus(1.5)) / 2))


def test_npo_at_the_reference() -> None:
    """The value is 2 ln 2 / beta, and the gradient that of ascent on the summed loss."""
    found = npo_loss_from_logits(LOGITS, LOGITS, LABELS, beta=0.1)
    torch.testing.assert_close(found, torch.tensor(20 * math.log(2)))
    at_reference = gradient(npo_loss_from_logits, LOGITS, LOGITS, LABELS, beta=0.1)
    torch.testing.assert_close(at_reference, gradient(ascent_on_sums, LOGITS, LABELS))


def test_npo_towards_beta_zero_is_ascent() -> None:
    """Anywhere, and the weight is 1 for every row."""
    found = gradient(npo_loss_from_logits, LOGITS, REFERENCE, LABELS, beta=1e-5)
    torch.testing.assert_close(found, gradient(ascent_on_sums, LOGITS, LABELS), rtol=1e-3, atol=1e-6)


def test_weights_of_npo() -> None:
    """2 sigma(-beta (nll - ref)), in (0, 2), towards 0 as a row is forgotten; no gradient reaches the reference."""
    nll, reference = torch.tensor([2.0, 5.0, 400.0]), torch.tensor([5.0, 5.0, 5.0], requires_grad=True)
    expected = torch.tensor([2 / (1 + math.exp(-0.6)), 1.0, 0.0]) / 3
    torch.testing.assert_close(gradient(npo_loss, nll, reference, beta=0.2).neg(), expected)
    assert reference.grad is None
    assert npo_loss(torch.tensor([1e6]), reference[:1], beta=0.2) == 0


def test_a_row_without_supervision_has_no_part() -> None:
    """It would add a constant to the mean, and take weight from the others."""
    whole = npo_loss_from_logits(LOGITS, REFERENCE, LABELS, beta=0.1)
    torch.testing.assert_close(whole, npo_loss_from_logits(LOGITS[::2], REFERENCE[::2], LABELS[::2], beta=0.1))
    nll, before, supervised = torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([True, False])
    found = dpo_loss(before, nll, before, before, beta=0.1, supervised=supervised)
    torch.testing.assert_close(found, dpo_loss(before[:1], nll[:1], before[:1], before[:1], beta=0.1))


def test_simnpo_by_hand() -> None:
    """The mean per token, minus the margin; a long and a short row of the same mean have the same loss."""
    # ln 2 for each token
    logits = torch.zeros(2, 4, 2)
    labels = torch.tensor([[-100, 0, 1, 1], [-100, -100, -100, 1]])
    expected = torch.tensor(2 / 3 * softplus(-3 * (math.log(2) - 0.2)))
    torch.testing.assert_close(simnpo_loss(logits, labels, beta=3.0, delta=0.2), expected)
    found = gradient(simnpo_loss, logits, labels, beta=3.0, delta=0.2)
    weight = 2 / (1 + math.exp(3 * (math.log(2) - 0.2)))
    # a token of the short row weighs three times as much; ascent on nll is (onehot - p)
    torch.testing.assert_close(found[1, 2], torch.tensor([-1.0, 1.0]) / 2 * weight / 2)
    torch.testing.assert_close(found[0, 2], found[1, 2] / 3)


def test_the_first_label_does_not_count_in_the_length() -> None:
    """Nothing predicts it."""
    with_first = torch.where(torch.arange(5) == 0, 5, LABELS)
    for name, loss in LOSSES.items():
        torch.testing.assert_close(loss(LOGITS, with_first), loss(LOGITS, LABELS), msg=name)


def test_simnpo_is_npo_with_a_constant_reference() -> None:
    """On rows of one token, such as those of a classifier."""
    scores, labels = LOGITS[:, 0], torch.tensor([4, 0, 6])
    expected = npo_loss(token_nll(scores, labels, reduction="sequence_sum"), torch.full((3,), 0.7), beta=2.0)
    torch.testing.assert_close(simnpo_loss(scores, labels, beta=2.0, delta=0.7), expected)


def test_dpo_by_hand() -> None:
    """The preferred answer has become likelier by 2, the other one less likely by 1."""
    scores = [torch.tensor([value]) for value in (3.0, 5.0, 5.0, 4.0)]
    torch.testing.assert_close(dpo_loss(*scores, beta=0.5), torch.tensor(4 * softplus(-1.5)))


def test_dpo_at_the_reference() -> None:
    """It descends on the preferred answer and ascends on the other one with weight 1; the reference has no gradient."""
    scores = [torch.tensor([3.0, 6.0], requires_grad=True) for _ in range(4)]
    loss = dpo_loss(*scores, beta=0.1)
    torch.testing.assert_close(loss, torch.tensor(20 * math.log(2)))
    loss.backward()
    torch.testing.assert_close(scores[0].grad, torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(scores[1].grad, torch.tensor([-0.5, -0.5]))
    assert scores[2].grad is None
    assert scores[3].grad is None


def test_dpo_of_an_unmoved_preferred_answer_is_npo() -> None:
    """NPO is DPO without it."""
    nll, reference, other = torch.tensor([7.0, 2.0]), torch.tensor([3.0, 3.0]), torch.tensor([1.0, 9.0])
    torch.testing.assert_close(dpo_loss(other, nll, other, reference, beta=0.3), npo_loss(nll, reference, beta=0.3))


@every_loss
def test_padding_changes_nothing(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """On the right, whatever the scores are there."""
    padded = torch.cat([LOGITS, torch.full((3, 2, 7), 50.0)], dim=1)
    found = gradient(loss, padded, pad(LABELS, (0, 2), value=-100))
    torch.testing.assert_close(found[:, :5], gradient(loss, LOGITS, LABELS), rtol=0, atol=0)
    assert (found[:, 5:] == 0).all()


@every_loss
def test_splitting_weighs_by_rows(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A mean over rows, however long they are."""
    torch.testing.assert_close((loss(LOGITS[:2], LABELS[:2]) + loss(LOGITS[2:], LABELS[2:])) / 2, loss(LOGITS, LABELS))


@every_loss
def test_nothing_supervised(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A zero that can be sent backward, from scores that are no numbers too."""
    check_nothing_supervised(loss, LOGITS, LABELS)


@every_loss
def test_half_precision(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Computed in float32, inside autocast as well."""
    check_half_precision(loss, LOGITS, LABELS)


def test_sums_of_any_precision_are_read_in_float32() -> None:
    """Their difference is what counts."""
    expected = torch.tensor(2 * softplus(-4.0))
    for kinds in ((torch.bfloat16, torch.bfloat16), (torch.float64, torch.float32), (torch.float32, torch.float64)):
        nll, reference = (torch.tensor([value], dtype=kind) for value, kind in zip((512.0, 508.0), kinds, strict=True))
        torch.testing.assert_close(npo_loss(nll, reference, beta=1.0), expected)
        torch.testing.assert_close(dpo_loss(reference, nll, reference, reference, beta=1.0), expected)
        torch.testing.assert_close(dpo_loss(reference, nll, nll, nll, beta=1.0), expected)


def test_beta_must_be_above_zero() -> None:
    """At 0 the loss is infinite, whatever its limit."""
    row = torch.tensor([1.0])
    for loss in (
        partial(npo_loss, row, row),
        partial(dpo_loss, row, row, row, row),
        partial(simnpo_loss, LOGITS, LABELS),
    ):
        with pytest.raises(ValueError, match=r"`beta` must be above 0, got 0\.0"):
            loss(beta=0.0)
