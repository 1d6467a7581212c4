"""Task-aware filters: what they keep, and what they do not depend on."""

from __future__ import annotations

import torch

from lightning_cl.functional.task_filters import initial_filter, train_filter

GENERATOR = torch.Generator().manual_seed(0)
LABELS = torch.arange(60) % 3
# the class stands in the first two of six features, in no more than their mean
FEATURES = torch.randn(60, 6, generator=GENERATOR)
FEATURES[:, :2] += 3 * torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])[LABELS]


def test_keeps_what_tells_the_classes() -> None:
    """More than one that was not trained, and less of everything else."""
    start = initial_filter(6, 6, seed=1)
    trained = train_filter(FEATURES, LABELS, start)
    share = [float(w[:, :2].square().sum() / w.square().sum()) for w in (start, trained)]
    assert share[0] < 0.4
    assert share[1] > 0.6


def test_measures_as_plain_features_do_where_directions_differ_alike() -> None:
    """Its scale is fixed: the mean over directions of the squared length is that of the identity."""
    for size in (6, 2):
        trained = train_filter(FEATURES, LABELS, initial_filter(size, 6, seed=1), steps=7)
        torch.testing.assert_close(trained.square().sum(), torch.tensor(float(size)))


def test_neither_order_nor_names_of_classes_matter() -> None:
    """All samples are taken at once; Adam makes rounding errors of small gradients larger."""
    near = {"rtol": 0.0, "atol": 1e-3}
    start, order = initial_filter(4, 6, seed=1), torch.randperm(60, generator=GENERATOR)
    expected = train_filter(FEATURES, LABELS, start, steps=20)
    torch.testing.assert_close(train_filter(FEATURES[order], LABELS[order], start, steps=20), expected, **near)
    torch.testing.assert_close(train_filter(FEATURES, LABELS * 5 + 2, start, steps=20), expected, **near)


def test_starts_from_what_it_is_given() -> None:
    """The seed gives the first one; without steps only the scale changes; nothing is changed in place."""
    start = initial_filter(6, 6, seed=1)
    assert torch.equal(start, initial_filter(6, 6, seed=1))
    assert not torch.equal(start, initial_filter(6, 6, seed=2))
    assert start.abs().max() <= 6**-0.5
    kept = start.clone()
    with torch.no_grad():
        torch.testing.assert_close(train_filter(FEATURES, LABELS, start, steps=0), start * 6**0.5 / start.norm())
        assert (train_filter(FEATURES, LABELS, start, steps=1) - start * 6**0.5 / start.norm()).abs().max() < 1e-6
        # a classifier of zeros gives the filter no gradient in the first step
        assert (train_filter(FEATURES, LABELS, start, steps=9) - start * 6**0.5 / start.norm()).abs().max() > 1e-3
    assert torch.equal(start, kept)
