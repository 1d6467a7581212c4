"""Products of factors: their best approximation and their norm."""

from __future__ import annotations

import pytest
import torch

from lightning_cl.functional.low_rank import product_norm, truncate_factors


def factors(rank: int, inputs: int = 7, outputs: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Random factors, float64."""
    generator = torch.Generator().manual_seed(rank)
    draw = {"generator": generator, "dtype": torch.float64}
    return torch.randn(rank, inputs, **draw), torch.randn(outputs, rank, **draw)


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_truncation_is_the_best_of_its_rank(rank: int) -> None:
    """The product is that of the dense SVD cut at the rank, and so is the error."""
    down, up = factors(6)
    new_down, new_up, error = truncate_factors(down, up, rank)
    vectors, values, covectors = torch.linalg.svd(up @ down, full_matrices=False)
    torch.testing.assert_close(new_up @ new_down, vectors[:, :rank] * values[:rank] @ covectors[:rank])
    assert error == pytest.approx(float((values[rank:].square().sum() / values.square().sum()).sqrt()))
    # neither factor takes more of the size than the other
    torch.testing.assert_close(new_up.mT @ new_up, new_down @ new_down.mT)


def test_nothing_is_lost_within_the_rank() -> None:
    """Of a product of rank 2, given as 6 factors, nothing is cut at rank 4, and two ranks are left empty."""
    down, up = factors(2)
    double_down, double_up = torch.cat([down, down, down]), torch.cat([up, up, up], 1) / 3
    new_down, new_up, error = truncate_factors(double_down, double_up, 4)
    torch.testing.assert_close(new_up @ new_down, up @ down)
    assert error < 1e-7
    assert new_up[:, 2:].abs().max() < 1e-6


def test_more_rank_than_the_matrix_has() -> None:
    """The shape is what was asked for, filled up by zeros."""
    down, up = factors(9)
    new_down, new_up, error = truncate_factors(down.float(), up.float(), 8)
    assert new_down.shape == (8, 7)
    assert new_up.shape == (5, 8)
    assert new_down.dtype == torch.float32
    torch.testing.assert_close(new_up @ new_down, (up @ down).float())
    assert error == 0
    assert not new_up[:, 5:].any()


def test_of_nothing_nothing_is_lost() -> None:
    """A product of zeros has no relative error."""
    new_down, new_up, error = truncate_factors(torch.ones(3, 4), torch.zeros(2, 3), 1)
    assert error == 0
    assert not (new_up @ new_down).any()


def test_norm_of_a_product() -> None:
    """It is that of the dense product, from factors in any precision."""
    down, up = factors(3)
    torch.testing.assert_close(product_norm(down, up), (up @ down).norm())
    torch.testing.assert_close(product_norm(down.bfloat16(), up), (up @ down.bfloat16().double()).norm())


def test_a_product_of_lower_rank_leaves_zeros() -> None:
    """Also where the factors have more rows than it has, and their rounding would show."""
    down = torch.randn(3, 10)
    down, up = torch.cat([down, down, torch.randn(2, 10)]), torch.cat([torch.randn(7, 6), torch.zeros(7, 2)], 1)
    new_down, new_up, error = truncate_factors(down, up, 5)
    assert new_down.any(1).tolist() == new_up.any(0).tolist() == [True] * 3 + [False] * 2
    assert error < 1e-12
    torch.testing.assert_close(new_up @ new_down, up @ down)
