"""The quadratic program of GEM, against the search through all sets of constraints."""

from __future__ import annotations

import itertools
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from lightning_cl.functional import agem_coefficient, gem_coefficients

GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape: int) -> Tensor:
    """Return numbers from one generator."""
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


def searched(rows: Tensor, g: Tensor, lower: float = 0.0) -> Tensor:
    """The nearest step: of all sets of variables at their bound the feasible one of the least objective."""
    gram, products, count = rows @ rows.T, rows @ g, len(rows)
    best: tuple[float, Tensor] | None = None
    for size in range(count + 1):
        for chosen in itertools.combinations(range(count), size):
            free = list(chosen)
            v = torch.full((count,), lower, dtype=torch.float64)
            bound = [k for k in range(count) if k not in free]
            if free:
                rest = -products[free] - gram[free][:, bound] @ v[bound]
                v[free] = torch.linalg.pinv(gram[free][:, free], hermitian=True, rtol=1e-13) @ rest
            if (v >= lower - 1e-12).all():
                value = float(0.5 * v @ gram @ v + products @ v)
                if best is None or value < best[0]:
                    best = value, g + v @ rows
    assert best is not None
    return best[1]


def drawn(kind: str) -> tuple[Tensor, Tensor]:
    """A problem with up to five tasks and up to seven weights."""
    count, size = (int(torch.randint(low, 6 + low, (), generator=GENERATOR)) for low in (0, 1))
    rows, g = randn(max(count, 1), size), randn(size)
    if kind == "identical tasks":
        rows = torch.cat([rows, rows[:1], rows[:1]])
    elif kind == "a task of zeros":
        rows = torch.cat([rows, torch.zeros(1, size, dtype=torch.float64)])
    elif kind == "opposite tasks":
        rows = torch.cat([rows, -2 * rows[:1]])
    elif kind == "dependent tasks":
        rows = torch.cat([rows, rows.sum(0, keepdim=True), rows[:1] - rows[-1:]])
    elif kind == "unequal lengths":
        rows = rows * 10.0 ** torch.arange(-3, 3)[: len(rows), None]
    return rows, g


KINDS = ["any", "identical tasks", "a task of zeros", "opposite tasks", "dependent tasks", "unequal lengths"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_is_the_nearest_that_meets_all_constraints(kind: str) -> None:
    """Exactly, also where constraints depend on each other or are more than weights."""
    conflicts = 0
    for _ in range(25):
        rows, g = drawn(kind)
        v = gem_coefficients(rows @ rows.T, rows @ g)
        step = g + v @ rows
        lengths = rows.norm(dim=1).clamp_min(1e-9) * g.norm()
        assert (v >= 0).all()
        assert (rows @ step / lengths > -1e-9).all()
        # the length of a reference does not matter, but to the accuracy of the search
        units = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-9)
        torch.testing.assert_close(step, searched(units, g), rtol=0, atol=1e-7)
        conflicts += bool(v.any())
    assert conflicts > 8


def test_without_a_violation_nothing_is_added() -> None:
    """Not even the margin."""
    rows = torch.eye(3, dtype=torch.float64)
    for mode in ("added", "bound"):
        assert not gem_coefficients(rows, torch.ones(3), margin=0.5, mode=mode).any()  # type: ignore[arg-type]


def test_one_task_is_the_projection_of_agem() -> None:
    """With one constraint the program has the closed form."""
    for _ in range(20):
        r, g = randn(1, 4), randn(4)
        expected = agem_coefficient(r @ g, (r @ r.T).diagonal())
        torch.testing.assert_close(gem_coefficients(r @ r.T, r @ g), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", ["added", "bound"])
def test_the_margin(mode: Literal["added", "bound"]) -> None:
    """Added to the solution, or a lower bound of it: two different programs."""
    differing = 0
    for _ in range(30):
        rows, g = randn(3, 6), randn(6)
        plain = gem_coefficients(rows @ rows.T, rows @ g)
        v = gem_coefficients(rows @ rows.T, rows @ g, margin=0.3, mode=mode)
        if not plain.any():
            continue
        if mode == "added":
            torch.testing.assert_close(v, plain + 0.3)
        else:
            assert (v >= 0.3).all()
            torch.testing.assert_close(g + v @ rows, searched(rows, g, lower=0.3), rtol=0, atol=1e-8)
            differing += not torch.allclose(v, plain + 0.3)
    assert differing > 5 or mode == "added"


def test_gradients_that_are_nearly_the_same() -> None:
    """Of many tasks, in float32: the program ends, and the constraints are met to its accuracy."""
    rows = (randn(1, 50) + 1e-7 * randn(30, 50)).float().double()
    g = -rows[0] + randn(50)
    step = g + gem_coefficients(rows @ rows.T, rows @ g) @ rows
    assert (rows @ step).min() > -1e-5 * float(rows[0].norm() * g.norm())


def test_gradients_that_differ_little() -> None:
    """They are two constraints, not one, as long as they differ by more than rounding."""
    rows = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.01, 0.0]], dtype=torch.float64)
    g = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64) - rows[0] - 3 * rows[1]
    expected = torch.tensor([1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(gem_coefficients(rows @ rows.T, rows @ g), expected, rtol=1e-9, atol=0)


def test_of_several_variables_only_the_first_at_its_bound_is_bound() -> None:
    """Binding all that a step would take below zero ends beside the solution."""
    rows = torch.tensor([[0, -3, 6], [2, 2, -2], [-2, 3, 6], [2, 6, 0]], dtype=torch.float64)
    g = torch.tensor([-1, -5, 3], dtype=torch.float64)
    v = gem_coefficients(rows @ rows.T, rows @ g)
    torch.testing.assert_close(v, torch.tensor([0, 13 / 14, 0, 3 / 7], dtype=torch.float64))
    torch.testing.assert_close(g + v @ rows, searched(rows, g))


def test_products_that_no_gradient_has() -> None:
    """Rounding can make them: it ends, and the other constraints are met."""
    gram = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    v = gem_coefficients(gram, torch.tensor([-1.0, -1.0, -0.5]))
    assert v.tolist() == [1, 0, 0.5]


def test_many_tasks() -> None:
    """More than can be searched through: the conditions of optimality hold."""
    rows, g = randn(60, 200) + 0.3, randn(200) - 0.3
    v = gem_coefficients(rows @ rows.T, rows @ g)
    step = g + v @ rows
    assert (v > 0).sum() > 20
    assert (rows @ step).min() > -1e-9
    assert (rows @ step)[v > 0].abs().max() < 1e-9


@pytest.mark.parametrize("broken", ["gram", "products"])
def test_a_gradient_that_is_no_number_shows(broken: str) -> None:
    """Silence would leave the step unprotected, and a solver would not end."""
    given: dict[str, Any] = {"gram": torch.eye(2), "products": torch.tensor([-1.0, 1.0])}
    given[broken] = torch.full_like(given[broken], torch.nan)
    assert gem_coefficients(**given).isnan().all()
