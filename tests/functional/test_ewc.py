"""The quadratic of EWC: value, gradient, merging over tasks."""

from __future__ import annotations

import pytest
import torch

from lightning_cl.functional import ewc
from lightning_cl.functional.ewc import ewc_gradient_, ewc_penalty, merge_online_, merge_separate_

SHAPES = [(3, 4), (5,), (), (2, 3, 2)]


def _tensors(seed, positive=False):
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [value.abs() for value in values] if positive else values


def test_penalty_by_hand():
    """3/2 * (2 * (1-0)^2 + 4 * (5-2)^2 + 0.5)."""
    value = ewc_penalty([torch.tensor([1.0, 5.0])], [torch.tensor([0.0, 2.0])], [torch.tensor([2.0, 4.0])], 3.0, 0.5)
    assert value.item() == pytest.approx(1.5 * 38.5)
    assert ewc_penalty([], [], [], 3.0).item() == 0


@pytest.mark.parametrize("way", [ewc_gradient_, ewc._gradient_by_loop_, ewc._gradient_by_foreach_])
def test_gradient_is_that_of_the_penalty(way):
    """Autograd through the penalty, added to gradients that were there."""
    params = [p.requires_grad_() for p in _tensors(0)]
    anchors, fisher, grads = _tensors(1), _tensors(2, positive=True), _tensors(3)
    expected = torch.autograd.grad(ewc_penalty(params, anchors, fisher, 7.0), params)
    expected = [grad + more for grad, more in zip(grads, expected, strict=True)]
    with torch.no_grad():
        way(grads, params, anchors, fisher, 7.0)
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("way", [ewc._gradient_by_loop_, ewc._gradient_by_foreach_])
def test_gradient_in_blocks_and_buckets(monkeypatch, way):
    """Cutting large tensors and long lists changes nothing, also where memory is not contiguous."""
    params, anchors, fisher, grads = _tensors(0), _tensors(1), _tensors(2, positive=True), _tensors(3)
    expected = [g + 7.0 * f * (p - a) for g, p, a, f in zip(grads, params, anchors, fisher, strict=True)]
    monkeypatch.setattr(ewc, "_CPU_BLOCK", 5)
    monkeypatch.setattr(ewc, "_GPU_BUCKET", 13)
    grads[0] = grads[0].t().contiguous().t()
    way(grads, params, anchors, fisher, 7.0)
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("way", [ewc._gradient_by_loop_, ewc._gradient_by_foreach_])
def test_half_precision_gradients_are_rounded_once(way):
    """The sum is formed in float32 from the float32 state."""
    params, grads = ([t.bfloat16() for t in _tensors(seed)] for seed in (0, 3))
    anchors, fisher = _tensors(1), _tensors(2, positive=True)
    rows = zip(grads, params, anchors, fisher, strict=True)
    expected = [(g.float() + 7.0 * f * (p.float() - a)).bfloat16() for g, p, a, f in rows]
    way(grads, params, anchors, fisher, 7.0)
    torch.testing.assert_close(grads, expected, rtol=2**-8, atol=0)
    assert {grad.dtype for grad in grads} == {torch.bfloat16}


def test_lists_must_match():
    """A missing anchor would leave a weight unprotected."""
    with pytest.raises(ValueError, match="zip"):
        ewc_gradient_([torch.zeros(2)] * 2, [torch.ones(2)] * 2, [torch.zeros(2)], [torch.ones(2)] * 2, 1.0)


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

    expected = sum(ewc_penalty(params, anchor, fisher, 3.0) for fisher, anchor in tasks)
    actual = ewc_penalty(params, centre, total, 3.0, constant)
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
