"""All metrics of a stream at once, of scores and of losses."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_cl.metrics.summary import summarise_matrix

TRAINED = [[0], [1], [2]]


def test_a_loss_is_its_negative_with_averages_in_its_own_unit() -> None:
    """Perplexities that rise from 4 and 3 to 6 and 8: forgetting is the rise, backward transfer its opposite."""
    R = torch.tensor([[4.0, 9, 9], [5, 3, 7], [6, 8, 2]], dtype=torch.float64)
    curves = torch.tensor([[4.0, 9, 9], [12, 9, 9], [5, 3, 7], [6, 8, 2]], dtype=torch.float64)
    summary = summarise_matrix(
        R,
        TRAINED,
        baseline=torch.full((3,), 20.0, dtype=torch.float64),
        joint=torch.tensor([3.0, 3, 3], dtype=torch.float64),
        curves=curves,
        task_of_evaluation=torch.tensor([0, 1, 1, 2]),
        lower_is_better=True,
    )
    assert summary["average_accuracy"] == pytest.approx((6 + 8 + 2) / 3)
    assert summary["average_incremental_accuracy"] == pytest.approx((4 + 4 + 16 / 3) / 3)
    assert summary["learning_accuracy"] == pytest.approx((4 + 3 + 2) / 3)
    assert summary["forgetting"] == pytest.approx(((6 - 4) + (8 - 3)) / 2)
    assert summary["backward_transfer"] == pytest.approx(-summary["forgetting"])
    # both later tasks were better than untrained before their turn
    assert summary["forward_transfer"] == pytest.approx(((20 - 9) + (20 - 7)) / 2)
    assert summary["intransigence"] == pytest.approx(((4 - 3) + (3 - 3) + (2 - 3)) / 3)
    # the worst perplexities since each was learned: 12 and 8
    assert summary["min_accuracy"] == pytest.approx(10)
    assert summary["worst_case_accuracy"] == pytest.approx(2 / 3 + 10 * 2 / 3)
    assert summary["windowed_forgetting_10"] > 0


def test_what_was_not_evaluated_is_left_out_of_a_loss_too() -> None:
    """As of a score."""
    R = torch.tensor([[4.0, math.nan, math.nan], [math.nan, 3, math.nan]])
    assert summarise_matrix(R, TRAINED[:2], lower_is_better=True) == {"learning_accuracy": pytest.approx(3.5)}
