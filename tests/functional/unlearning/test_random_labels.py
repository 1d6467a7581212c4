"""Wrong labels: never the true one, uniform over the others, and a function of seed and identity."""

from __future__ import annotations

import pytest
import torch

from lightning_cl.functional.unlearning import random_labels

CLASSES = torch.arange(5)


def test_uniform_over_the_other_classes():
    """20000 samples of class 2: a quarter each, within 4 standard deviations, and not one of class 2."""
    drawn = random_labels(torch.full((20000,), 2), torch.arange(20000), classes=CLASSES, seed=1)
    counts = drawn.bincount(minlength=5)
    assert counts[2] == 0
    assert (counts[[0, 1, 3, 4]] - 5000).abs().max() < 4 * (20000 * 0.25 * 0.75) ** 0.5


def test_forgotten_classes_get_one_of_the_remaining():
    """The true label is no candidate, so all candidates are possible; their order does not matter."""
    labels = torch.full((3000,), 2)
    drawn = random_labels(labels, torch.arange(3000), classes=torch.tensor([4, 0, 1]), seed=1)
    assert drawn.unique().tolist() == [0, 1, 4]
    assert (drawn.bincount()[[0, 1, 4]] - 1000).abs().max() < 4 * (3000 * 2 / 9) ** 0.5
    assert torch.equal(drawn, random_labels(labels, torch.arange(3000), classes=torch.tensor([0, 1, 4]), seed=1))


def test_a_label_belongs_to_its_sample():
    """Whatever the batch and the order, and another for another seed."""
    labels, ids = torch.randint(0, 5, (200,)), torch.randint(0, 1 << 40, (200,))
    whole = random_labels(labels, ids, classes=CLASSES, seed=3)
    order = torch.randperm(200)
    parts = [random_labels(labels[rows], ids[rows], classes=CLASSES, seed=3) for rows in order.split(17)]
    assert torch.equal(torch.cat(parts), whole[order])
    changed = (whole != random_labels(labels, ids, classes=CLASSES, seed=4)).float().mean()
    assert 0.6 < changed < 0.9  # 3/4
    # a large seed is one too
    random_labels(labels, ids, classes=CLASSES, seed=(1 << 63) - 1)


def test_tokens_of_a_sequence_are_drawn_apart():
    """Each position has its own; -100 stays, and longer padding changes nothing."""
    labels = torch.full((1, 400), 2)
    labels[0, :10] = -100
    ids = torch.tensor([5])
    drawn = random_labels(labels, ids, classes=CLASSES, seed=0)
    assert (drawn[0, :10] == -100).all()
    assert drawn[0, 10:].unique().tolist() == [0, 1, 3, 4]
    longer = torch.cat([labels, torch.full((1, 7), -100)], dim=1)
    assert torch.equal(random_labels(longer, ids, classes=CLASSES, seed=0)[:, :400], drawn)


def test_refuses_what_has_no_wrong_label():
    """One class only, and ids that do not fit."""
    with pytest.raises(ValueError, match="`classes` leaves no label to draw but the true one"):
        random_labels(torch.tensor([1]), torch.tensor([0]), classes=torch.tensor([1]), seed=0)
    with pytest.raises(ValueError, match="`classes` leaves no label"):
        random_labels(torch.tensor([1]), torch.tensor([0]), classes=torch.tensor([], dtype=torch.int64), seed=0)
    with pytest.raises(ValueError, match=r"`sample_ids` of shape \(2,\) do not fit 1 samples"):
        random_labels(torch.tensor([1]), torch.tensor([0, 1]), classes=CLASSES, seed=0)
    nothing = random_labels(torch.tensor([-100]), torch.tensor([0]), classes=torch.tensor([1]), seed=0)
    assert nothing.tolist() == [-100]
