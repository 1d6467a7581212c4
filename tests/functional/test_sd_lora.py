"""Directions and magnitudes of low-rank products, from their factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_cl.functional import direction_and_magnitude, fit_direction


def factors(seed: int, rank: int = 3) -> tuple[Tensor, Tensor]:
    """Random A [r, 7] and B [5, r]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, 7, generator=generator), torch.randn(5, rank, generator=generator)


def test_direction_has_norm_one_and_the_magnitude_gives_the_product_back() -> None:
    """The norm is that of the product, which is not the product of the norms."""
    down, up = factors(0)
    new_down, new_up, norm = direction_and_magnitude(down, up)
    torch.testing.assert_close(norm, (up @ down).norm())
    torch.testing.assert_close((new_up @ new_down).norm(), torch.tensor(1.0))
    torch.testing.assert_close(norm * new_up @ new_down, up @ down)
    assert norm < 0.8 * down.norm() * up.norm()


def test_both_factors_take_half_of_the_norm() -> None:
    """Neither is left large."""
    down, up = factors(0)
    new_down, new_up, norm = direction_and_magnitude(down, up)
    torch.testing.assert_close(new_down * norm.sqrt(), down)
    torch.testing.assert_close(new_up * norm.sqrt(), up)


def test_an_update_of_zero_has_no_direction() -> None:
    """Zeros, not NaN."""
    down, up, norm = direction_and_magnitude(torch.randn(3, 7), torch.zeros(5, 3))
    assert (norm, down.abs().sum(), up.abs().sum()) == (0, 0, 0)


def test_fit_equals_least_squares_on_whole_matrices() -> None:
    """Coefficients and residual of the flattened products."""
    directions, (down, up) = [factors(1), factors(2)], factors(3)
    coefficients, residual = fit_direction(down, up, directions)
    columns = torch.stack([(b @ a).flatten() for a, b in directions], 1)
    target = (up @ down).flatten()
    expected = torch.linalg.lstsq(columns, target[:, None]).solution[:, 0]
    torch.testing.assert_close(coefficients, expected)
    torch.testing.assert_close(residual, (target - columns @ expected).norm() / target.norm())


def test_what_lies_in_the_span_leaves_nothing() -> None:
    """Also where one direction is there twice: the shortest coefficients share."""
    down, up = factors(1)
    coefficients, residual = fit_direction(2 * down, up, [(down, up), (down, up)])
    torch.testing.assert_close(coefficients, torch.tensor([1.0, 1.0]))
    assert residual == pytest.approx(0.0, abs=1e-6)


def test_fit_without_directions_or_without_an_update() -> None:
    """Nothing explains an update; an update of zero needs nothing."""
    down, up = factors(1)
    coefficients, residual = fit_direction(down, up, [])
    assert (len(coefficients), residual) == (0, 1)
    coefficients, residual = fit_direction(down, torch.zeros_like(up), [factors(2)])
    assert (coefficients.tolist(), residual) == ([0.0], 0)
