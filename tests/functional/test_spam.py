"""SPAM's clip against a loop over numbers, its warm-up against torch's scheduler, and the counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_cl.functional.spam import clip_spikes_, count_spikes, warmup_scale

THRESHOLD = 50.0


def clipped(gradient: Tensor, second_moment: Tensor, threshold: float) -> Tensor:
    """The definition, number by number in Python's float64."""
    result = gradient.clone()
    for index in range(gradient.numel()):
        g, v = gradient.view(-1)[index].item(), second_moment.view(-1)[index].item()
        if threshold * v > 0 and g * g > threshold * v:
            result.view(-1)[index] = math.copysign(math.sqrt(threshold * v), g)
    return result


def spiky(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Gradients from far below to far above the bound, second moments over ten orders, some of them 0."""
    second = 10 ** torch.empty(shape, dtype=torch.float64).uniform_(-10, 0)
    second[torch.rand(shape) < 0.1] = 0
    gradient = torch.randn(shape, dtype=torch.float64) * 10 ** torch.empty(shape, dtype=torch.float64).uniform_(-5, 2)
    return gradient.to(dtype), second.to(dtype)


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_clip_is_the_definition(dtype: torch.dtype, foreach: bool | None) -> None:
    """Only spikes change, each to the bound with its sign; nothing where the second moment is 0."""
    gradients, seconds = zip(*(spiky(*shape, dtype=dtype) for shape in ((40, 5), (7,), (), (0, 3))), strict=True)
    expected = [clipped(g, v, THRESHOLD) for g, v in zip(gradients, seconds, strict=True)]
    before = [g.clone() for g in gradients]
    kept = [v.clone() for v in seconds]
    clip_spikes_(gradients, seconds, THRESHOLD, foreach=foreach)
    for found, one in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, one, rtol=8 * torch.finfo(dtype).eps, atol=0)
    assert sum(int((g != b).sum()) for g, b in zip(gradients, before, strict=True)) > 30
    assert any(bool(((v == 0) & (g.abs() > 1)).any()) for g, v in zip(gradients, seconds, strict=True))
    for v, one in zip(seconds, kept, strict=True):
        assert torch.equal(v, one)


@pytest.mark.parametrize("foreach", [False, True])
def test_clip_acts_on_the_tensor_itself(foreach: bool) -> None:
    """A spike in ``parameter.grad`` is gone afterwards: no indexed copy is clipped in its place."""
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.tensor([1.0, -1e6, 1e6, math.inf])
    gradient = parameter.grad
    clip_spikes_([gradient], [torch.full((4,), 0.5)], THRESHOLD, foreach=foreach)
    assert parameter.grad is gradient
    assert parameter.grad.tolist() == [1.0, -5.0, 5.0, 5.0]
    columns = torch.full((3, 2), 100.0).t()
    clip_spikes_([columns], [torch.full((2, 3), 0.5)], THRESHOLD, foreach=foreach)
    assert torch.equal(columns, torch.full((2, 3), 5.0))


@pytest.mark.parametrize("foreach", [False, True])
def test_exactly_at_the_bound_is_no_spike(foreach: bool) -> None:
    """The rule is g² > θ v, so equality stays; the next number above it does not."""
    bound = torch.tensor([8.0, -8.0])
    gradient = torch.cat([bound, torch.nextafter(bound, bound * 2)])
    clip_spikes_([gradient], [torch.ones(4)], 64.0, foreach=foreach)
    assert torch.equal(gradient, torch.cat([bound, bound]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paths_agree_to_the_bit(dtype: torch.dtype) -> None:
    """Also for infinite and undefined gradients, for denormal second moments, and right at the bound."""
    gradient, second = spiky(3000, dtype=dtype)
    second[:500] = (torch.rand(500) * 1e-40).to(dtype)
    gradient[:500] = (torch.randn(500) * 1e-19).to(dtype)
    gradient[500:1000] = (second[500:1000] * THRESHOLD).sqrt()
    gradient[1000:1003] = torch.tensor([math.inf, -math.inf, math.nan])
    second[1000:1002] = torch.tensor([1e-3, 0.0])
    one, other = [*gradient.clone().split(100)], [*gradient.clone().split(100)]
    clip_spikes_(one, second.split(100), THRESHOLD, foreach=False)
    clip_spikes_(other, second.split(100), THRESHOLD, foreach=True)
    whole, same = torch.cat(one), torch.cat(other)
    assert torch.equal(whole.nan_to_num(7.0), same.nan_to_num(7.0))
    assert torch.equal(whole.isnan(), gradient.isnan())
    assert whole[1000] == math.sqrt(THRESHOLD * second[1000].item()) or dtype == torch.bfloat16
    assert whole[1001] == -math.inf, "there is no bound without a second moment"
    assert not torch.equal(whole[:500], gradient[:500])


@pytest.mark.parametrize("foreach", [None, False, True])
def test_nothing_to_clip(foreach: bool | None) -> None:
    """No tensors at all, and tensors without a spike."""
    clip_spikes_([], [], THRESHOLD, foreach=foreach)
    gradient = torch.randn(10)
    before = gradient.clone()
    clip_spikes_([gradient], [torch.ones(10)], THRESHOLD, foreach=foreach)
    assert torch.equal(gradient, before)


@pytest.mark.parametrize("steps", [1, 3, 150])
def test_warm_up_is_a_cosine_from_a_hundredth_to_one(steps: int) -> None:
    """1 minus torch's own cosine annealing of 0.99 over one step more than the warm-up has."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.99)
    schedule = CosineAnnealingLR(optimizer, T_max=steps + 1)
    for step in range(steps):
        assert warmup_scale(step, steps) == pytest.approx(1 - optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        schedule.step()
    assert warmup_scale(0, steps) == pytest.approx(0.01)
    assert [warmup_scale(step, steps) for step in (steps, steps + 1, 10 * steps)] == [1.0] * 3


def test_no_warm_up() -> None:
    """Without steps to warm up in, the first step is whole."""
    assert warmup_scale(0, 0) == 1.0


def test_counts() -> None:
    """Spikes and the largest ratio, among those with a second moment."""
    gradient = torch.tensor([[1.0, -30.0], [40.0, 1e9]])
    second = torch.tensor([[1.0, 10.0], [1.0, 0.0]])
    # ratios 1, 90, 1600, and one without
    assert count_spikes(gradient, second, THRESHOLD).tolist() == [2.0, 1600.0]
    assert count_spikes(gradient, second, 90.0).tolist() == [1.0, 1600.0]
    assert count_spikes(gradient, torch.zeros(2, 2), THRESHOLD).tolist() == [0.0, 0.0]
    assert count_spikes(torch.zeros(0, 3), torch.zeros(0, 3), THRESHOLD).tolist() == [0.0, 0.0]
