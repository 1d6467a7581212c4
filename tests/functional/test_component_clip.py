"""Component-wise clipping on plain tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_cl.functional import clip_components_, squared_norms


def gradients(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Gradients of norms between 1 and 100."""
    generator = torch.Generator().manual_seed(0)
    return [(10**row * torch.randn(20, 3, generator=generator)).to(dtype) for row in range(3)]


def clipped(grads: list[Tensor], components: list[int], max_norm: float) -> list[Tensor]:
    """The gradients after clipping."""
    result, numbers = [grad.clone() for grad in grads], torch.tensor(components)
    clip_components_(result, numbers, squared_norms(result, numbers, max(components) + 1), max_norm)
    return result


def by_torch(grads: list[Tensor], max_norm: float) -> list[Tensor]:
    """One component, clipped by torch."""
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    nn.utils.clip_grad_norm_(params, max_norm)
    return [param.grad for param in params if param.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_component_is_torch(dtype: torch.dtype) -> None:
    """Clipped and unclipped, as `clip_grad_norm_`."""
    grads = gradients(dtype)
    for max_norm in (0.5, 1e6):
        torch.testing.assert_close(clipped(grads, [0, 0, 0], max_norm), by_torch(grads, max_norm))
    assert [grad.dtype for grad in clipped(grads, [0, 0, 0], 0.5)] == [dtype] * 3


def test_each_component_by_itself() -> None:
    """The first and the last share a component; the second, which is small enough, stays to the bit."""
    grads = gradients()
    first, second, third = clipped(grads, [1, 0, 1], 200.0)
    assert torch.equal(second, grads[1])
    torch.testing.assert_close([first, third], by_torch([grads[0], grads[2]], 200.0))
    assert not torch.equal(first, grads[0])


def test_norms_of_half_precision_are_not_rounded() -> None:
    """In float32: in bfloat16 this one would be 256."""
    grads = [torch.ones(65_600, dtype=torch.bfloat16)]
    assert squared_norms(grads, torch.tensor([0]), 1).item() == pytest.approx(65_600)
    assert clipped(grads, [0], 1.0)[0].dtype == torch.bfloat16


def test_no_gradients() -> None:
    """A rank without any still says so: norms of 0."""
    none = torch.tensor([], dtype=torch.int64)
    assert squared_norms([], none, 2).tolist() == [0.0, 0.0]
    clip_components_([], none, torch.zeros(2), 1.0)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_norms_that_are_not_finite(value: float) -> None:
    """As torch deals with them, and within their own component only."""
    grads = gradients()
    grads[0][0, 0] = value
    first, second, third = clipped(grads, [0, 1, 0], 1.0)
    torch.testing.assert_close([first, third], by_torch([grads[0], grads[2]], 1.0), equal_nan=True)
    assert second.norm() == pytest.approx(1.0, abs=1e-5)
