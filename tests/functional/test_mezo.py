"""Directions that are drawn again: normal, the same in whatever pieces, and moved along with one rounding."""

from __future__ import annotations

import pytest
import torch

from lightning_cl.core.live_bytes import LiveBytes
from lightning_cl.functional import mezo
from lightning_cl.functional.mezo import direction, move_along_, projected_gradient
from lightning_cl.functional.sparse_masks import derived_key

KEY = (3, 1, 4)


def test_projected_gradient() -> None:
    """A central difference is exact for a quadratic, whatever its distance."""
    at, along, eps = 1.5, 0.7, 0.25
    plus, minus = ((at + side * eps * along) ** 2 for side in (1, -1))
    assert projected_gradient(plus, minus, eps) == pytest.approx(2 * at * along, rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_directions_are_standard_normal(dtype: torch.dtype) -> None:
    """Mean, variance and kurtosis over several blocks; numbers of 32 bits at least."""
    drawn = direction(torch.empty(600, 1000, dtype=dtype), KEY)
    assert drawn.shape == (600, 1000)
    assert drawn.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    values = drawn.double()
    assert abs(float(values.mean())) < 0.006
    assert float(values.var()) == pytest.approx(1.0, abs=0.01)
    assert float(values.pow(4).mean()) == pytest.approx(3.0, abs=0.06)


def test_each_number_of_the_key_and_each_block_changes_the_direction() -> None:
    """Seed, parameter and step, and what lies further on in a parameter: none repeats another."""
    drawn = [direction(torch.empty(mezo._BLOCK * 2), key) for key in (KEY, (4, 1, 4), (3, 2, 4), (3, 1, 5), (3, 4, 1))]
    rows = torch.cat([one.view(2, -1) for one in drawn]).double()
    correlations = rows @ rows.T / mezo._BLOCK - torch.eye(10)
    assert float(correlations.abs().max()) < 0.012


def test_definition_of_a_direction() -> None:
    """It stays the same from one version to the next: resumed runs go on along it."""
    numel = mezo._BLOCK + 100
    assert mezo._BLOCK == 262_144
    parts = []
    for block, size in enumerate((mezo._BLOCK, 100)):
        generator = torch.Generator().manual_seed(derived_key(*KEY, block))
        parts.append(torch.randn(size, generator=generator))
    assert torch.equal(direction(torch.empty(numel), KEY), torch.cat(parts))


@pytest.mark.parametrize("start", [0, 1, 8, 13, 37])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 20])
def test_a_part_moves_as_in_the_whole(start: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it begins and ends, within blocks and across them."""
    monkeypatch.setattr(mezo, "_BLOCK", 8)
    whole = torch.arange(57, dtype=torch.float64)
    part = whole[start : start + size].clone()
    move_along_(whole, 0.3, KEY)
    move_along_(part, 0.3, KEY, start=start, numel=57)
    assert torch.equal(part, whole[start : start + size])
    expected = torch.arange(57, dtype=torch.float64) + 0.3 * direction(whole, KEY)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("keep", [1.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moves_round_once(keep: float, dtype: torch.dtype) -> None:
    """What is below the resolution of the weights is not lost before it is added."""
    weight = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = (keep * weight.double() + 0.01 * direction(weight, KEY).double()).to(dtype)
    move_along_(weight, 0.01, KEY, keep=keep)
    # the sums themselves are of 32 bits
    tolerance = 1e-6 if dtype == torch.float32 else 0.0
    torch.testing.assert_close(weight, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("keep", [1.0, 0.9])
def test_a_move_holds_one_block(keep: float) -> None:
    """Not the direction of the whole parameter."""
    weight = torch.zeros(5, mezo._BLOCK)
    with LiveBytes([weight]) as live:
        move_along_(weight, 0.1, KEY, keep=keep)
    assert live.peak == 4 * 6 * mezo._BLOCK
    assert weight.all()


def test_nothing_to_move() -> None:
    """An empty parameter, and an empty shard, are left alone."""
    assert direction(torch.empty(0, 3), KEY).shape == (0, 3)
    move_along_(torch.empty(0, 3), 1.0, KEY)
    move_along_(torch.empty(0), 1.0, KEY, start=12, numel=12)
