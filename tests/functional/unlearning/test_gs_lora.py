"""The terms of GS-LoRA against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from lightning_cl.functional.unlearning import (
    add_group_lasso_,
    bounded_cross_entropy,
    group_lasso,
    prototype_divergence,
    squared_norm,
)


def test_below_the_bound_it_is_ascent():
    """The gradient is that of minus the mean cross-entropy, and past the bound there is none."""
    logits, labels = torch.randn(5, 4, requires_grad=True), torch.tensor([0, 1, -100, 3, 3])
    loss = bounded_cross_entropy(logits, labels, bound=50.0)
    mean = cross_entropy(logits, labels)
    torch.testing.assert_close(loss, 50.0 - mean)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, -mean)))
    past = bounded_cross_entropy(logits, labels, bound=0.01)
    assert past == 0
    assert not torch.autograd.grad(past, logits)[0].any()


def test_the_hinge_is_on_the_mean():
    """One sample that is far beyond the bound lets the others be."""
    logits = torch.tensor([[-30.0, 0.0], [0.0, -3.0]])
    assert bounded_cross_entropy(logits, torch.tensor([0, 0]), bound=10.0) == 0


def test_the_default_bound_follows_the_number_of_classes():
    """A guess costs ln C, the bound is twice that."""
    logits = torch.zeros(2, 3, 10)
    labels = torch.tensor([[-100, 4, 5], [-100, -100, 2]])
    torch.testing.assert_close(bounded_cross_entropy(logits, labels), torch.tensor(math.log(10)))


def test_nothing_supervised_is_a_zero_with_a_graph():
    """Whatever the scores hold."""
    logits = torch.full((2, 3), torch.inf, requires_grad=True)
    loss = bounded_cross_entropy(logits, torch.tensor([-100, -100]))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan")])
def test_the_bound_is_above_zero(bound):
    """The message names the setting."""
    with pytest.raises(ValueError, match="`bound`"):
        bounded_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), bound=bound)


def test_lasso_is_the_sum_of_norms():
    """Each group is a root over all of its factors, not over each of them."""
    groups = [[torch.randn(2, 3), torch.randn(4, 2)], [torch.randn(5)]]
    found = group_lasso(torch.stack([squared_norm(group) for group in groups]))
    expected = sum(torch.cat([weight.flatten() for weight in group]).norm() for group in groups)
    torch.testing.assert_close(found, expected)


def test_lasso_of_a_zero_group_has_gradient_zero():
    """The root's own gradient is infinite there; with weights in front of it, NaN."""
    weights = [torch.zeros(3, requires_grad=True), torch.tensor([3.0, 4.0], requires_grad=True)]
    group_lasso(torch.stack([squared_norm([weight]) for weight in weights])).backward()
    assert torch.equal(weights[0].grad, torch.zeros(3))
    torch.testing.assert_close(weights[1].grad, torch.tensor([0.6, 0.8]))


def test_gradient_by_hand_is_that_of_autograd():
    """Also on shards, each with its part of the weights and the norm of the whole."""
    weights = [torch.randn(4, 3, requires_grad=True), torch.randn(6, 2, requires_grad=True)]
    (0.3 * group_lasso(squared_norm(weights)[None])).backward()
    gradients = [torch.ones(4, 3), torch.ones(6, 2)]
    whole = squared_norm(weights).detach()
    for rows in (slice(0, 2), slice(2, None)):
        parts = [weight.detach()[rows] for weight in weights]
        add_group_lasso_([gradient[rows] for gradient in gradients], parts, whole, strength=0.3)
    for gradient, weight in zip(gradients, weights, strict=True):
        torch.testing.assert_close(gradient, 1 + weight.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_a_zero_group_is_finite(dtype):
    """Nothing is added, in any dtype."""
    gradient = torch.ones(2, 2, dtype=dtype)
    add_group_lasso_([gradient], [torch.zeros(2, 2, dtype=dtype)], torch.tensor(0.0), strength=1.0)
    assert torch.equal(gradient, torch.ones(2, 2, dtype=dtype))


def test_divergence_from_prototypes_is_that_of_torch():
    """Each sample against the prototype of its class; samples of other classes have no part."""
    features = torch.randn(5, 6, requires_grad=True)
    prototypes, classes = torch.randn(3, 6), torch.tensor([1, 4, 7])
    labels = torch.tensor([7, 1, 2, 7, -100])
    found = prototype_divergence(features, labels, prototypes, classes)
    wanted = prototypes[[2, 0, 2]].softmax(-1)
    expected = kl_div(log_softmax(features[[0, 1, 3]], -1), wanted, reduction="batchmean")
    torch.testing.assert_close(found, expected)
    found.backward()
    assert not features.grad[[2, 4]].any()
    assert prototype_divergence(prototypes[:1], torch.tensor([1]), prototypes, classes) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("classes", [[], [3]])
def test_divergence_of_nothing_is_a_zero_with_a_graph(classes):
    """No prototype for any sample, or none at all."""
    features = torch.full((1, 2), torch.nan, requires_grad=True)
    rows = torch.zeros(len(classes), 2)
    loss = prototype_divergence(features, torch.tensor([0]), rows, torch.tensor(classes, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    assert not features.grad.any()
