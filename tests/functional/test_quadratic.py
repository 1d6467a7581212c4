"""The quadratic penalty: value and gradient."""

from __future__ import annotations

import pytest
import torch

from lightning_cl.functional import blocks, quadratic
from lightning_cl.functional.quadratic import quadratic_gradient_, quadratic_penalty

SHAPES = [(3, 4), (5,), (), (2, 3, 2)]


def _tensors(seed, positive=False):
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [value.abs() for value in values] if positive else values


def test_penalty_by_hand():
    """3/2 * (2 * (1-0)^2 + 4 * (5-2)^2 + 0.5)."""
    value = quadratic_penalty(
        [torch.tensor([1.0, 5.0])], [torch.tensor([0.0, 2.0])], [torch.tensor([2.0, 4.0])], 3.0, 0.5
    )
    assert value.item() == pytest.approx(1.5 * 38.5)
    assert quadratic_penalty([], [], [], 3.0).item() == 0


def test_without_importance_every_weight_counts_as_one():
    """Value and gradient are those of ones, none of which is stored."""
    params, anchors = _tensors(0), _tensors(1)
    ones = [torch.ones_like(p) for p in params]
    assert torch.equal(quadratic_penalty(params, anchors, None, 3.0), quadratic_penalty(params, anchors, ones, 3.0))
    for way in (quadratic_gradient_, quadratic._gradient_by_loop_, quadratic._gradient_by_foreach_):
        expected, grads = _tensors(3), _tensors(3)
        way(expected, params, anchors, ones, 3.0)
        way(grads, params, anchors, None, 3.0)
        torch.testing.assert_close(grads, expected)
        assert not torch.equal(grads[0], _tensors(3)[0])


@pytest.mark.parametrize("way", [quadratic_gradient_, quadratic._gradient_by_loop_, quadratic._gradient_by_foreach_])
def test_gradient_is_that_of_the_penalty(way):
    """Autograd through the penalty, added to gradients that were there."""
    params = [p.requires_grad_() for p in _tensors(0)]
    anchors, importance, grads = _tensors(1), _tensors(2, positive=True), _tensors(3)
    expected = torch.autograd.grad(quadratic_penalty(params, anchors, importance, 7.0), params)
    expected = [grad + more for grad, more in zip(grads, expected, strict=True)]
    with torch.no_grad():
        way(grads, params, anchors, importance, 7.0)
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("way", [quadratic._gradient_by_loop_, quadratic._gradient_by_foreach_])
def test_gradient_in_blocks_and_buckets(monkeypatch, way):
    """Cutting large tensors and long lists changes nothing, also where memory is not contiguous."""
    params, anchors, importance, grads = _tensors(0), _tensors(1), _tensors(2, positive=True), _tensors(3)
    expected = [g + 7.0 * f * (p - a) for g, p, a, f in zip(grads, params, anchors, importance, strict=True)]
    monkeypatch.setattr(blocks, "_BLOCK", 5)
    monkeypatch.setattr(blocks, "_BUCKET", 13)
    grads[0] = grads[0].t().contiguous().t()
    way(grads, params, anchors, importance, 7.0)
    torch.testing.assert_close(grads, expected)


@pytest.mark.parametrize("way", [quadratic._gradient_by_loop_, quadratic._gradient_by_foreach_])
def test_half_precision_gradients_are_rounded_once(way):
    """The sum is formed in float32 from the float32 state."""
    params, grads = ([t.bfloat16() for t in _tensors(seed)] for seed in (0, 3))
    anchors, importance = _tensors(1), _tensors(2, positive=True)
    rows = zip(grads, params, anchors, importance, strict=True)
    expected = [(g.float() + 7.0 * f * (p.float() - a)).bfloat16() for g, p, a, f in rows]
    way(grads, params, anchors, importance, 7.0)
    torch.testing.assert_close(grads, expected, rtol=2**-8, atol=0)
    assert {grad.dtype for grad in grads} == {torch.bfloat16}


def test_lists_must_match():
    """A missing anchor would leave a weight unprotected."""
    with pytest.raises(ValueError, match="zip"):
        quadratic_gradient_([torch.zeros(2)] * 2, [torch.ones(2)] * 2, [torch.zeros(2)], [torch.ones(2)] * 2, 1.0)
