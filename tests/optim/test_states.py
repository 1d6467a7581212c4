"""The state of other people's optimizers: what is read of it, and that it begins anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_cl.optim import SPAM, reset_state, second_moment
from lightning_cl.optim.states import decays_weights_apart, has_second_moment, steps_taken

bitsandbytes = pytest.importorskip("bitsandbytes")

SHAPE, STEPS = (80, 64), 5

Make = Callable[..., Optimizer]


def made(kind: type[Optimizer], **settings: Any) -> Make:
    """A maker of an optimizer with these settings."""
    return lambda parameters, **more: kind(parameters, **(settings | more))


# the kinds that keep one, with its decay
KEEPING: dict[str, tuple[Make, float]] = {
    "adam": (made(torch.optim.Adam), 0.999),
    "adamw": (made(torch.optim.AdamW, betas=(0.8, 0.95)), 0.95),
    "adamw-foreach": (made(torch.optim.AdamW, foreach=True), 0.999),
    "adamw-fused": (made(torch.optim.AdamW, fused=True), 0.999),
    "amsgrad": (made(torch.optim.AdamW, amsgrad=True), 0.999),
    "nadam": (made(torch.optim.NAdam), 0.999),
    "nadamw": (made(torch.optim.NAdam, decoupled_weight_decay=True), 0.999),
    "radam": (made(torch.optim.RAdam), 0.999),
    "radamw": (made(torch.optim.RAdam, decoupled_weight_decay=True, foreach=True), 0.999),
    "rmsprop": (made(torch.optim.RMSprop, momentum=0.9, centered=True), 0.99),
    "adadelta": (made(torch.optim.Adadelta), 0.9),
    "bnb-adamw": (made(bitsandbytes.optim.AdamW), 0.999),
    "bnb-adam-8bit": (made(bitsandbytes.optim.Adam8bit), 0.999),
    "bnb-adamw-8bit": (made(bitsandbytes.optim.AdamW8bit), 0.999),
    "bnb-ademamix-8bit": (made(bitsandbytes.optim.AdEMAMix8bit), 0.999),
    "bnb-lamb-8bit": (made(bitsandbytes.optim.LAMB8bit), 0.999),
    "bnb-rmsprop-8bit": (made(bitsandbytes.optim.RMSprop8bit, alpha=0.9), 0.9),
    "spam": (made(SPAM), 0.999),
    "spam-bfloat16": (made(SPAM, state_dtype="bfloat16"), 0.999),
    "spam-8bit": (made(SPAM, state_dtype="8bit"), 0.999),
}
LACKING: dict[str, Make] = {
    "sgd": made(torch.optim.SGD, momentum=0.9, lr=0.1),
    "adagrad": made(torch.optim.Adagrad),
    "adamax": made(torch.optim.Adamax),
    "bnb-lion": made(bitsandbytes.optim.Lion8bit),
    "bnb-sgd": made(bitsandbytes.optim.SGD8bit, momentum=0.9, lr=0.1),
    "bnb-adagrad": made(bitsandbytes.optim.Adagrad),
}


def gradients(steps: int = STEPS) -> list[Tensor]:
    """Of one size everywhere but for a factor of 2, which 8 bits hold well."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(SHAPE, generator=generator) + 1 for _ in range(steps)]


def stepped(optimizer: Optimizer, values: Sequence[Tensor]) -> Parameter:
    """Step the one parameter of an optimizer by gradients."""
    parameter: Parameter = optimizer.param_groups[0]["params"][0]
    for value in values:
        parameter.grad = value.clone()
        optimizer.step()
    return parameter


@pytest.mark.parametrize("name", KEEPING)
def test_second_moment(name: str) -> None:
    """The average of squares with the optimizer's decay, from zero, after none and after several steps."""
    make, decay = KEEPING[name]
    parameter = Parameter(torch.ones(SHAPE))
    optimizer = make([parameter])
    assert has_second_moment(optimizer) is True
    assert second_moment(optimizer, parameter) is None
    assert steps_taken(optimizer, parameter) == 0
    stepped(optimizer, gradients())
    expected = torch.zeros(SHAPE)
    for value in gradients():
        expected = decay * expected + (1 - decay) * value.square()
    found = second_moment(optimizer, parameter)
    assert found is not None
    assert found.is_floating_point()
    rounded = "bit" in name or "bfloat" in name
    torch.testing.assert_close(found.float(), expected, rtol=0.08 if rounded else 1e-5, atol=0)
    assert has_second_moment(optimizer) is True
    assert steps_taken(optimizer, parameter) == STEPS


def test_eight_bits_are_read_as_bitsandbytes_reads_them() -> None:
    """To the bit, by its own function."""
    parameter = Parameter(torch.ones(SHAPE))
    optimizer = bitsandbytes.optim.AdamW8bit([parameter])
    stepped(optimizer, [torch.randn(SHAPE) for _ in range(3)])
    state = optimizer.state[parameter]
    assert state["state2"].dtype == torch.uint8
    expected = bitsandbytes.functional.dequantize_blockwise(
        state["state2"], absmax=state["absmax2"], code=state["qmap2"], blocksize=256
    )
    found = second_moment(optimizer, parameter)
    assert found is not None
    assert torch.equal(found, expected)


def test_moments_of_a_part_of_the_weights() -> None:
    """Zero where there are none."""
    parameter = Parameter(torch.ones(SHAPE))
    optimizer = SPAM([parameter], density=0.25)
    stepped(optimizer, gradients(1))
    found = second_moment(optimizer, parameter)
    assert found is not None
    moved = parameter != 1
    assert 0.2 < moved.float().mean() < 0.3
    torch.testing.assert_close(found, torch.where(moved, 0.001 * gradients(1)[0].square(), 0.0))


@pytest.mark.parametrize("name", LACKING)
def test_none_to_be_had(name: str) -> None:
    """Known before the first step and after it."""
    parameter = Parameter(torch.ones(SHAPE))
    optimizer = LACKING[name]([parameter])
    assert has_second_moment(optimizer) is False
    stepped(optimizer, gradients(1))
    assert has_second_moment(optimizer) is False
    assert second_moment(optimizer, parameter) is None


class Elsewhere(torch.optim.SGD):
    """A kind that nobody knows."""


class Counting(torch.optim.AdamW):
    """Adam's own name for a kind of one's own."""


def test_unknown_kinds() -> None:
    """Only their state will show; what comes of a known kind is known."""
    parameter = Parameter(torch.ones(SHAPE))
    assert has_second_moment(Counting([parameter])) is True
    optimizer = Elsewhere([parameter], lr=0.1, momentum=0.9)
    assert has_second_moment(optimizer) is None
    stepped(optimizer, gradients(1))
    assert has_second_moment(optimizer) is False
    assert steps_taken(optimizer, parameter) is None


def test_a_parameter_of_another_optimizer() -> None:
    """Nothing is known of it, and nothing is made up for it."""
    optimizer, stranger = torch.optim.AdamW([Parameter(torch.ones(2))]), Parameter(torch.ones(2))
    assert second_moment(optimizer, stranger) is None
    assert steps_taken(optimizer, stranger) == 0
    assert stranger not in optimizer.state


@pytest.mark.parametrize("name", KEEPING)
def test_weight_decay_apart(name: str) -> None:
    """Without a gradient it shrinks the weights by exactly rate times decay, where it is no part of the gradient."""
    parameter = Parameter(torch.ones(SHAPE))
    optimizer = KEEPING[name][0]([parameter], lr=0.1, weight_decay=0.1)
    stepped(optimizer, [torch.zeros(SHAPE)] * 3)
    apart = torch.allclose(parameter, torch.full(SHAPE, 0.99**3), rtol=0, atol=1e-6)
    assert apart == decays_weights_apart(optimizer, optimizer.param_groups[0])


@pytest.mark.parametrize("name", KEEPING)
def test_begins_anew(name: str) -> None:
    """The step after a reset is the first one of a fresh optimizer, from the same weights."""
    make, _ = KEEPING[name]
    warmup = {"warmup_steps": 0} if "spam" in name else {}
    optimizer = make([Parameter(torch.ones(SHAPE))], **warmup)
    parameter = stepped(optimizer, gradients())
    fresh = make([Parameter(parameter.detach().clone())], **warmup)
    reset_state(optimizer)
    assert steps_taken(optimizer, parameter) == 0
    later = gradients(STEPS + 1)[STEPS:]
    assert torch.equal(stepped(optimizer, later), stepped(fresh, later))
