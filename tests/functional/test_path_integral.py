"""The path integral and the importance made of it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from lightning_cl.functional import blocks
from lightning_cl.functional.path_integral import path_importance_, path_integral_

SHAPES = [(3, 4), (5,), (), (2, 3, 2)]


def _tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def test_path_adds_up_what_the_moves_did() -> None:
    """Minus gradient times move; on a straight way down a plane it is the fall, whatever the steps."""
    path, slope = [torch.zeros(2)], [torch.tensor([3.0, -1.0])]
    way = [torch.tensor(point) for point in ([1.0, 1.0], [0.5, 1.0], [0.0, 2.0])]
    for before, after in pairwise(way):
        path_integral_(path, slope, [before.clone()], [after])
    assert torch.equal(path[0], torch.tensor([3.0, 1.0]))


def test_path_in_half_precision_is_kept_in_float32() -> None:
    """Products that bfloat16 cannot hold add up."""
    path = [torch.full((2,), 100.0)]
    path_integral_(path, [torch.full((2,), 0.5).bfloat16()], [torch.ones(2).bfloat16()], [torch.zeros(2).bfloat16()])
    assert torch.equal(path[0], torch.full((2,), 100.5))


@pytest.mark.parametrize("clamp", [False, True])
def test_importance_is_the_paper_s(monkeypatch: pytest.MonkeyPatch, clamp: bool) -> None:
    """Also in blocks, and negative unless clamped."""
    monkeypatch.setattr(blocks, "_BLOCK", 5)
    importance, path, start, end = (_tensors(seed) for seed in range(4))
    expected = [o + w / ((b - a) ** 2 + 0.3) for o, w, a, b in zip(importance, path, start, end, strict=True)]
    assert min(value.min() for value in expected) < 0
    expected = [value.clamp(min=0) if clamp else value for value in expected]
    path_importance_(importance, path, start, end, 0.3, clamp)
    torch.testing.assert_close(importance, expected)


def test_lists_must_match() -> None:
    """A weight left out would have no importance."""
    one, two = [torch.zeros(2)], [torch.zeros(2), torch.zeros(2)]
    with pytest.raises(ValueError, match="zip"):
        path_integral_(two, two, two, one)
    with pytest.raises(ValueError, match="zip"):
        path_importance_(two, two, two, one, 0.1)
