"""SPAM against its definition in float64, its two paths, what it refuses, and how it goes on from a checkpoint."""

from __future__ import annotations

import copy
import io
import math
import shutil
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_cl.functional.sparse_masks import random_mask
from lightning_cl.optim import SPAM, reset_state
from spam_reference import DEFAULTS, SpamReference
from toys import ToyModule, fit_stream

Shapes = Sequence[tuple[int, ...]]
# every setting differs; the first group has the paper's
GROUPS: list[tuple[Shapes, dict[str, Any]]] = [
    ([(6, 5), (7,)], {}),
    (
        [(4, 3), ()],
        {
            "lr": 5e-4,
            "betas": (0.8, 0.99),
            "eps": 1e-6,
            "weight_decay": 0.1,
            "threshold": 100.0,
            "reset_interval": 333,
            "warmup_steps": 40,
            "clip_delay": 5,
        },
    ),
    ([(8, 3)], {"lr": 2e-4, "betas": (0.0, 0.95), "weight_decay": 0.5, "threshold": 20.0, "reset_interval": None}),
]
SPARSE: list[tuple[Shapes, dict[str, Any]]] = [
    (shapes, settings | {"density": density})
    for (shapes, settings), density in zip(GROUPS, (0.5, 1.0, 0.3), strict=True)
]
QUICK: dict[str, Any] = {"lr": 0.01, "reset_interval": 25, "warmup_steps": 10, "clip_delay": 5, "threshold": 30.0}


def masks(groups: Sequence[tuple[Shapes, dict[str, Any]]], seed: int = 0) -> Any:
    """The mask of a tensor, by its number over all groups and how often it was reset."""
    tensors = [(shape, settings.get("density", 1.0)) for shapes, settings in groups for shape in shapes]

    def mask_of(number: int, resets: int) -> Any:
        shape, density = tensors[number]
        indices = torch.arange(math.prod(shape)).view(shape)
        return random_mask(indices, density, seed, number, resets).numpy()

    return mask_of


def parameters(groups: Sequence[tuple[Shapes, dict[str, Any]]], dtype: torch.dtype) -> list[list[Parameter]]:
    """Small random weights, those of every dtype alike."""
    generator = torch.Generator().manual_seed(3)
    return [
        [Parameter((torch.randn(shape, generator=generator) * 0.02).to(dtype)) for shape in shapes]
        for shapes, _ in groups
    ]


def gradients(
    shapes: Shapes, steps: int, dtype: torch.dtype, rests: Sequence[int] = (), seed: int = 5
) -> Iterator[list[Any]]:
    """Noise of another size for each tensor, a spike of up to a thousand times that in every 40th step.

    The first coordinate has no gradient until step 100; tensors that ``rests`` numbers have none in every third step.
    """
    rng = np.random.default_rng(seed)
    for step in range(steps):
        drawn: list[Any] = []
        for number, shape in enumerate(shapes):
            values = rng.standard_normal(shape) * 10.0 ** (-number) + 0.2 * 10.0 ** (-number)
            if step % 40 == 30:
                values = np.where(rng.random(shape) < 0.3, values * 10 ** rng.uniform(1, 3), values)
            if step < 100 and values.ndim and values.size:
                values.flat[0] = 0.0
            resting = number in rests and step % 3 == 1
            drawn.append(None if resting else torch.tensor(values).to(dtype))
        yield drawn


def give(optimizer: torch.optim.Optimizer, values: Sequence[Tensor | None]) -> None:
    """Set the gradients of all parameters, in the order of the groups."""
    everything = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, value in zip(everything, values, strict=True):
        parameter.grad = None if value is None else value.clone()


def spam(groups: Sequence[tuple[Shapes, dict[str, Any]]], dtype: torch.dtype, **settings: Any) -> SPAM:
    """The optimizer over fresh weights."""
    made = parameters(groups, dtype)
    return SPAM([{"params": own, **mine} for own, (_, mine) in zip(made, groups, strict=True)], **settings)


def all_weights(optimizer: torch.optim.Optimizer) -> list[Parameter]:
    """The parameters in the order of the groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def as_numpy(parameter: Parameter) -> Any:
    """Values in float64."""
    return parameter.detach().double().numpy()


# ---------------------------------------------------------------------- the definition


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize(
    ("groups", "foreach"), [(GROUPS, False), (GROUPS, True), (SPARSE, False)], ids=["single", "foreach", "sparse"]
)
def test_every_step_is_the_definition(
    groups: list[tuple[Shapes, dict[str, Any]]], dtype: torch.dtype, tolerance: float, foreach: bool
) -> None:
    """1,200 steps over two resets and more, with spikes, several groups, decay, and tensors that rest."""
    optimizer = spam(groups, dtype, foreach=foreach)
    reference = SpamReference(
        [([as_numpy(p) for p in own], mine) for own, (_, mine) in zip(parameters(groups, dtype), groups, strict=True)],
        masks(groups),
    )
    shapes = [shape for own, _ in groups for shape in own]
    for number, values in enumerate(gradients(shapes, 1200, dtype, rests=[2])):
        give(optimizer, values)
        optimizer.step()
        reference.step([None if value is None else value.double().numpy() for value in values])
        for parameter, expected in zip(all_weights(optimizer), reference.values(), strict=True):
            distance = np.abs(as_numpy(parameter) - expected).max()
            assert distance < tolerance, f"step {number}: {distance}"
    assert [one.resets for one in reference.weights] == [2, 2, 2, 3, 0]
    assert all(one.clipped > 5 for one in reference.weights)
    for parameter, one in zip(all_weights(optimizer), reference.weights, strict=True):
        state = optimizer.state_dict()["state"][all_weights_index(optimizer, parameter)]
        assert (state["step"].item(), state["resets"].item()) == (one.step, one.resets)
        np.testing.assert_allclose(state["exp_avg"].double().numpy(), one.first, rtol=1e-3, atol=tolerance)
        np.testing.assert_allclose(state["exp_avg_sq"].double().numpy(), one.second, rtol=1e-3, atol=tolerance)


def all_weights_index(optimizer: torch.optim.Optimizer, parameter: Parameter) -> int:
    """The number that a parameter has in the state dict."""
    return next(number for number, one in enumerate(all_weights(optimizer)) if one is parameter)


def test_is_adamw_before_any_spike_and_reset() -> None:
    """The same numbers as torch's, which anyone can check this file's reference by."""
    groups = [([(6, 5), (7,)], {"weight_decay": 0.1, "lr": 0.01})]
    optimizer = spam(groups, torch.float64)
    other = torch.optim.AdamW(parameters(groups, torch.float64)[0], lr=0.01, weight_decay=0.1)
    for values in gradients(groups[0][0], 29, torch.float64):
        for one in (optimizer, other):
            give(one, values)
            one.step()
    for ours, theirs in zip(all_weights(optimizer), all_weights(other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


def test_defaults() -> None:
    """The signature's defaults are those that the reference, and the page, name."""
    group = SPAM([Parameter(torch.zeros(1))]).param_groups[0]
    assert {name: group[name] for name in DEFAULTS} == DEFAULTS
    extra = ("seed", "foreach", "capturable", "fused", "state_dtype")
    assert [group[name] for name in extra] == [0, None, False, False, None]


# ---------------------------------------------------------------------- what others get wrong


@pytest.mark.parametrize("foreach", [False, True])
def test_a_spike_is_clipped_in_the_moments_and_not_in_a_copy(foreach: bool) -> None:
    """`grad[mask].sign_()` edits a copy: the moments would take in the whole spike, a thousand times too much."""
    weight = Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = SPAM([weight], threshold=5000.0, foreach=foreach)
    for _ in range(25):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    second = 1 - 0.999**25
    weight.grad = torch.tensor([1.0, 1e6, -math.inf], dtype=torch.float64)
    optimizer.step()
    bound = math.sqrt(5000 * second)
    clipped = torch.tensor([1.0, bound, -bound], dtype=torch.float64)
    torch.testing.assert_close(weight.grad, clipped, rtol=1e-12, atol=0)
    state = optimizer.state[weight]
    torch.testing.assert_close(state["exp_avg"], 0.9 * (1 - 0.9**25) + 0.1 * clipped, rtol=1e-12, atol=0)
    torch.testing.assert_close(state["exp_avg_sq"], 0.999 * second + 0.001 * clipped**2, rtol=1e-12, atol=0)


def test_no_counter_lies_outside_of_the_state() -> None:
    """All that a step changes is in ``state_dict``: a copy with nothing but it takes the same steps ever after."""
    groups = [([(6, 5)], QUICK)]
    optimizer = spam(groups, torch.float32)
    others = {name: value for name, value in vars(optimizer).items() if name not in ("state", "param_groups")}
    before = copy.deepcopy({name: value for name, value in others.items() if isinstance(value, (int, float, dict))})
    for values in gradients([(6, 5)], 60, torch.float32):
        give(optimizer, values)
        optimizer.step()
    after = {name: value for name, value in vars(optimizer).items() if name in before}
    assert after.keys() == before.keys()
    assert all(repr(after[name]) == repr(before[name]) for name in before)
    assert optimizer.param_groups[0].keys() >= DEFAULTS.keys()
    assert {name: optimizer.param_groups[0][name] for name in QUICK} == QUICK
    state = optimizer.state_dict()["state"][0]
    assert {name: value.item() for name, value in state.items() if value.dim() == 0} == {"step": 10.0, "resets": 2.0}


def test_a_rare_row_learns() -> None:
    """After 30 steps without a gradient its second moment is 0; g² > θ v would set its first gradient to 0 for ever."""
    table = nn.Embedding(4, 3)
    start = table.weight.detach().clone()
    optimizer = SPAM(table.parameters(), lr=0.1)
    for step in range(33):
        optimizer.zero_grad()
        table(torch.tensor([0, 1] if step < 30 else [0, 1, 2])).sum().backward()
        optimizer.step()
    moved = (table.weight.detach() - start).abs().amin(dim=1)
    assert moved[2] > 0.05, "the row of the new token moves"
    assert moved[3] == 0


# ---------------------------------------------------------------------- masks


def test_only_the_mask_moves() -> None:
    """The others rest: no step, no decay, no moments; the density holds within four standard deviations."""
    weight = Parameter(torch.ones(200, 100))
    optimizer = SPAM([weight], density=0.25, weight_decay=0.1, seed=4, **QUICK)
    previous = weight.detach().clone()
    seen = []
    for step in range(76):
        weight.grad = torch.rand(200, 100) + 0.5  # one sign: no step is 0
        optimizer.step()
        moved = weight.detach() != previous
        expected = random_mask(torch.arange(20_000).view(200, 100), 0.25, 4, 0, step // 25)
        assert torch.equal(moved, expected), f"step {step}"
        previous = weight.detach().clone()
        if step % 25 == 0:
            seen.append(moved)
    for mask in seen:
        assert abs(int(mask.sum()) - 5000) < 4 * math.sqrt(20_000 * 0.25 * 0.75)
    for one, other in pairwise(seen):
        assert abs(int((one & other).sum()) - 1250) < 4 * math.sqrt(20_000 / 16 * 15 / 16)
    state = optimizer.state_dict()["state"][0]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == weight.shape
    assert torch.equal(state["exp_avg_sq"] != 0, seen[-1])


def test_overlap_carries_its_moments() -> None:
    """What was in the mask and stays goes on with bias-corrected moments; what is new starts from nothing."""
    weight = Parameter(torch.zeros(1000, dtype=torch.float64))
    # betas by which a missing correction shows: 0.1 is not the root of 0.001
    settings = {**QUICK, "threshold": math.inf, "reset_interval": 25}
    optimizer = SPAM([weight], density=0.5, betas=(0.9, 0.999), **settings)
    for _ in range(26):
        before = weight.detach().clone()
        weight.grad = torch.full_like(weight, 2.0)
        optimizer.step()
    old, new = (random_mask(torch.arange(1000), 0.5, 0, 0, resets) for resets in (0, 1))
    state = optimizer.state_dict()["state"][0]
    assert (state["step"].item(), state["resets"].item()) == (1, 1)
    # gradients of 2 all along: unbiased estimates of 2 and of 4, or the first gradient's part
    for key, value, first in (("exp_avg", 2.0, 0.1 * 2), ("exp_avg_sq", 4.0, 0.001 * 4)):
        expected = value * (old & new).double() + first * (new & ~old).double()
        torch.testing.assert_close(state[key], expected, rtol=1e-12, atol=0)
    # steps of one learning rate, of which the warm-up leaves a hundredth, for the carried and for the new
    expected = torch.where(new, -0.01 * 0.01, 0.0).double()
    torch.testing.assert_close(weight.detach() - before, expected, rtol=1e-7, atol=1e-15)


def test_the_seed_decides_the_mask() -> None:
    """The same seed gives the same weights whatever torch's random numbers are; another seed gives others."""
    results = []
    for draw, seed in ((0, 1), (1, 1), (0, 2)):
        torch.manual_seed(draw)
        optimizer = spam([([(20, 5)], {"density": 0.5, "seed": seed})], torch.float32)
        state = torch.get_rng_state()
        for values in gradients([(20, 5)], 30, torch.float32):
            give(optimizer, values)
            optimizer.step()
        assert torch.equal(torch.get_rng_state(), state)
        results.append(all_weights(optimizer)[0].detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


# ---------------------------------------------------------------------- the two paths


# torch's foreach kernels round factors to the dtype of their tensors, so that moments computed in bfloat16 would differ
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [(torch.float64, None), (torch.float32, None), (torch.float32, "bfloat16"), (torch.bfloat16, "float32")],
    ids=str,
)
def test_foreach_is_single_to_the_last_bit(dtype: torch.dtype, state_dtype: Any) -> None:
    """Weights, moments and clipped gradients, over two resets, with spikes and gradients that are not finite."""
    shapes = [(6, 5), (7,), (), (0, 3), (33, 2)]
    groups = [
        (shapes[:3], {**QUICK, "weight_decay": 0.1}),
        (shapes[3:], {**QUICK, "reset_interval": 17, "betas": (0.5, 0.9)}),
    ]
    runs = [spam(groups, dtype, foreach=foreach, state_dtype=state_dtype) for foreach in (False, True)]
    for step, values in enumerate(gradients(shapes, 60, dtype, rests=[1])):
        if step == 44:  # past the clip delay of both groups
            values[0].view(-1)[3:5] = torch.tensor([math.inf, -math.inf])
        if step == 57:
            values[4].view(-1)[2:5] = torch.tensor([math.inf, math.nan, -math.inf])
        for optimizer in runs:
            give(optimizer, values)
            optimizer.step()
        for one, other in zip(*(all_weights(optimizer) for optimizer in runs), strict=True):
            assert same_bits(one.detach(), other.detach())
            assert (one.grad is None) == (other.grad is None)
            # what became undefined stays so, whatever its gradient
            assert one.grad is None or step > 57 or same_bits(one.grad, other.grad)
    assert same_state(*(optimizer.state_dict()["state"] for optimizer in runs))
    first, last = all_weights(runs[0])[0], all_weights(runs[0])[4]
    assert first.isfinite().all(), "an infinite gradient past the delay is a spike like others"
    assert last.isnan().sum() <= 3


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal, where what is not a number equals itself."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


def same_state(one: dict[int, dict[str, Tensor]], other: dict[int, dict[str, Tensor]]) -> bool:
    """Equal keys, dtypes and bits."""
    assert one.keys() == other.keys()
    for number in one:
        assert one[number].keys() == other[number].keys()
        for key, value in one[number].items():
            assert value.dtype == other[number][key].dtype
            assert same_bits(value, other[number][key]), (number, key)
    return True


@pytest.mark.parametrize("settings", [{"density": 0.5}, {"capturable": True}, {"foreach": True}], ids=str)
def test_layouts_do_not_matter(settings: dict[str, Any]) -> None:
    """Weights in another order of memory take the same steps, also where their gradient has yet another."""
    values = list(gradients([(8, 4, 3, 3)], 40, torch.float32))
    runs = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        weight = Parameter(torch.ones(8, 4, 3, 3).contiguous(memory_format=memory_format))
        optimizer = SPAM([weight], **QUICK, **settings)
        for value in values:
            give(optimizer, value)
            optimizer.step()
        runs.append(weight.detach())
    assert not runs[1].is_contiguous()
    assert torch.equal(*runs)


# ---------------------------------------------------------------------- on the device


def test_steps_on_the_device_are_the_definition() -> None:
    """Without a branch: clip delay, warm-up and reset as everywhere; counters of float32 allow for 1e-5 of a step."""
    optimizer = spam(GROUPS, torch.float64, capturable=True)
    reference = SpamReference(
        [
            ([as_numpy(p) for p in own], mine)
            for own, (_, mine) in zip(parameters(GROUPS, torch.float64), GROUPS, strict=True)
        ]
    )
    shapes = [shape for own, _ in GROUPS for shape in own]
    largest = 0.0
    for values in gradients(shapes, 700, torch.float64, rests=[2]):
        give(optimizer, values)
        before = reference.values()
        optimizer.step()
        reference.step([None if value is None else value.numpy() for value in values])
        for parameter, expected, previous in zip(all_weights(optimizer), reference.values(), before, strict=True):
            largest = max(largest, float(np.abs(expected - previous).max()))
            assert np.abs(as_numpy(parameter) - expected).max() < 3e-6
    assert largest > 1e-3
    for parameter, one in zip(all_weights(optimizer), reference.weights, strict=True):
        state = optimizer.state[parameter]
        assert (state["step"].item(), state["resets"].item()) == (one.step, one.resets)
        np.testing.assert_allclose(state["exp_avg_sq"].numpy(), one.second, rtol=1e-12, atol=0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="`fused` needs a C++ compiler on the CPU")
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch compiles with it
def test_compiled_steps_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """One compilation serves all tensors of a group and all learning rates of a schedule."""
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    monkeypatch.setenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", "")  # torch sets it, and here takes it back
    groups = [([(6, 5), (7, 2)], QUICK)]
    runs = [spam(groups, torch.float32, **settings) for settings in ({"capturable": True}, {"fused": True})]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98) for optimizer in runs]
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    graphs = []
    for values in gradients(groups[0][0], 60, torch.float32):
        for optimizer, schedule in zip(runs, schedules, strict=True):
            give(optimizer, values)
            optimizer.step()
            schedule.step()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
    for one, other in zip(*(all_weights(optimizer) for optimizer in runs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert set(graphs) == {1}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_is_captured_as_a_graph_and_never_waits() -> None:
    """Replays go through clip delay, warm-up and resets; without a graph, no step waits for the device."""
    groups = [([(6, 5), (7,)], QUICK)]
    captured, eager, foreach = (
        SPAM([p.to("cuda").detach().requires_grad_() for p in parameters(groups, torch.float32)[0]], **QUICK, **more)
        for more in ({"capturable": True}, {}, {"capturable": True})
    )
    steps = [[value.cuda() for value in values] for values in gradients(groups[0][0], 60, torch.float32)]
    for optimizer in (captured, eager, foreach):
        give(optimizer, steps[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for one in (eager, foreach):
        one.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for values in steps[1:]:
            for parameter, value in zip(all_weights(captured), values, strict=True):
                parameter.grad.copy_(value)
            graph.replay()
            give(foreach, values)
            foreach.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for values in steps[1:]:
        give(eager, values)
        eager.step()
    for one, other, third in zip(*(all_weights(optimizer) for optimizer in (captured, eager, foreach)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert torch.equal(one, third)


# ---------------------------------------------------------------------- going on


FORMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "sparse": (torch.float32, {"density": 0.4}),
    "bfloat16 weights": (torch.bfloat16, {}),
    "float32 state": (torch.bfloat16, {"state_dtype": "float32"}),
    "bfloat16 state": (torch.float32, {"state_dtype": "bfloat16"}),
    "8 bits": (torch.float32, {"state_dtype": "8bit"}),
    "foreach": (torch.float32, {"foreach": True}),
    "sparse float32 state": (torch.bfloat16, {"state_dtype": "float32", "density": 0.4}),
    "capturable": (torch.float32, {"capturable": True}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stop", [24, 25, 26, 30, 44])
def test_resume_to_the_same_bits(form: str, stop: int) -> None:
    """Around a reset at step 25, inside of the warm-up after it, and between resets; through bytes."""
    dtype, settings = FORMS[form]
    shapes = [(64, 64), (7,)]
    groups = [(shapes, QUICK | {key: value for key, value in settings.items() if key == "density"})]
    rest = {key: value for key, value in settings.items() if key != "density"}
    optimizer = spam(groups, dtype, **rest)
    resumed = None
    for step, values in enumerate(gradients(shapes, 60, dtype)):
        if step == stop:
            file = io.BytesIO()
            torch.save([optimizer.state_dict(), [p.detach() for p in all_weights(optimizer)]], file)
            file.seek(0)
            state, saved = torch.load(file, weights_only=True)
            resumed = spam(groups, dtype, **rest)
            with torch.no_grad():
                for parameter, value in zip(all_weights(resumed), saved, strict=True):
                    parameter.copy_(value)
            resumed.load_state_dict(state)
            assert same_state(resumed.state_dict()["state"], optimizer.state_dict()["state"])
        for one in (optimizer, resumed):
            if one is not None:
                give(one, values)
                one.step()
    assert resumed is not None
    for one, other in zip(all_weights(resumed), all_weights(optimizer), strict=True):
        assert same_bits(one.detach(), other.detach())
    assert same_state(resumed.state_dict()["state"], optimizer.state_dict()["state"])


class WithSPAM(ToyModule):
    """The toy module with SPAM and a learning rate that falls."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = {
            "lr": 0.02,
            "reset_interval": 5,
            "warmup_steps": 3,
            "clip_delay": 2,
            "threshold": 3.0,
        } | settings

    def configure_optimizers(self) -> Any:
        optimizer = SPAM(self.parameters(), **self.settings)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


@pytest.mark.parametrize("settings", [{}, {"density": 0.5}, {"state_dtype": "bfloat16"}], ids=str)
def test_resume_from_a_checkpoint_of_the_trainer(tmp_path: Path, settings: dict[str, Any]) -> None:
    """A Trainer goes on inside of the warm-up, and between resets, to the same bits."""
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    straight = fit_stream(tmp_path, [saver], module=WithSPAM(**settings))
    for step in (6, 9):  # of 12, with resets before the sixth and the eleventh
        again = ModelCheckpoint(tmp_path / "again", every_n_train_steps=1)
        resumed = fit_stream(tmp_path, [again], module=WithSPAM(**settings), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert torch.equal(resumed, straight)
    assert not torch.allclose(straight, fit_stream(tmp_path, module=WithSPAM(reset_interval=None)), atol=1e-3)


def test_goes_on_from_adamw() -> None:
    """A checkpoint of AdamW has all that SPAM needs: its moments and its step; nothing was reset yet."""
    groups = [([(6, 5)], {"lr": 0.01, "weight_decay": 0.1})]
    adamw = torch.optim.AdamW(parameters(groups, torch.float64)[0], lr=0.01, weight_decay=0.1)
    whole = spam(groups, torch.float64, threshold=1e30)
    other = None
    for step, values in enumerate(gradients([(6, 5)], 20, torch.float64)):
        if step == 10:
            other = spam(groups, torch.float64, threshold=1e30)
            other.load_state_dict(adamw.state_dict())
            with torch.no_grad():
                all_weights(other)[0].copy_(all_weights(adamw)[0])
        for one in (whole, adamw if other is None else other):
            give(one, values)
            one.step()
    assert other is not None
    torch.testing.assert_close(all_weights(other)[0], all_weights(whole)[0], rtol=0, atol=1e-13)
    assert other.param_groups[0]["reset_interval"] == 500


# ---------------------------------------------------------------------- resets on demand


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_reset_now(density: float) -> None:
    """Zero moments and a warm-up, as at the interval; also before the first step, and twice in a row."""
    groups = [([(9, 5), (7,)], {"lr": 0.01, "density": density, "warmup_steps": 6})]
    optimizer = spam(groups, torch.float64)
    start = parameters(groups, torch.float64)
    reference = SpamReference([([as_numpy(p) for p in start[0]], groups[0][1])], masks(groups))
    optimizer.reset_moments()  # nothing is there yet
    for step, values in enumerate(gradients(groups[0][0], 60, torch.float64)):
        if step in (10, 40, 41):
            reset_state(optimizer)
            reference.reset_moments()
        if step == 41:
            optimizer.reset_moments()
            reference.reset_moments()
        give(optimizer, values)
        optimizer.step()
        reference.step([value.numpy() for value in values])
        for parameter, expected in zip(all_weights(optimizer), reference.values(), strict=True):
            np.testing.assert_allclose(as_numpy(parameter), expected, rtol=0, atol=1e-12)
    assert [one.resets for one in reference.weights] == [3, 3]


# ---------------------------------------------------------------------- parameters and settings that come and go


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_a_group_that_comes_later(density: float) -> None:
    """It begins with a clock of its own, its settings, and masks of its own numbers; a checkpoint has all of it."""
    groups = [([(6, 5)], QUICK | {"density": density}), ([(4, 4)], {"lr": 0.02, "density": density, "warmup_steps": 4})]
    made = parameters(groups, torch.float64)
    optimizer = SPAM(made[0], **groups[0][1])
    reference = SpamReference([([as_numpy(made[0][0])], groups[0][1])], masks(groups))
    for step, values in enumerate(gradients([(6, 5), (4, 4)], 60, torch.float64)):
        if step == 20:
            optimizer.add_param_group({"params": made[1], **{**QUICK, **groups[1][1]}})
            reference.add_group([as_numpy(made[1][0])], QUICK | groups[1][1])
        values = values if step >= 20 else values[:1]
        give(optimizer, values)
        optimizer.step()
        reference.step([value.numpy() for value in values])
    for parameter, expected in zip(all_weights(optimizer), reference.values(), strict=True):
        np.testing.assert_allclose(as_numpy(parameter), expected, rtol=0, atol=1e-12)
    assert [one.step for one in reference.weights] == [10, 15]


def test_frozen_parameters_and_none_gradients() -> None:
    """What has no gradient keeps its weights and its clock, and gets no state."""
    weights_, frozen = Parameter(torch.ones(3)), Parameter(torch.ones(3), requires_grad=False)
    optimizer = SPAM([weights_, frozen], weight_decay=0.5)
    optimizer.step()
    optimizer.reset_moments()
    assert not optimizer.state
    weights_.grad = torch.ones(3)
    optimizer.step()
    assert list(optimizer.state) == [weights_]
    before = weights_.detach().clone()
    weights_.grad = None
    optimizer.step()
    assert torch.equal(weights_, before)
    assert optimizer.state[weights_]["step"].item() == 1
    assert torch.equal(frozen, torch.ones(3))


def test_learning_rate_as_a_tensor() -> None:
    """The same steps as with a number."""
    groups = [([(6, 5), (7,)], QUICK)]
    runs = [
        spam([(groups[0][0], {**QUICK, "lr": lr})], torch.float64)
        for lr in (0.01, torch.tensor(0.01, dtype=torch.float64))
    ]
    for values in gradients(groups[0][0], 40, torch.float64):
        for optimizer in runs:
            give(optimizer, values)
            optimizer.step()
    for one, other in zip(*(all_weights(optimizer) for optimizer in runs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_scheduler_changes_the_step() -> None:
    """Steps follow the learning rate of the moment, and the warm-up multiplies it."""
    groups = [([(6, 5)], QUICK)]
    optimizer = spam(groups, torch.float64)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    reference = SpamReference([([as_numpy(p) for p in parameters(groups, torch.float64)[0]], QUICK)])
    for values in gradients([(6, 5)], 60, torch.float64):
        give(optimizer, values)
        optimizer.step()
        reference.step([value.numpy() for value in values])
        schedule.step()
        reference.groups[0][1]["lr"] *= 0.95
    np.testing.assert_allclose(as_numpy(all_weights(optimizer)[0]), reference.values()[0], rtol=0, atol=1e-12)


def test_closure() -> None:
    """Evaluated once, with gradients on, and its loss returned."""
    weight = Parameter(torch.ones(3))
    optimizer = SPAM([weight], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))
    assert SPAM([weight]).step() is None


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.0}, r"`threshold` must be above 0.*got 0\.0"),
        ({"density": 0.0}, r"`density` must be above 0.*got 0\.0"),
        ({"density": 1.5}, r"`density` must be.*got 1\.5"),
        ({"clip_delay": 0}, r"`clip_delay` must be 1 or more, got 0"),
        ({"state_dtype": "float16"}, r"`state_dtype`.*got 'float16'"),
        ({"lr": math.nan}, r"`lr` must be 0 or more, got nan"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    """By name, with what was given; in the signature, in a group, and in a group that comes later."""
    with pytest.raises(ValueError, match=message):
        SPAM([Parameter(torch.zeros(2))], **settings)
    with pytest.raises(ValueError, match=message):
        SPAM([{"params": [Parameter(torch.zeros(2))], **settings}])
    optimizer = SPAM([Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [Parameter(torch.zeros(2))], **settings})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": 0.5, "foreach": True}, r"`density` below 1 .* neither `foreach=True` nor"),
        ({"density": 0.5, "state_dtype": "8bit"}, r"`density` below 1 .* nor a `state_dtype` of fewer bits"),
        ({"density": 0.5, "state_dtype": "bfloat16"}, r"`density` below 1 .* nor a `state_dtype` of fewer bits"),
        ({"density": 0.5, "capturable": True}, r"`capturable=True` .* neither `density` below 1"),
        ({"foreach": True, "capturable": True}, r"`capturable=True` .* nor `foreach=True`"),
        ({"foreach": True, "fused": True}, r"`fused=True` .* nor `foreach=True`"),
        ({"state_dtype": "bfloat16", "fused": True}, r"`fused=True` .* nor a `state_dtype` of fewer bits"),
    ],
    ids=str,
)
def test_settings_that_exclude_each_other(settings: dict[str, Any], message: str) -> None:
    """Refused when the optimizer is made, by the names of both."""
    with pytest.raises(ValueError, match=message):
        SPAM([Parameter(torch.zeros(2))], **settings)


# ---------------------------------------------------------------------- in a program


def test_copies_and_pickles() -> None:
    """A deep copy is stepped by itself."""
    optimizer = spam([([(6, 5)], QUICK | {"density": 0.5})], torch.float32)
    steps = list(gradients([(6, 5)], 40, torch.float32))
    for values in steps[:30]:
        give(optimizer, values)
        optimizer.step()
    copied = copy.deepcopy(optimizer)
    for one in (optimizer, copied):
        for values in steps[30:]:
            give(one, values)
            one.step()
    assert all_weights(copied)[0] is not all_weights(optimizer)[0]
    assert torch.equal(all_weights(copied)[0], all_weights(optimizer)[0])


@pytest.mark.parametrize("density", [1.0, 0.25])
def test_bytes_of_state(density: float) -> None:
    """At density 1 those of AdamW, and one number for each tensor; below it, a share of the moments and no more."""
    shapes = [(100, 200), (400,)]
    optimizer = spam([(shapes, {"density": density})], torch.float32)
    other = torch.optim.AdamW(parameters([(shapes, {})], torch.float32)[0])
    sizes = []
    for one in (optimizer, other):
        for values in gradients(shapes, 3, torch.float32):
            give(one, values)
            one.step()
        kept = [value for state in one.state.values() for value in state.values() if isinstance(value, Tensor)]
        sizes.append(sum(value.untyped_storage().nbytes() for value in kept))
    ours, theirs = sizes
    if density == 1:
        assert ours == theirs + 4 * len(shapes)
    else:
        # two numbers and a place for each coordinate in the mask; four standard deviations of its size
        held = 3 * 4 * (20_400 * density + 4 * math.sqrt(20_400 * density * (1 - density)))
        assert ours < held + 64
