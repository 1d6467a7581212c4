"""What moments are kept in: the parameter's dtype, float32, bfloat16 with random rounding, or 8 bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_cl.optim import SPAM

WEIGHTS = (64, 512)


def stepped(weight: Parameter, gradients: list[Tensor], **settings: Any) -> SPAM:
    """The optimizer after these steps."""
    optimizer = SPAM([weight], **settings)
    for gradient in gradients:
        weight.grad = gradient.to(weight.dtype).clone()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    ("weights", "state_dtype", "expected"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.float32, "8bit", torch.uint8),
        (torch.bfloat16, "8bit", torch.uint8),
    ],
    ids=str,
)
def test_dtype_of_the_state(weights: torch.dtype, state_dtype: Any, expected: torch.dtype) -> None:
    """As asked for; weights keep their own."""
    weight = Parameter(torch.zeros(WEIGHTS, dtype=weights))
    optimizer = stepped(weight, [torch.ones(WEIGHTS)], state_dtype=state_dtype)
    state = optimizer.state[weight]
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == expected
    assert state["step"].dtype == torch.float32
    assert weight.dtype == weights
    assert torch.allclose(weight.float(), torch.tensor(-1e-3), rtol=0.01)


def test_float32_moments_learn_where_bfloat16_stalls() -> None:
    """0.999 v rounds back to v in bfloat16: large gradients at the start would hold the steps down for ever."""
    early, late, steps = 10.0, 0.1, 1500
    gradients = [torch.full((1000,), early)] * 10 + [torch.full((1000,), late)] * steps
    expected = (1 - 0.999**10) * early**2 * 0.999**steps + (1 - 0.999**steps) * late**2
    found, moved = {}, {}
    for state_dtype in (None, "float32", "bfloat16"):
        weight = Parameter(torch.zeros(1000, dtype=torch.bfloat16))
        settings: dict[str, Any] = {"reset_interval": None, "threshold": math.inf, "state_dtype": state_dtype}
        optimizer = stepped(weight, gradients, lr=1e-6, **settings)
        found[state_dtype] = optimizer.state[weight]["exp_avg_sq"].float().mean().item()
        moved[state_dtype] = weight.detach().abs().float().mean().item()
    assert found["float32"] == pytest.approx(expected, rel=0.01)
    assert found["bfloat16"] == pytest.approx(expected, rel=0.05), "random rounding is right on average"
    assert found[None] > 3 * expected
    assert min(moved["float32"], moved["bfloat16"]) > 1.3 * moved[None]


def test_random_rounding_is_right_on_average_and_a_function_of_the_seed() -> None:
    """Every number goes to one of its two neighbours, as often as it is near; torch's own draws are left alone."""
    value = 1 + 2**-9  # a quarter of the way from 1 to the next bfloat16 number
    states = []
    for seed in (0, 0, 1):
        weight = Parameter(torch.zeros(40_000))
        before = torch.get_rng_state()
        settings: dict[str, Any] = {"betas": (0.0, 0.5), "state_dtype": "bfloat16", "seed": seed}
        optimizer = stepped(weight, [torch.full((40_000,), value)], **settings)
        assert torch.equal(torch.get_rng_state(), before)
        states.append(optimizer.state[weight]["exp_avg"].float())
    assert set(states[0].unique().tolist()) == {1.0, 1 + 2**-7}
    up = (states[0] > 1).float().mean().item()
    assert abs(up - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 40_000)
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_8_bits_are_those_of_bitsandbytes() -> None:
    """Its blockwise quantization in blocks of 256 within a row, with a sign for the first moment only."""
    functional = pytest.importorskip("bitsandbytes.functional")
    gradient = torch.randn(WEIGHTS) * 10 ** torch.empty(WEIGHTS).uniform_(-3, 1)
    weight = Parameter(torch.zeros(WEIGHTS))
    state = stepped(weight, [gradient], state_dtype="8bit").state[weight]
    for key, exact, signed in (("exp_avg", 0.1 * gradient, True), ("exp_avg_sq", 0.001 * gradient**2, False)):
        code = functional.create_dynamic_map(signed=signed)
        numbers, quantized = functional.quantize_blockwise(exact, code=code, blocksize=256)
        assert torch.equal(state[key], numbers)
        torch.testing.assert_close(state[f"{key}_scale"].flatten(), quantized.absmax, rtol=1e-6, atol=0)
        assert state[f"{key}_scale"].shape == (64, 2)


@pytest.mark.parametrize(
    ("shape", "in_8_bits"),
    [
        ((64, 64), True),
        ((16, 4, 8, 8), True),
        ((4096,), False),
        ((63, 64), False),
        ((64, 65), False),
        ((64, 96), False),
    ],
    ids=str,
)
def test_what_is_kept_in_8_bits(shape: tuple[int, ...], in_8_bits: bool) -> None:
    """Matrices of 4096 numbers or more with rows of whole blocks; the others stay in float32."""
    pytest.importorskip("bitsandbytes")
    weight = Parameter(torch.zeros(shape))
    state = stepped(weight, [torch.ones(shape)], state_dtype="8bit").state[weight]
    assert state["exp_avg"].dtype == (torch.uint8 if in_8_bits else torch.float32)
    assert ("exp_avg_scale" in state) == in_8_bits
    assert torch.allclose(weight, torch.tensor(-1e-3), rtol=0.01)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
def test_fewer_bits_train_as_well(state_dtype: Any) -> None:
    """A regression ends near where float32 moments end it, over resets and spikes."""
    losses = {}
    inputs, target = torch.randn(256, 64), torch.randn(64, 64) / 8
    for kept in ("float32", state_dtype):
        torch.manual_seed(1)
        layer = nn.Linear(64, 64, bias=False)
        optimizer = SPAM(layer.parameters(), lr=3e-3, reset_interval=100, warmup_steps=20, state_dtype=kept)
        for step in range(250):
            optimizer.zero_grad()
            loss = (layer(inputs) - inputs @ target).square().mean() * (1000.0 if step % 50 == 40 else 1.0)
            loss.backward()
            optimizer.step()
        losses[kept] = loss.item()
    assert losses["float32"] < 5e-3
    assert losses[state_dtype] < 2 * losses["float32"] + 1e-4


@pytest.mark.parametrize(
    ("state_dtype", "bytes_each"), [("float32", 8.0), ("bfloat16", 4.0), ("8bit", 2 * (1 + 4 / 256))], ids=str
)
def test_bytes_of_state(state_dtype: Any, bytes_each: float) -> None:
    """Two moments for each weight, one scale for every 256 of them in 8 bits, and two counters."""
    weight = Parameter(torch.zeros(WEIGHTS))
    state = stepped(weight, [torch.ones(WEIGHTS)], state_dtype=state_dtype).state[weight]
    assert sum(value.untyped_storage().nbytes() for value in state.values()) == bytes_each * weight.numel() + 8


@pytest.mark.parametrize("state_dtype", [None, "bfloat16", "8bit"])
def test_layouts_do_not_matter(state_dtype: Any) -> None:
    """Weights in another order of memory take the same steps, also where their gradient has yet another."""
    gradients = [torch.randn(16, 8, 8, 8) for _ in range(30)]
    plain = Parameter(torch.zeros(16, 8, 8, 8))
    other = Parameter(torch.zeros(16, 8, 8, 8).contiguous(memory_format=torch.channels_last))
    settings: dict[str, Any] = {"reset_interval": 10, "clip_delay": 5, "state_dtype": state_dtype}
    stepped(plain, gradients, **settings)
    stepped(other, gradients, **settings)
    assert not other.is_contiguous()
    if state_dtype != "bfloat16":  # its draws follow the memory
        assert torch.equal(plain, other)
    assert torch.allclose(plain, other, atol=1e-3)


@pytest.mark.parametrize("settings", [{"state_dtype": "bfloat16"}, {"state_dtype": "8bit"}, {"density": 0.5}], ids=str)
def test_goes_on_from_adamw_in_less_memory(settings: dict[str, Any]) -> None:
    """Moments of a checkpoint of AdamW are taken over in the form asked for, and saved in it."""
    adamw = torch.optim.AdamW([Parameter(torch.zeros(WEIGHTS))])
    (weight,) = adamw.param_groups[0]["params"]
    for _ in range(5):
        weight.grad = torch.randn(WEIGHTS)
        adamw.step()
    ours = SPAM([Parameter(weight.detach().clone())], **settings)
    ours.load_state_dict(adamw.state_dict())
    following = torch.randn(WEIGHTS)
    steps = []
    for optimizer in (adamw, ours):
        (own,) = optimizer.param_groups[0]["params"]
        before = own.detach().clone()
        own.grad = following.clone()
        optimizer.step()
        steps.append(own.detach() - before)
    moved = steps[1] != 0
    assert moved.float().mean().item() == pytest.approx(settings.get("density", 1.0), abs=0.02)
    assert (steps[0] - steps[1])[moved].norm() < 0.1 * steps[0][moved].norm()
