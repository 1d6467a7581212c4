"""Scores by angles."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_cl.functional import cosine_scores


def test_angles_worked_by_hand() -> None:
    """60 degrees, 90 and 180, whatever the lengths."""
    features = torch.tensor([[2.0, 0.0]])
    weight = torch.tensor([[0.5, math.sqrt(0.75)], [0.0, 7.0], [-3.0, 0.0]])
    scores = cosine_scores(features, weight, torch.tensor([4.0]))
    torch.testing.assert_close(scores, torch.tensor([[2.0, 0.0, -4.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_zero_vectors_are_no_nan_in_half_precision(dtype: torch.dtype) -> None:
    """Neither as a feature nor as a weight, nor in their gradients."""
    features = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=dtype, requires_grad=True)
    weight = torch.tensor([[0.0, 0.0], [3.0, 0.0]], dtype=dtype, requires_grad=True)
    scores = cosine_scores(features, weight, torch.tensor([10.0], dtype=dtype))
    assert scores.tolist() == [[0.0, 0.0], [0.0, 10.0]]
    scores[1, 1].backward()
    assert features.grad is not None
    assert weight.grad is not None
    assert not (features.grad.isnan().any())
    assert not (weight.grad.isnan().any())


def test_gradients_turn_weights_and_do_not_stretch_them() -> None:
    """The gradient of a weight is orthogonal to it, so that a step of SGD changes its angle."""
    generator = torch.Generator().manual_seed(0)
    features, weight = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (3, 4))
    weight.requires_grad_()
    scale = torch.tensor([10.0], dtype=torch.float64, requires_grad=True)
    scores = cosine_scores(features, weight, scale)
    scores.logsumexp(1).sum().backward()
    assert weight.grad is not None
    assert scale.grad is not None
    assert (weight.grad * weight).sum(1).abs().max() < 1e-12 < weight.grad.norm(dim=1).min()
    assert scale.grad.abs() > 0.1
