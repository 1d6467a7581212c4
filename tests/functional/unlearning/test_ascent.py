"""Ascent with bounds and weights, and gradient difference, against values by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from forget_losses import check_half_precision, check_nothing_supervised, gradient
from lightning_cl.functional.unlearning import grad_diff, gradient_ascent, satimp_loss, supervised_nll, wga_loss

GENERATOR = torch.Generator().manual_seed(1)
LOGITS = 2 * torch.randn(3, 5, 7, generator=GENERATOR)
LABELS = torch.tensor([[-100, -100, 3, 6, -100], [2, -100, -100, -100, -100], [1, 0, -100, 5, 4]])
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "uniform": gradient_ascent,
    "bound": partial(gradient_ascent, bound=3.0),
    "unbounded": partial(gradient_ascent, bound=None),
    "wga": partial(wga_loss, beta=0.7),
    "satimp": partial(satimp_loss, beta1=2.0, beta2=0.5),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def test_without_a_bound_it_is_the_negative_loss() -> None:
    """Of a language model, and of a classifier."""
    expected = -cross_entropy(LOGITS[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())
    torch.testing.assert_close(gradient_ascent(LOGITS, LABELS, bound=None), expected)
    scores, labels = LOGITS[:, 0], torch.tensor([4, 0, 6])
    torch.testing.assert_close(gradient_ascent(scores, labels, bound=None), -cross_entropy(scores, labels))


def test_bound_by_hand() -> None:
    """A token below the bound misses the rest of the way, one above it nothing; each on its own, not their mean."""
    # nll of ln 2 and of ln(1 + e^5)
    logits, labels = torch.tensor([[0.0, 0.0], [5.0, 0.0]]), torch.tensor([1, 1])
    torch.testing.assert_close(gradient_ascent(logits, labels, bound=2.0), torch.tensor((2 - math.log(2)) / 2))
    found = gradient(partial(gradient_ascent, bound=2.0), logits, labels)
    # ascent: (onehot - p) / 2, for the first one only
    torch.testing.assert_close(found, torch.tensor([[-0.25, 0.25], [0.0, 0.0]]))


def test_the_uniform_bound_is_a_guess() -> None:
    """A guess has loss 0, and what is more likely than a guess has not."""
    guess = torch.zeros(1, 3, 7)
    labels = torch.tensor([[-100, 3, 6]])
    assert gradient_ascent(guess, labels).abs() < 1e-6
    torch.testing.assert_close(gradient_ascent(LOGITS, LABELS), gradient_ascent(LOGITS, LABELS, bound=math.log(7)))
    likely = guess.clone()
    likely[0, 0, 3] = 1
    nll = supervised_nll(likely, labels)
    torch.testing.assert_close(gradient_ascent(likely, labels), (math.log(7) - nll[0]) / 2)


def test_below_the_bound_the_gradient_is_that_of_ascent() -> None:
    """Whatever the bound."""
    nll = supervised_nll(LOGITS, LABELS)
    bounded = partial(gradient_ascent, bound=nll.max().item() + 1)
    torch.testing.assert_close(gradient(bounded, LOGITS, LABELS), gradient(LOSSES["unbounded"], LOGITS, LABELS))


def test_weights_by_hand() -> None:
    """Of p = 1/4 and p = 1/2, and no gradient through the weight."""
    logits, labels = torch.tensor([[math.log(1 / 3), 0.0], [0.0, 0.0]]), torch.tensor([0, 0])
    found = wga_loss(logits, labels, beta=2.0)
    torch.testing.assert_close(found, torch.tensor(-(math.log(4) / 16 + math.log(2) / 4) / 2))
    # descent on -w nll: w (onehot - p) / n
    expected = torch.tensor([[0.75, -0.75], [0.5, -0.5]]) * torch.tensor([[1 / 16], [1 / 4]]) / 2
    torch.testing.assert_close(gradient(partial(wga_loss, beta=2.0), logits, labels), expected)
    found = satimp_loss(logits, labels, beta1=2.0, beta2=1.0)
    torch.testing.assert_close(found, torch.tensor(-(math.log(4) / 16 * 3 / 4 + math.log(2) / 4 / 2) / 2))
    spared = expected * torch.tensor([[3 / 4], [1 / 2]])
    torch.testing.assert_close(gradient(partial(satimp_loss, beta1=2.0, beta2=1.0), logits, labels), spared)


def test_weights_that_are_one() -> None:
    """WGA at 0 is ascent, and SatImp without importance is WGA, value and gradient."""
    for weighted, plain in (
        (partial(wga_loss, beta=0.0), LOSSES["unbounded"]),
        (partial(satimp_loss, beta1=0.0, beta2=0.0), LOSSES["unbounded"]),
        (partial(satimp_loss, beta1=0.7, beta2=0.0), LOSSES["wga"]),
    ):
        torch.testing.assert_close(weighted(LOGITS, LABELS), plain(LOGITS, LABELS))
        torch.testing.assert_close(gradient(weighted, LOGITS, LABELS), gradient(plain, LOGITS, LABELS))


@pytest.mark.parametrize("name", ["wga", "satimp"])
def test_an_impossible_token_rests(name: str) -> None:
    """Of probability 0 it has the limit of weight times loss, which is 0, and no gradient."""
    logits, labels = LOGITS.clone(), LABELS
    logits[2, 0, 0] = -torch.inf
    possible = labels.clone()
    possible[2, 1] = -100
    loss, count = LOSSES[name], (LABELS[:, 1:] != -100).sum()
    torch.testing.assert_close(loss(logits, labels), loss(logits, possible) * (count - 1) / count)
    assert not gradient(loss, logits, labels)[2, 0].any()


def test_gradient_difference_is_ascent_and_descent() -> None:
    """Each a mean over its own tokens, with its own weight."""
    retain, labels = LOGITS.flip(0)[:2], LABELS.flip(0)[:2]
    found = grad_diff(LOGITS, LABELS, retain, labels, bound=2.5, forget_weight=0.3, retain_weight=2.0)
    descent = cross_entropy(retain[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(found, 0.3 * gradient_ascent(LOGITS, LABELS, bound=2.5) + 2.0 * descent)
    torch.testing.assert_close(
        grad_diff(LOGITS, LABELS, LOGITS, LABELS, bound=None), torch.tensor(0.0), rtol=0, atol=1e-6
    )


@every_loss
def test_padding_changes_nothing(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """On the right, whatever the scores are there."""
    padded = torch.cat([LOGITS, torch.full((3, 2, 7), 50.0)], dim=1)
    found = gradient(loss, padded, pad(LABELS, (0, 2), value=-100))
    torch.testing.assert_close(found[:, :5], gradient(loss, LOGITS, LABELS), rtol=0, atol=0)
    assert (found[:, 5:] == 0).all()


@every_loss
def test_splitting_weighs_by_tokens(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Two tokens and three; the row of none changes nothing."""
    parts = (2 * loss(LOGITS[:2], LABELS[:2]) + 3 * loss(LOGITS[2:], LABELS[2:])) / 5
    torch.testing.assert_close(parts, loss(LOGITS, LABELS))


@every_loss
def test_nothing_supervised(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A zero that can be sent backward, from scores that are no numbers too."""
    check_nothing_supervised(loss, LOGITS, LABELS)


@every_loss
def test_half_precision(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Computed in float32, inside autocast as well."""
    check_half_precision(loss, LOGITS, LABELS)


def test_settings_out_of_range_are_refused() -> None:
    """With their names."""
    with pytest.raises(ValueError, match=r"`bound` must be above 0, got 0\.0"):
        gradient_ascent(LOGITS, LABELS, bound=0.0)
    with pytest.raises(ValueError, match="`beta` must be at least 0, got -1"):
        wga_loss(LOGITS, LABELS, beta=-1)
    with pytest.raises(ValueError, match="`beta1` must be at least 0, got -1"):
        satimp_loss(LOGITS, LABELS, beta1=-1, beta2=1)
    with pytest.raises(ValueError, match="`beta2` must be at least 0, got -1"):
        satimp_loss(LOGITS, LABELS, beta1=1, beta2=-1)
