"""Gradient episodic memory (Lopez-Paz and Ranzato 2017, arXiv:1706.08840): its quadratic program."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["gem_coefficients"]

# eigenvalues below this part of a constraint's own square are rounding: the constraints depend on each other
_RANK_TOLERANCE = 1e-13
# a violation below this part of the largest one is met
_TOLERANCE = 1e-12


def gem_coefficients(
    gram: Tensor, products: Tensor, margin: float = 0.0, mode: Literal["added", "bound"] = "added"
) -> Tensor:
    r"""Return the dual variables :math:`v^*` of GEM's program; the step is :math:`g + G^\top v`.

    .. math:: \min_{\tilde g} \frac{1}{2} \lVert \tilde g - g \rVert^2 \;\text{ s.t. }\; G \tilde g \ge 0
        \qquad \Longleftrightarrow \qquad \min_v \frac{1}{2} v^\top G G^\top v + g^\top G^\top v
        \;\text{ s.t. }\; v \ge 0

    with the gradients of the earlier tasks as rows of G (eqs. 8 and 11 of the paper). Solved exactly by an active set,
    in float64, also where constraints depend on each other: :math:`v^*` is then one of many, and the step is the same.
    A row of zeros forbids nothing.

    Args:
        gram: :math:`G G^\top`, [K, K].
        products: :math:`G g`, [K].
        margin: :math:`\gamma`, from 0; it favours the earlier tasks, also where they are in no danger.
        mode: ``"added"``: :math:`v = v^* + \gamma`, as the paper has it; ``"bound"``: the program is solved subject to
            :math:`v \ge \gamma`, as the authors' code has it.

    Returns:
        :math:`v`, float64 on the CPU, [K]; zeros if no constraint is violated.

    Example:
        >>> gradient = torch.tensor([-1.0, -1.0])
        >>> tasks = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> v = gem_coefficients(tasks @ tasks.T, tasks @ gradient)
        >>> v, gradient + v.float() @ tasks
        (tensor([0., 1.], dtype=torch.float64), tensor([0., 0.]))
    """
    gram, products = gram.detach().double().cpu(), products.detach().double().cpu()
    if bool((products >= 0).all()):
        return torch.zeros_like(products)
    if not bool(gram.isfinite().all() and products.isfinite().all()):
        # a gradient that is no number goes on as one, as a loss that is none does
        return torch.full_like(products, torch.nan)
    if mode == "bound":
        return margin + _solve(gram, products + margin * gram.sum(1))
    return margin + _solve(gram, products)


def _solve(gram: Tensor, linear: Tensor) -> Tensor:
    r"""Minimise :math:`\frac{1}{2} v^\top Q v + q^\top v` over :math:`v \ge 0` (Lawson and Hanson 1974, chapter 23).

    Args:
        gram: Q, positive semidefinite, with q in its range.
        linear: q.
    """
    scale = gram.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    gram, linear = gram / torch.outer(scale, scale), linear / scale
    v, value = torch.zeros_like(linear), linear.new_zeros(())
    free = torch.zeros_like(linear, dtype=torch.bool)
    barred = gram.diagonal() == 0
    tolerance = _TOLERANCE * linear.abs().max()
    while True:
        descent = (-(gram @ v) - linear).masked_fill(free | barred, -torch.inf)
        entering = int(descent.argmax())
        if descent[entering] <= tolerance:
            return v / scale
        tried, tried_free = _minimise_with(gram, linear, v, free, entering)
        tried_value = 0.5 * tried @ gram @ tried + linear @ tried
        if tried_value < value:
            v, free, value = tried, tried_free, tried_value
            barred = gram.diagonal() == 0
        else:
            # by rounding it gains nothing, so it would be tried for ever
            barred[entering] = True


def _minimise_with(gram: Tensor, linear: Tensor, v: Tensor, free: Tensor, entering: int) -> tuple[Tensor, Tensor]:
    """Free one more variable, and bind again those that would turn negative, until none does."""
    v, free = v.clone(), free.clone()
    free[entering] = True
    while True:
        block = gram[free][:, free]
        target = torch.zeros_like(v)
        target[free] = torch.linalg.pinv(block, hermitian=True, rtol=_RANK_TOLERANCE) @ -linear[free]
        blocking = free & (target <= 0)
        if not bool(blocking.any()):
            return target, free
        way = torch.where(blocking, torch.where(v > 0, v / (v - target), 0.0), torch.inf)
        reached = way.min()
        v = v + reached * (target - v) if reached > 0 else v
        free = free & ~(blocking & (way <= reached))
        v = torch.where(free, v, 0.0)
