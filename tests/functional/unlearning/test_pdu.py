"""Flat logits and the multiplier, by hand."""

from __future__ import annotations

import torch

from lightning_cl.functional.masked_scores import mask_scores
from lightning_cl.functional.unlearning import dual_update, pdu_loss


def test_distance_from_flat_by_hand():
    """(3 - 1)^2 and 0, a mean over tokens; gradient 2 (max - mean) (e_max - 1/V) / n."""
    logits = torch.tensor([[3.0, 0.0, 0.0], [1.0, 1.0, 1.0]], requires_grad=True)
    loss = pdu_loss(logits, torch.tensor([1, 2]))
    loss.backward()
    assert loss == 2
    torch.testing.assert_close(logits.grad[0], 2 * 2 * torch.tensor([2 / 3, -1 / 3, -1 / 3]) / 2)


def test_reads_the_scores_that_predict_what_is_supervised():
    """Those before a label, without the last ones: shifted by one from where the labels stand."""
    logits = torch.zeros(1, 4, 3)
    logits[0, 1, 0], logits[0, 2, 0], logits[0, 3, 0] = 3.0, 6.0, torch.nan
    # labels at 2 and 3 are predicted at 1 and 2: 2^2 and 4^2
    assert pdu_loss(logits, torch.tensor([[-100, -100, 1, 2]])) == 10


def test_shift_changes_nothing_and_scale_counts_squared():
    """What the authors say of their loss."""
    logits, labels = torch.randn(4, 5), torch.tensor([0, 1, -100, 2])
    loss = pdu_loss(logits, labels)
    torch.testing.assert_close(pdu_loss(logits + 7, labels), loss)
    torch.testing.assert_close(pdu_loss(3 * logits, labels), 9 * loss)


def test_closed_classes_and_empty_batches():
    """A mask's -1e9 is no logit; nothing supervised is a zero with a graph."""
    scores = torch.tensor([[3.0, 9.0, 0.0, 0.0]])
    masked = mask_scores(scores, torch.tensor([True, False, True, True]))
    assert pdu_loss(masked, torch.tensor([0])) == 4
    logits = torch.full((2, 3), torch.inf, requires_grad=True)
    loss = pdu_loss(logits, torch.tensor([-100, -100]))
    loss.backward()
    assert loss == 0
    assert logits.grad.abs().max() == 0


def test_multiplier_follows_the_constraint_and_stays_positive():
    """Up while the retain loss is above the bound, down below it, never under 0."""
    assert dual_update(1.0, 0.75, eta=2.0, epsilon=0.25) == 2.0
    assert dual_update(1.0, 0.25, eta=2.0, epsilon=0.25) == 1.0
    assert dual_update(1.0, 0.0, eta=2.0, epsilon=0.25) == 0.5
    assert dual_update(0.1, 0.0, eta=2.0, epsilon=0.25) == 0.0
