"""Penalties on the factor A of a LoRA against those of earlier tasks."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lightning_cl.functional import orthogonality_gradient_, orthogonality_penalty
from lightning_cl.functional.olora import OrthogonalityForm

FORMS = get_args(OrthogonalityForm)


def factors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Three new rows and five old ones of seven inputs."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(rows, 7, generator=generator, dtype=torch.float64).to(dtype) for rows in (3, 5))


def by_pairs(new: Tensor, past: Tensor, form: str) -> Tensor:
    """The penalty, pair of rows by pair of rows."""
    total = torch.zeros((), dtype=new.dtype)
    for row in new:
        for old in past:
            product = row @ old
            if form == "cosine":
                total = total + cosine_similarity(row, old, dim=0) ** 2 / len(past)
            else:
                total = total + (product**2 if form == "squared" else product.abs())
    return total


@pytest.mark.parametrize("form", FORMS)
def test_value_is_that_of_all_pairs(form: OrthogonalityForm) -> None:
    """Each form, against its definition."""
    new, past = factors()
    torch.testing.assert_close(orthogonality_penalty(new, past, form), by_pairs(new, past, form))


@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_that_of_autograd(form: OrthogonalityForm) -> None:
    """Added to what is there, with its strength."""
    new, past = factors()
    row = new.clone().requires_grad_()
    (expected,) = torch.autograd.grad(0.3 * by_pairs(row, past, form), row)
    gradient = torch.ones_like(new)
    orthogonality_gradient_(gradient, new, past, 0.3, form)
    torch.testing.assert_close(gradient, 1 + expected)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_two_ranks_add_up(form: OrthogonalityForm) -> None:
    """Also where a rank holds no row."""
    new, past = factors()
    parts = [new[:2], new[2:], new[3:]]
    values = [orthogonality_penalty(part, past, form) for part in parts]
    torch.testing.assert_close(sum(values), orthogonality_penalty(new, past, form))
    whole, pieces = torch.zeros_like(new), [torch.zeros_like(part) for part in parts]
    orthogonality_gradient_(whole, new, past, 1.0, form)
    for piece, part in zip(pieces, parts, strict=True):
        orthogonality_gradient_(piece, part, past, 1.0, form)
    torch.testing.assert_close(torch.cat(pieces), whole)


@pytest.mark.parametrize("form", FORMS)
def test_without_old_rows_there_is_nothing(form: OrthogonalityForm) -> None:
    """Exactly: not a rounding error, not NaN."""
    new, past = factors()
    gradient = torch.zeros_like(new)
    orthogonality_gradient_(gradient, new, past[:0], 1.0, form)
    assert not gradient.any()
    assert orthogonality_penalty(new, past[:0], form) == 0


@pytest.mark.parametrize("form", FORMS)
def test_orthogonal_rows_are_free(form: OrthogonalityForm) -> None:
    """Value and gradient vanish."""
    new, past = torch.eye(4)[:2], 3 * torch.eye(4)[2:]
    gradient = torch.zeros_like(new)
    orthogonality_gradient_(gradient, new, past, 1.0, form)
    assert not gradient.any()
    assert orthogonality_penalty(new, past, form) == 0


def test_cosine_knows_no_scale() -> None:
    """The value stays, from 0 to 1 for a row; a gradient along the row would change its length alone."""
    new, past = factors()
    torch.testing.assert_close(
        orthogonality_penalty(10 * new, 0.1 * past, "cosine"), orthogonality_penalty(new, past, "cosine")
    )
    torch.testing.assert_close(orthogonality_penalty(past[:1], past[:1], "cosine"), torch.ones((), dtype=torch.float64))
    gradient = torch.zeros_like(new)
    orthogonality_gradient_(gradient, new, past, 1.0, "cosine")
    torch.testing.assert_close((gradient * new).sum(1), torch.zeros(3, dtype=torch.float64))


def test_a_row_of_zeros_has_no_direction() -> None:
    """Neither NaN nor infinite."""
    new, past = factors(torch.float32)
    new[0], past[1] = 0, 0
    gradient = torch.zeros_like(new)
    orthogonality_gradient_(gradient, new, past, 1.0, "cosine")
    assert not gradient[0].any()
    assert gradient[1:].isfinite().all()
    assert orthogonality_penalty(new, past, "cosine").isfinite()


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_rounded_once(form: OrthogonalityForm) -> None:
    """The products are formed in float32."""
    new, past = factors(torch.bfloat16)
    gradient = torch.zeros_like(new)
    orthogonality_gradient_(gradient, new, past, 0.3, form)
    exact = torch.zeros_like(new, dtype=torch.float32)
    orthogonality_gradient_(exact, new.float(), past.float(), 0.3, form)
    torch.testing.assert_close(gradient, exact.bfloat16(), rtol=0, atol=0)
    assert orthogonality_penalty(new, past, form).dtype == torch.float32
