"""The moving Fisher terms, the score of a walk and the importance made of both."""

from __future__ import annotations

import pytest
import torch

from lightning_cl.functional import blocks
from lightning_cl.functional.rwalk import (
    add_squares_,
    average_score_,
    moving_fisher_,
    rwalk_importance,
    walk_score_,
)


def _tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(shape, generator=generator) for shape in [(3, 4), (5,), ()]]


def test_moving_fisher_weighs_the_newest_by_alpha() -> None:
    """0.9 * 6 / 3 + 0.1 * 5 = 2.3, and the newest alone with 1."""
    for alpha, expected in ((0.9, 2.3), (1.0, 2.0)):
        fisher, squares = [torch.tensor([5.0])], [torch.zeros(1)]
        for gradient in (1.0, 2.0, -1.0):
            add_squares_(squares, [torch.tensor([gradient])])
        moving_fisher_(fisher, squares, 3, alpha)
        torch.testing.assert_close(fisher, [torch.tensor([expected])])


def test_score_is_the_paper_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fall over half the Fisher term times the squared way, damped; also in blocks."""
    monkeypatch.setattr(blocks, "_BLOCK", 5)
    score, path, fisher, before, after = (_tensors(seed) for seed in range(5))
    rows = zip(score, path, fisher, before, after, strict=True)
    expected = [s + d / (0.5 * f * (b - a) ** 2 + 0.01) for s, d, f, a, b in rows]
    kept = [tensor.clone() for tensor in (*fisher, *path, *before, *after)]
    walk_score_(score, path, fisher, before, after, 0.01)
    torch.testing.assert_close(score, expected)
    assert all(torch.equal(a, b) for a, b in zip(kept, (*fisher, *path, *before, *after), strict=True))


def test_scores_of_tasks_are_averaged_and_never_negative() -> None:
    """1/4, 1/4 and 1/2 of three tasks."""
    kept = [torch.zeros(2)]
    for number, score in enumerate(([4.0, -4.0], [8.0, 8.0], [-1.0, 2.0])):
        average_score_(kept, [torch.tensor(score)], number == 0)
    torch.testing.assert_close(kept, [torch.tensor([3.0, 3.0])])


def test_a_part_without_a_peak_is_left_out() -> None:
    """Where nothing was learnt there is nothing to hold, and no division by 0."""
    zeros, score = torch.zeros(2), torch.tensor([1.0, 2.0])
    assert torch.equal(rwalk_importance(zeros, score, 0.0, 2.0), torch.tensor([0.5, 1.0]))
    assert torch.equal(rwalk_importance(zeros, zeros, 0.0, 0.0), zeros)
