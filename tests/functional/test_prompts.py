"""Choosing prompts by keys and by attention, against numbers worked by hand."""

from __future__ import annotations

import pytest
import torch

from lightning_cl.functional import (
    component_weights,
    key_distance,
    key_similarities,
    orthonormalise_,
    prompt_orthogonality,
    selection_penalty,
)


def test_similarities_are_cosines_of_each_row_alone() -> None:
    """(3, 4) against (1, 0) and (-3, -4): 0.6 and -1, whatever their lengths and whoever else is asked for."""
    queries, keys = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[10.0, 0.0], [-3.0, -4.0]])
    torch.testing.assert_close(key_similarities(queries, keys), torch.tensor([[0.6, -1.0], [0.0, -0.8]]))
    torch.testing.assert_close(key_similarities(queries[:1], keys), torch.tensor([[0.6, -1.0]]))
    assert key_similarities(queries.bfloat16(), keys).dtype == torch.float32


def test_key_distance_pulls_the_chosen_keys_only() -> None:
    """1 - 0.6 + 1 + 1 for both keys of a query; a key that is not chosen has no gradient."""
    keys = torch.tensor([[1.0, 0.0], [-3.0, -4.0], [0.0, 1.0]], requires_grad=True)
    similarities = key_similarities(torch.tensor([[3.0, 4.0]]), keys)
    distance = key_distance(similarities, torch.tensor([[0, 1]]))
    torch.testing.assert_close(distance, torch.tensor([2.4]))
    distance.sum().backward()
    assert keys.grad is not None
    # the gradient of -cos at (1, 0) has no part along the key
    torch.testing.assert_close(keys.grad[0], torch.tensor([0.0, -0.8]))
    assert keys.grad[2].tolist() == [0.0, 0.0]


def test_penalty_is_the_share_of_choices() -> None:
    """Counts 0, 3 and 0 with one more each: 1/6, 4/6, 1/6; none: all alike."""
    torch.testing.assert_close(selection_penalty(torch.tensor([0, 3, 0])), torch.tensor([1, 4, 1]) / 6)
    assert selection_penalty(torch.zeros(4)).tolist() == [0.25] * 4


def test_component_weights_are_cosines_of_what_attention_leaves() -> None:
    """Query (1, 2): attention (1, 0) leaves (1, 0), (2, 1) leaves (2, 2); keys (3, 4) and (1, 0), of two layers."""
    queries = torch.tensor([[1.0, 2.0]])
    attention = torch.tensor([[[1.0, 0.0], [2.0, 1.0]]])
    keys = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]])
    torch.testing.assert_close(component_weights(queries, attention, keys), torch.tensor([[[0.6, 0.5**0.5]]]))


def test_weights_of_a_query_that_is_not_looked_at_are_zero() -> None:
    """And not NaN, in neither direction."""
    attention = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    weights = component_weights(torch.tensor([[0.0, 5.0]]), attention, torch.ones(1, 1, 2))
    assert weights.tolist() == [[[0.0]]]
    weights.sum().backward()
    assert attention.grad is not None
    assert bool(attention.grad.isfinite().all())


def test_new_rows_are_orthonormal_to_old_ones_that_stay() -> None:
    """Old rows (2, 0, 0) and (1, 1, 0), which are not orthogonal: of (5, 7, 3) only the third axis is left."""
    rows = torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [5.0, 7.0, 3.0]])
    orthonormalise_(rows, start=2)
    torch.testing.assert_close(rows, torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))


@pytest.mark.parametrize("start", [0, 3])
def test_any_shape_of_rows_becomes_orthonormal(start: int) -> None:
    """Rows of 2 x 4 numbers; those before the start to the bit."""
    rows = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0))
    before = rows.clone()
    orthonormalise_(rows, start)
    assert torch.equal(rows[:start], before[:start])
    new = rows[start:].flatten(1)
    torch.testing.assert_close(new @ new.T, torch.eye(6 - start), atol=1e-6, rtol=0)
    torch.testing.assert_close(new @ before[:start].flatten(1).T, torch.zeros(6 - start, start), atol=1e-6, rtol=0)


def test_orthogonality_counts_lengths_and_angles() -> None:
    """Of (1, 0) and (1, 1): entries 0, 1, 1 and 2 - 1 beyond the identity, of four."""
    assert float(prompt_orthogonality(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))) == 0.75
    assert float(prompt_orthogonality(torch.eye(3).unflatten(1, (3, 1)))) == 0
