"""Edits of weights at once, by hand and by property."""

from __future__ import annotations

import torch

from lightning_cl.functional.unlearning import dampen_weights_, negate_weights_, negated_factors, subtract_importance_


def test_dampening_by_hand():
    """Selected strictly above alpha; scaled by lambda I_D / I_f, never up; what matters to nobody stays."""
    full = torch.tensor([1.0, 1.0, 2.0, 0.0, 0.0])
    forget = torch.tensor([10.0, 20.0, 80.0, 5.0, 0.0])
    weights = torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0])
    assert dampen_weights_([weights], [full], [forget], alpha=10.0, lambda_=2.0) == 3
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.1, -0.05, 0.0, 1.0]))
    # lambda above alpha would raise weights without the bound
    weights = torch.ones(5)
    dampen_weights_([weights], [full], [forget], alpha=10.0, lambda_=100.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]))


def test_infinite_alpha_changes_nothing():
    """Not even what has no importance for all data, whose product with infinity is no number."""
    weights = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    before = weights.clone()
    assert (
        dampen_weights_([weights], [torch.tensor([0.0, 1.0])], [torch.tensor([5.0, 9.0])], alpha=torch.inf, lambda_=1)
        == 0
    )
    assert torch.equal(weights, before)


def test_dampening_twice_by_the_same_importances_goes_on():
    """An edit is no projection: earlier dampening stays and is dampened again."""
    weights = torch.ones(1)
    for expected in (0.05, 0.0025):
        dampen_weights_([weights], [torch.ones(1)], [torch.full((1,), 20.0)], alpha=10.0, lambda_=1.0)
        torch.testing.assert_close(weights, torch.tensor([expected]))


def test_subtraction_stops_at_zero():
    """An importance is no negative number."""
    sums = [torch.tensor([3.0, 1.0]), torch.tensor([0.5])]
    subtract_importance_(sums, [torch.tensor([1.0, 4.0]), torch.tensor([0.25])])
    assert [value.tolist() for value in sums] == [[2.0, 0.0], [0.25]]


def test_negation_turns_back_what_fine_tuning_did():
    """By alpha (tuned - theta); of half-precision weights the difference is taken in float32."""
    weights = [torch.tensor([1.0, -2.0]), torch.tensor([256.0], dtype=torch.bfloat16)]
    negate_weights_(weights, [torch.tensor([2.0, -2.0]), torch.tensor([260.0], dtype=torch.bfloat16)], alpha=0.5)
    assert [value.tolist() for value in weights] == [[0.5, -2.0], [254.0]]
    # 1 - 0.7 * 2.015625 is -0.4109, and -0.4141 where the product is rounded first
    weights = [torch.tensor([1.0], dtype=torch.bfloat16)]
    negate_weights_(weights, [torch.tensor([3.015625], dtype=torch.bfloat16)], alpha=0.7)
    assert weights[0].item() == -0.41015625


def _factors(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_factors_are_negated_as_their_product():
    """Exactly where one factor is shared or the first is 0; negating each factor for itself is another matrix."""
    up, down, tuned_up, tuned_down = (_factors(*s, seed=i) for i, s in enumerate([(5, 2), (2, 4), (5, 2), (2, 4)]))
    cases = [
        (up, down, tuned_up, down),
        (up, down, up, tuned_down),
        (torch.zeros_like(up), down, tuned_up, tuned_down),
        (up, torch.zeros_like(down), tuned_up, tuned_down),
    ]
    for case in cases:
        new_up, new_down = negated_factors(*case, alpha=0.7)
        expected = 1.7 * case[0] @ case[1] - 0.7 * case[2] @ case[3]
        torch.testing.assert_close(new_up @ new_down, expected)
    zero, each = torch.zeros_like(up), [down.clone()]
    negate_weights_(each, [tuned_down], 0.7)
    assert (-0.7 * tuned_up @ each[0] - negated_factors(zero, *cases[2][1:], alpha=0.7)[0] @ tuned_down).abs().max() > 1


def test_factors_that_both_moved_are_the_nearest_of_their_rank():
    """The truncated singular value decomposition of the product of rank 2r."""
    up, down, tuned_up, tuned_down = (_factors(*s, seed=i) for i, s in enumerate([(5, 2), (2, 6), (5, 2), (2, 6)]))
    new_up, new_down = negated_factors(up, down, tuned_up, tuned_down, alpha=0.7)
    u, s, v = torch.linalg.svd(1.7 * up @ down - 0.7 * tuned_up @ tuned_down, full_matrices=False)
    torch.testing.assert_close(new_up @ new_down, u[:, :2] * s[:2] @ v[:2])
    assert new_up.shape == up.shape
    assert new_down.shape == down.shape
    assert s[2] > 0.1  # it does not have their rank


def test_no_step_is_no_change():
    """Alpha of 0, and weights that fine-tuning did not move."""
    up, down = _factors(3, 2, seed=0), _factors(2, 3, seed=1)
    for tuned, alpha in (((up + 1, down), 0.0), ((up, down), 3.0)):
        new_up, new_down = negated_factors(up, down, *tuned, alpha=alpha)
        torch.testing.assert_close(new_up @ new_down, up @ down)
