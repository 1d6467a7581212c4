"""Frozen factors A."""

from __future__ import annotations

import pytest
import torch

from lightning_cl.functional import orthonormal_rows


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 8), (5, 5)])
def test_rows_are_orthonormal(rows: int, columns: int) -> None:
    """To the rounding of float32."""
    down = orthonormal_rows(rows, columns, torch.Generator().manual_seed(0))
    assert down.shape == (rows, columns)
    assert down.dtype == torch.float32
    torch.testing.assert_close(down @ down.mT, torch.eye(rows), rtol=0, atol=1e-6)


def test_the_generator_decides() -> None:
    """The same seed gives the same matrix, another one another."""
    first, again, other = (orthonormal_rows(2, 6, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1


def test_all_directions_are_as_likely() -> None:
    """No entry leans towards one side: the mean of many draws is that of many independent ones."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.stack([orthonormal_rows(3, 4, generator) for _ in range(2000)]).mean(0)
    # entries have a variance of 1/4
    assert mean.abs().max() < 4 * (0.25 / 2000) ** 0.5


def test_more_rows_than_columns_are_refused() -> None:
    """They cannot be orthogonal."""
    with pytest.raises(ValueError, match="3 rows of 2 entries"):
        orthonormal_rows(3, 2, torch.Generator())
