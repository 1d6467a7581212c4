"""EWC: merging Fisher terms over tasks."""

from __future__ import annotations

import pytest
import torch

from lightning_cl.functional.ewc import merge_online_, merge_separate_
from lightning_cl.functional.quadratic import quadratic_penalty

SHAPES = [(3, 4), (5,), (), (2, 3, 2)]


def _tensors(seed, positive=False):
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [value.abs() for value in values] if positive else values


def test_merge_online():
    """Two merges by hand: 0.5 * (0.5 * 0 + 4) + 1."""
    fisher = [torch.zeros(1)]
    merge_online_(fisher, [torch.tensor([4.0])], 0.5)
    merge_online_(fisher, [torch.tensor([1.0])], 0.5)
    assert fisher[0].item() == 3.0


def test_merge_separate_equals_the_sum_over_five_tasks():
    """Value and gradient of one quadratic per task, with weights that some or all tasks ignore."""
    tasks = [(_tensors(10 + t, positive=True), _tensors(20 + t)) for t in range(5)]
    for t, (fisher, _) in enumerate(tasks):
        fisher[0][0] = 0  # no task cares
        fisher[0][1] *= t == 2  # one does
    total, centre = [torch.zeros(s) for s in SHAPES], [torch.zeros(s) for s in SHAPES]
    constant = sum(merge_separate_(total, centre, fisher, anchor) for fisher, anchor in tasks)
    params = [p.requires_grad_() for p in _tensors(0)]

    expected = sum(quadratic_penalty(params, anchor, fisher, 3.0) for fisher, anchor in tasks)
    actual = quadratic_penalty(params, centre, total, 3.0, constant)
    torch.testing.assert_close(actual.float(), expected)
    torch.testing.assert_close(torch.autograd.grad(actual, params), torch.autograd.grad(expected, params))
    assert torch.equal(centre[0][0], tasks[-1][1][0][0])  # nothing holds it: the latest weights
    assert torch.equal(centre[0][1], tasks[2][1][0][1])


def test_merge_separate_keeps_its_precision():
    """A tiny Fisher neither divides by zero nor moves a centre that a large one holds."""
    total, centre = [torch.tensor([1e-38, 1e6])], [torch.tensor([1.0, 1.0])]
    constant = merge_separate_(total, centre, [torch.tensor([1e-38, 1e-6])], [torch.tensor([3.0, 3.0])])
    torch.testing.assert_close(centre[0], torch.tensor([2.0, 1.0]))
    assert constant.item() == pytest.approx(4e-6)
