"""UNDIAL, CE-U and maximum entropy: distributions as targets, against hand-worked numbers and loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import one_hot

from lightning_cl.functional.masked_scores import mask_scores
from lightning_cl.functional.unlearning import ceu_loss, max_entropy_loss, undial_loss

VOCABULARY = 6
LABELS = torch.tensor([[-100, -100, 4, 2, 1], [3, 5, -100, -100, -100], [-100, 1, 2, 3, -100]])


def _scores(seed=0, dtype=torch.float32):
    return torch.randn(3, 5, VOCABULARY, generator=torch.Generator().manual_seed(seed)).to(dtype) * 2


def _tokens(labels=LABELS):
    """Positions that predict a supervised token, and that token, row by row."""
    return [(b, t, int(y)) for b, row in enumerate(labels) for t, y in enumerate(row[1:]) if y != -100]


LOSSES = {
    "undial": lambda logits, labels: undial_loss(logits, logits.detach().roll(1, -1), labels, beta=3.0),
    "ceu": lambda logits, labels: ceu_loss(logits, labels, skip=0),
    "max-entropy": max_entropy_loss,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def test_undial_is_the_cross_entropy_to_the_adjusted_reference():
    """Token by token, over supervised positions only."""
    logits, reference = _scores(), _scores(1)
    terms = []
    for b, t, y in _tokens():
        target = (reference[b, t] - 3.0 * one_hot(torch.tensor(y), VOCABULARY)).softmax(0)
        terms.append(-(target * logits[b, t].log_softmax(0)).sum())
    assert len(terms) == 7
    torch.testing.assert_close(undial_loss(logits, reference, LABELS, beta=3.0), torch.stack(terms).mean())


def test_undial_rests_at_its_target():
    """The loss is the entropy of the target there, with a gradient of 0; without beta that is the reference."""
    reference, labels = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([2])
    adjusted = torch.tensor([[1.0, 0.0, -8.0]], requires_grad=True)
    loss = undial_loss(adjusted, reference, labels, beta=10.0)
    loss.backward()
    p = adjusted.detach().softmax(1)
    torch.testing.assert_close(loss.detach(), -(p * p.log()).sum())
    torch.testing.assert_close(adjusted.grad, torch.zeros(1, 3))
    same = reference.clone().requires_grad_()
    undial_loss(same, reference, labels, beta=0.0).backward()
    torch.testing.assert_close(same.grad, torch.zeros(1, 3))


def test_labels_beyond_a_small_vocabulary_are_no_index():
    """-100 would be class 0 of 100: neither the reference nor the model is read there."""
    logits = torch.zeros(1, 3, 100, requires_grad=True)
    reference = torch.zeros(1, 3, 100)
    reference[0, 1] = torch.nan
    undial_loss(logits, reference, torch.tensor([[7, 8, -100]]), beta=10.0).backward()
    assert logits.grad[0, 1:].abs().max() == 0
    assert logits.grad[0, 0, 8] > 0


def test_ceu_target_keeps_the_ratios_of_the_others():
    """By hand: p = (1/2, 1/4, 1/4), true class 0, so q = (0, 1/2, 1/2) and the loss log 4; gradient p - q."""
    logits = torch.tensor([[math.log(2), 0.0, 0.0]], requires_grad=True)
    loss = ceu_loss(logits, torch.tensor([0]))
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(math.log(4)))
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, -0.25, -0.25]]))


def test_ceu_skips_the_first_supervised_tokens_of_each_row():
    """Not of the batch, and not the first positions."""
    logits = _scores()
    kept = [token for b in range(3) for token in [t for t in _tokens() if t[0] == b][1:]]
    assert [(b, t) for b, t, _ in kept] == [(0, 2), (0, 3), (2, 1), (2, 2)]
    terms = []
    for b, t, y in kept:
        target = logits[b, t].clone()
        target[y] = -torch.inf
        terms.append(-(target.softmax(0) * logits[b, t].log_softmax(0)).sum())
    torch.testing.assert_close(ceu_loss(logits, LABELS), torch.stack(terms).mean())
    assert (ceu_loss(logits, LABELS) - ceu_loss(logits, LABELS, skip=0)).abs() > 0.01
    assert ceu_loss(logits, LABELS, skip=3) == 0


def test_ceu_is_undial_of_itself_with_a_large_beta():
    """The same target, hence the same gradient."""
    one, other = (_scores().requires_grad_() for _ in range(2))
    ceu_loss(one, LABELS, skip=0).backward()
    undial_loss(other, other, LABELS, beta=1e4).backward()
    torch.testing.assert_close(one.grad, other.grad)


def test_max_entropy_by_hand():
    """KL of uniform from (3/4, 1/4), 0 at uniform, and the gradient p - 1/V."""
    logits = torch.tensor([[math.log(3), 0.0], [5.0, 5.0]], requires_grad=True)
    loss = max_entropy_loss(logits, torch.tensor([0, 1]))
    loss.backward()
    expected = (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)) / 2
    torch.testing.assert_close(loss.detach(), torch.tensor(expected))
    torch.testing.assert_close(logits.grad, torch.tensor([[0.125, -0.125], [0.0, 0.0]]))


@pytest.mark.parametrize("hide", ["infinite", "finite"])
def test_classes_that_a_mask_has_closed_are_left_out(hide):
    """Uniform means over the open ones; with no number lost to infinity."""
    allowed = torch.tensor([True, False, True, True])
    open_scores = torch.tensor([[1.0, -1.0, 0.5]])
    scores = torch.tensor([[1.0, 7.0, -1.0, 0.5]], requires_grad=True)
    masked = mask_scores(scores, allowed) if hide == "finite" else scores.masked_fill(~allowed, -torch.inf)
    for loss in (max_entropy_loss, ceu_loss):
        found = loss(masked, torch.tensor([0]))
        torch.testing.assert_close(found, loss(open_scores, torch.tensor([0])))
        (gradient,) = torch.autograd.grad(found, scores, retain_graph=True)
        assert gradient.isfinite().all()
        assert gradient[0, 1] == 0


@every_loss
def test_only_supervised_positions_matter(loss):
    """Other scores may be anything, and have no gradient."""
    supervised = torch.zeros(3, 5, dtype=torch.bool)
    supervised[tuple(zip(*[(b, t) for b, t, _ in _tokens()], strict=True))] = True
    logits = _scores().masked_fill(~supervised[..., None], torch.nan).requires_grad_()
    found = loss(logits, LABELS)
    found.backward()
    torch.testing.assert_close(found.detach(), loss(_scores(), LABELS))
    assert logits.grad[~supervised].abs().max() == 0


@every_loss
def test_nothing_supervised_is_a_zero_with_a_graph(loss):
    """Also where scores are infinite."""
    logits = torch.full((2, 3, 4), torch.inf, requires_grad=True)
    found = loss(logits, torch.full((2, 3), -100))
    found.backward()
    assert found == 0
    assert found.dtype == torch.float32
    assert logits.grad.abs().max() == 0


@every_loss
def test_half_precision_is_computed_in_float32(loss):
    """As of the same scores in float32, to the bit."""
    logits = _scores(dtype=torch.bfloat16)
    found = loss(logits, LABELS)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(logits.float(), LABELS))


def test_settings_and_shapes_are_checked():
    """Each by its name."""
    logits, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="`beta` must be at least 0, got -1"):
        undial_loss(logits, logits, labels, beta=-1.0)
    with pytest.raises(ValueError, match=r"`ref_logits` of shape \[1, 3\] do not fit `logits` of shape \[2, 3\]"):
        undial_loss(logits, logits[:1], labels, beta=1.0)
    with pytest.raises(ValueError, match="`skip` must be at least 0, got -1"):
        ceu_loss(logits, labels, skip=-1)
