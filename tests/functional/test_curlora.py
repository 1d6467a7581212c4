"""Columns and rows of a weight, drawn by inverted probabilities."""

from __future__ import annotations

import pytest
import torch

from lightning_cl.functional import inverted_probabilities, sample_columns_and_rows


def test_probabilities_are_inverse_to_squared_norms() -> None:
    """Of columns and of rows, each of sum 1."""
    weight = torch.randn(5, 7)
    columns, rows = inverted_probabilities(weight)
    for found, norms in ((columns, weight.norm(dim=0)), (rows, weight.norm(dim=1))):
        expected = norms.pow(-2)
        torch.testing.assert_close(found, (expected / expected.sum()).double(), rtol=1e-5, atol=0)


def test_probabilities_of_a_wide_weight_are_not_uniform() -> None:
    """With 4096 columns a constant of .001 beside p = 1/4096 would hide a ratio of 4."""
    weight = torch.ones(4, 4096)
    weight[:, ::2] = 2.0
    columns, _ = inverted_probabilities(weight)
    assert float(columns.max() / columns.min()) == pytest.approx(4.0, rel=1e-4)


def test_probabilities_of_tiny_weights() -> None:
    """Scale has no effect, and zeros are never drawn."""
    weight = torch.tensor([[1.0, 2.0, 0.0], [3.0, 1.0, 0.0]])
    for found, expected in zip(inverted_probabilities(weight * 1e-18), inverted_probabilities(weight), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert inverted_probabilities(weight)[0][2] == 0


def test_a_column_of_nearly_zero_leaves_the_others_a_probability() -> None:
    """In float32 theirs would be 0, and a weight of full rank would be taken for one of a single column."""
    weight = torch.tensor([[1e-30, 1.0], [1.0, 2.0]])
    weight[1, 0] = 0
    for found in inverted_probabilities(weight):
        assert (found > 0).all()
    down, up = sample_columns_and_rows(weight, 2, torch.Generator())
    assert torch.equal(down, weight)
    assert torch.equal(up, weight)


def test_factors_are_columns_and_rows_of_the_weight() -> None:
    """Each at most once, in their order, and small norms more often than large ones."""
    weight = torch.arange(1.0, 43.0).view(6, 7)
    drawn = torch.zeros(7)
    for seed in range(300):
        down, up = sample_columns_and_rows(weight, 3, torch.Generator().manual_seed(seed))
        rows = [int((weight == row).all(1).nonzero()) for row in down]
        columns = [int((column == weight.T).all(1).nonzero()) for column in up.T]
        assert rows == sorted(set(rows))
        assert columns == sorted(set(columns))
        drawn[columns] += 1
    assert drawn[0] > drawn[-1]


def test_columns_and_rows_follow_the_seed() -> None:
    """The same seed gives the same bits."""
    weight = torch.randn(6, 7)
    first, again, other = (
        sample_columns_and_rows(weight, 2, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_too_few_columns_are_refused() -> None:
    """A weight of zeros has none to give."""
    with pytest.raises(ValueError, match="2 columns are to be drawn from a weight of 1 columns that are not 0"):
        sample_columns_and_rows(torch.tensor([[1.0, 0.0], [2.0, 0.0]]), 2, torch.Generator())
    with pytest.raises(ValueError, match="weight of 0 columns"):
        sample_columns_and_rows(torch.zeros(2, 2), 1, torch.Generator())
