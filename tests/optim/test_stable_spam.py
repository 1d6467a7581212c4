"""Stable-SPAM against its definition in float64, its two paths, what it refuses, and how it goes on."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from lightning_cl import FSDP2Strategy
from lightning_cl.optim import SPAM, StableSPAM, reset_state, second_moment
from ranks import Ranks
from toys import ToyModule, fit_stream, toy_stream, trainer
from traffic import Traffic

Groups = Sequence[tuple[Sequence[tuple[int, ...]], dict[str, Any]]]
DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "gamma1": 0.7,
    "gamma2": 0.9,
    "gamma3": 0.999,
    "reset_interval": 1000,
    "warmup_steps": 0,
    "annealing_steps": None,
}
# every setting differs; tensors of one number and of few are among them
GROUPS: Groups = [
    ([(6, 5), (7,)], {"lr": 0.001, "weight_decay": 0.1, "reset_interval": 500}),
    (
        [(4, 3), ()],
        {
            "lr": 2e-3,
            "betas": (0.8, 0.99),
            "eps": 1e-3,
            "gamma1": 0.85,
            "gamma2": 0.99,
            "gamma3": 0.9,
            "reset_interval": 333,
            "warmup_steps": 40,
            "annealing_steps": 700,
        },
    ),
    ([(8, 3)], {"lr": 0.0005, "betas": (0.0, 0.95), "weight_decay": 1.0, "gamma1": 0.0, "reset_interval": None}),
]
QUICK: dict[str, Any] = {"lr": 0.01, "reset_interval": 25, "gamma3": 0.9, "warmup_steps": 4}


class Reference:
    """The definition, in float64 numpy, a tensor at a time."""

    def __init__(self, values: Any, settings: dict[str, Any]) -> None:
        self.values = np.array(values, dtype=np.float64)
        self.settings = DEFAULTS | settings
        self.first, self.second = np.zeros_like(self.values), np.zeros_like(self.values)
        self.top = self.mean = self.square = 0.0
        self.total = self.since = self.resets = self.clipped = 0

    def reset(self) -> None:
        self.first, self.second = np.zeros_like(self.values), np.zeros_like(self.values)
        self.since, self.resets = 0, self.resets + 1

    def step(self, gradient: Any) -> None:
        mine = self.settings
        (beta1, beta2), eps, interval = mine["betas"], mine["eps"], mine["reset_interval"]
        gradient = np.array(gradient, dtype=np.float64)
        self.total += 1
        scale = 1.0
        if mine["annealing_steps"] is not None:
            length = mine["annealing_steps"] + 1
            scale = 0.75 + 0.25 * math.cos(math.pi * self.total / length) if self.total < length else 0.5
        gamma1, gamma2, gamma3 = mine["gamma1"] * scale, mine["gamma2"], mine["gamma3"]
        # AdaClip
        largest = np.abs(gradient).max()
        self.top = gamma3 * self.top + (1 - gamma3) * largest
        threshold = self.top / (1 - gamma3**self.total)
        spikes = np.abs(gradient) > threshold * (1 + 1e-12)
        if spikes.any():
            gradient = np.where(spikes, gradient / largest * threshold, gradient)
            self.clipped += int(spikes.sum())
        # AdaGN
        norm = math.sqrt((gradient**2).sum())
        self.mean = gamma1 * self.mean + (1 - gamma1) * norm
        self.square = gamma2 * self.square + (1 - gamma2) * norm**2
        if norm > 0:
            typical = (self.mean / (1 - gamma1**self.total)) / (math.sqrt(self.square / (1 - gamma2**self.total)) + eps)
            gradient = gradient / norm * typical
        # MoRet
        if interval is not None and self.since >= interval:
            self.reset()
        warm = 1.0
        if self.resets and self.since < mine["warmup_steps"]:
            warm = 1 - 0.99 * (1 + math.cos(math.pi * self.since / (mine["warmup_steps"] + 1))) / 2
        self.since += 1
        beta1 = beta1 * scale
        self.first = beta1 * self.first + (1 - beta1) * gradient
        self.second = beta2 * self.second + (1 - beta2) * gradient**2
        self.values = self.values * (1 - mine["lr"] * mine["weight_decay"])
        root = np.sqrt(self.second / (1 - beta2**self.since)) + eps
        self.values = self.values - mine["lr"] * warm * (self.first / (1 - beta1**self.since)) / root


def parameters(groups: Groups, dtype: torch.dtype) -> list[list[Parameter]]:
    """Small random weights, those of every dtype alike."""
    generator = torch.Generator().manual_seed(3)
    return [
        [Parameter((torch.randn(shape, generator=generator) * 0.1).to(dtype)) for shape in shapes]
        for shapes, _ in groups
    ]


def stable_spam(groups: Groups, dtype: torch.dtype, **settings: Any) -> StableSPAM:
    """The optimizer over fresh weights."""
    made = parameters(groups, dtype)
    return StableSPAM([{"params": own, **mine} for own, (_, mine) in zip(made, groups, strict=True)], **settings)


def references(groups: Groups, dtype: torch.dtype) -> list[Reference]:
    """The reference of each tensor."""
    return [
        Reference(parameter.detach().double().numpy(), settings)
        for own, (_, settings) in zip(parameters(groups, dtype), groups, strict=True)
        for parameter in own
    ]


def gradients(groups: Groups, steps: int, dtype: torch.dtype, rests: Sequence[int] = ()) -> Iterator[list[Any]]:
    """Noise of another size for each tensor; spikes in single numbers and in whole tensors; zeros at times.

    Tensors that ``rests`` numbers have no gradient in every third step.
    """
    shapes = [shape for own, _ in groups for shape in own]
    rng = np.random.default_rng(5)
    for step in range(steps):
        drawn: list[Any] = []
        for number, shape in enumerate(shapes):
            values = (rng.standard_normal(shape) + 0.2) * 10.0 ** (-number)
            if step % 40 == 30:
                values = np.where(rng.random(shape) < 0.3, values * 10 ** rng.uniform(1, 3), values)
            if step % 70 == 50:
                values = values * 1000
            if step in (0, 1, 80):
                values = values * 0
            resting = number in rests and step % 3 == 1
            drawn.append(None if resting else torch.tensor(values).to(dtype))
        yield drawn


def all_weights(optimizer: torch.optim.Optimizer) -> list[Parameter]:
    """The parameters in the order of the groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def give(optimizer: torch.optim.Optimizer, values: Sequence[Tensor | None]) -> None:
    """Set the gradients of all parameters and take a step."""
    for parameter, value in zip(all_weights(optimizer), values, strict=True):
        parameter.grad = None if value is None else value.clone()
    optimizer.step()


def distance(parameter: Parameter, reference: Reference) -> float:
    """The largest difference of a weight."""
    return float(np.abs(parameter.detach().double().numpy() - reference.values).max())


def same_state(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> bool:
    """Equal keys, dtypes and bits, of weights and of state."""
    mine, others = one.state_dict()["state"], other.state_dict()["state"]
    assert {n: values.keys() for n, values in mine.items()} == {n: values.keys() for n, values in others.items()}
    for number, values in mine.items():
        for key, value in values.items():
            assert value.dtype == others[number][key].dtype
            assert torch.equal(value, others[number][key]), (number, key)
    for p, q in zip(all_weights(one), all_weights(other), strict=True):
        assert torch.equal(p, q)
    return True


# ---------------------------------------------------------------------- the definition


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_every_step_is_the_definition(dtype: torch.dtype, tolerance: float, foreach: bool) -> None:
    """1,200 steps over two resets and more, with spikes, zeros, several groups, decay, and a tensor that rests."""
    optimizer, expected = stable_spam(GROUPS, dtype, foreach=foreach), references(GROUPS, dtype)
    for number, values in enumerate(gradients(GROUPS, 1200, dtype, rests=[2])):
        give(optimizer, values)
        for reference, value in zip(expected, values, strict=True):
            if value is not None:
                reference.step(value.double().numpy())
        for parameter, reference in zip(all_weights(optimizer), expected, strict=True):
            assert distance(parameter, reference) < tolerance, f"step {number}"
    assert [one.resets for one in expected] == [2, 2, 2, 3, 0]
    assert all(one.clipped > 20 for one in expected)
    for one, parameter in zip(expected, all_weights(optimizer), strict=True):
        state = optimizer.state[parameter]
        found = [state[key].item() for key in ("step", "resets", "norm_step", "max_avg", "norm_avg", "norm_avg_sq")]
        assert found == pytest.approx([one.since, one.resets, one.total, one.top, one.mean, one.square], rel=1e-5)


def test_defaults() -> None:
    """The signature's are those of the paper, which the reference and the page name."""
    group = StableSPAM([Parameter(torch.zeros(1))]).param_groups[0]
    assert {name: group[name] for name in DEFAULTS} == DEFAULTS
    assert (group["foreach"], group["state_dtype"]) == (None, None)


def test_a_spike_reaches_the_moments_at_a_bounded_size() -> None:
    """Whatever its size: the gradient that Adam sees, which is that in `grad`, has a norm near 1."""
    for size in (1e3, 1e9):
        weight = Parameter(torch.zeros(3, dtype=torch.float64))
        optimizer = StableSPAM([weight], betas=(0.0, 0.0))
        for _ in range(100):
            give(optimizer, [torch.ones(3, dtype=torch.float64)])
        give(optimizer, [torch.tensor([1.0, size, -size], dtype=torch.float64)])
        state = optimizer.state[weight]
        assert torch.equal(state["exp_avg"], weight.grad)
        assert torch.equal(state["exp_avg_sq"], weight.grad.square())
        # (0.7 + 0.3 x) / sqrt(0.9 + 0.1 x²) of a norm that is x times those before it
        assert 0.9 < weight.grad.norm().item() < math.sqrt(0.7**2 / 0.9 + 0.3**2 / 0.1)
        threshold = state["max_avg"].item() / (1 - 0.999**101)
        ratio = (weight.grad / weight.grad[1]).tolist()
        assert ratio == pytest.approx([1 / threshold, 1, -1], rel=1e-9)


def test_averages_outlive_resets() -> None:
    """The threshold after a reset is that of before; bias-corrected anew it would clip nothing for long."""
    weight = Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = StableSPAM([weight], reset_interval=50)
    ones = torch.ones(4, dtype=torch.float64)
    for _ in range(51):
        give(optimizer, [ones])
    state = optimizer.state[weight]
    assert (state["step"].item(), state["resets"].item(), state["norm_step"].item()) == (1, 1, 51)
    give(optimizer, [torch.tensor([1.0, 1.0, 1.0, 100.0], dtype=torch.float64)])
    threshold = (0.001 * 100 + 0.999 * (1 - 0.999**51)) / (1 - 0.999**52)
    assert (weight.grad[3] / weight.grad[0]).item() == pytest.approx(threshold, rel=1e-9)
    optimizer.reset_moments()
    assert (state["step"].item(), state["resets"].item(), state["norm_step"].item()) == (0, 2, 52)
    assert state["exp_avg"].abs().sum() == 0
    assert state["norm_avg"] > 1


def test_the_step_of_a_reset_uses_new_moments() -> None:
    """Its size is the learning rate, against the sign of its own gradient, whatever the moments were."""
    weight = Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = StableSPAM([weight], lr=0.1, reset_interval=30)
    for _ in range(30):
        give(optimizer, [torch.ones(1, dtype=torch.float64)])
    before = weight.item()
    give(optimizer, [-torch.ones(1, dtype=torch.float64)])
    assert weight.item() - before == pytest.approx(0.1, rel=1e-6)


def test_a_rare_row_learns() -> None:
    """After steps without any gradient, the first ones are scaled, not lost."""
    table = nn.Embedding(4, 3)
    start = table.weight.detach().clone()
    optimizer = StableSPAM(table.parameters(), lr=0.1)
    for step in range(33):
        optimizer.zero_grad()
        (table(torch.tensor([2])).sum() * (0 if step < 30 else 1)).backward()
        optimizer.step()
    moved = (table.weight.detach() - start).abs().amin(dim=1)
    assert moved[2] > 0.01
    assert moved[[0, 1, 3]].abs().sum() == 0


def test_scale_of_gradients_does_not_matter() -> None:
    """AdaGN divides by the norm: gradients a thousand times as large give the same steps."""
    runs = [stable_spam(GROUPS[:1], torch.float64) for _ in range(2)]
    for values in gradients(GROUPS[:1], 60, torch.float64):
        for factor, optimizer in zip((1.0, 1000.0), runs, strict=True):
            give(optimizer, [factor * value for value in values])
    for one, other in zip(*(all_weights(run) for run in runs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


# ---------------------------------------------------------------------- the two paths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_dtype", [None, "float32", "bfloat16"])
def test_foreach_is_single_to_the_last_bit(dtype: torch.dtype, state_dtype: Any) -> None:
    """Weights, moments, averages and gradients, over resets, with spikes, an empty tensor and a large one."""
    groups: Groups = [
        ([(6, 5), (7,), ()], {**QUICK, "weight_decay": 0.1}),
        ([(0, 3), (33, 200)], {**QUICK, "reset_interval": 17, "annealing_steps": 30}),
    ]
    runs = [stable_spam(groups, dtype, foreach=foreach, state_dtype=state_dtype) for foreach in (False, True)]
    for values in gradients(groups, 60, dtype, rests=[1]):
        for optimizer in runs:
            give(optimizer, values)
        for one, other in zip(*(all_weights(optimizer) for optimizer in runs), strict=True):
            assert one.grad is None or torch.equal(one.grad, other.grad)
    assert same_state(*runs)
    state = runs[0].state[all_weights(runs[0])[0]]
    assert {key: state[key].dtype for key in ("max_avg", "norm_avg", "norm_avg_sq")} == dict.fromkeys(
        ("max_avg", "norm_avg", "norm_avg_sq"), torch.float32
    )


# ---------------------------------------------------------------------- going on

FORMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "annealing": (torch.float32, {"annealing_steps": 40}),
    "bfloat16 weights": (torch.bfloat16, {}),
    "bfloat16 state": (torch.float32, {"state_dtype": "bfloat16"}),
    "foreach": (torch.float32, {"foreach": True}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stop", [1, 24, 25, 27, 44])
def test_resume_to_the_same_bits(form: str, stop: int) -> None:
    """Around a reset at step 25, inside of the warm-up after it, and between resets; through bytes."""
    dtype, settings = FORMS[form]
    groups: Groups = [([(6, 5), (7,), ()], QUICK)]
    optimizer, resumed = stable_spam(groups, dtype, **settings), None
    for step, values in enumerate(gradients(groups, 60, dtype, rests=[1])):
        if step == stop:
            file = io.BytesIO()
            torch.save([optimizer.state_dict(), [p.detach() for p in all_weights(optimizer)]], file)
            file.seek(0)
            state, saved = torch.load(file, weights_only=True)
            resumed = stable_spam(groups, dtype, **settings)
            with torch.no_grad():
                for parameter, value in zip(all_weights(resumed), saved, strict=True):
                    parameter.copy_(value)
            resumed.load_state_dict(state)
            assert same_state(resumed, optimizer)
        for one in (optimizer, resumed):
            if one is not None:
                give(one, values)
    assert resumed is not None
    assert same_state(resumed, optimizer)


def test_no_counter_lies_outside_of_the_state() -> None:
    """All numbers that a step changes are in ``state_dict``."""
    optimizer = stable_spam([([(6, 5)], QUICK)], torch.float32)
    numbers = {name: value for name, value in vars(optimizer).items() if isinstance(value, (int, float))}
    for values in gradients([([(6, 5)], QUICK)], 60, torch.float32):
        give(optimizer, values)
    assert {name: vars(optimizer)[name] for name in numbers} == numbers
    assert {name: optimizer.param_groups[0][name] for name in QUICK} == QUICK
    state = optimizer.state_dict()["state"][0]
    scalars = {name: value.item() for name, value in state.items() if name in ("step", "resets", "norm_step")}
    assert scalars == {"step": 10.0, "resets": 2.0, "norm_step": 60.0}


class WithStableSPAM(ToyModule):
    """The toy module with Stable-SPAM and a learning rate that falls."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = {"lr": 0.02, "reset_interval": 5, "gamma3": 0.5, "annealing_steps": 9} | settings

    def configure_optimizers(self) -> Any:
        optimizer = StableSPAM(self.parameters(), **self.settings)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def every_step(root: Path) -> ModelCheckpoint:
    """Saves the state after each step."""
    return ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def test_resume_from_a_checkpoint_of_the_trainer(tmp_path: Path) -> None:
    """A Trainer goes on between resets, to the same bits; each part of the method changes the weights."""
    straight = fit_stream(tmp_path, [every_step(tmp_path)], module=WithStableSPAM())
    for step in (3, 5, 7):  # of 12, with resets before the sixth and the eleventh
        path, saver = tmp_path / f"step={step}.ckpt", every_step(tmp_path / "resumed")
        resumed = fit_stream(tmp_path, [saver], module=WithStableSPAM(), ckpt_path=path)
        assert torch.equal(resumed, straight)
    others: list[dict[str, Any]] = [
        {"reset_interval": None},
        {"gamma1": 0.0},
        {"gamma2": 0.0},
        {"gamma3": 0.0},
        {"warmup_steps": 3},
        {"annealing_steps": None},
    ]
    for other in others:
        assert not torch.allclose(straight, fit_stream(tmp_path, module=WithStableSPAM(**other)), atol=1e-3), other


@pytest.mark.parametrize("before", [torch.optim.AdamW, SPAM])
def test_goes_on_from_adam(before: type[torch.optim.Optimizer]) -> None:
    """Moments and step of a checkpoint of AdamW or SPAM go on; the averages of norms begin."""
    groups: Groups = [([(6, 5)], {})]
    old = before(parameters(groups, torch.float32)[0], lr=0.01)
    for values in gradients(groups, 10, torch.float32):
        give(old, values)
    optimizer = StableSPAM(all_weights(old), lr=0.01)
    optimizer.load_state_dict(old.state_dict())
    (theirs,), (ours,) = old.state.values(), optimizer.state.values()
    assert all(torch.equal(theirs[key], ours[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert [ours[key].item() for key in ("norm_step", "max_avg", "norm_avg", "norm_avg_sq", "resets")] == [0.0] * 5
    give(optimizer, next(gradients(groups, 1, torch.float32)))
    assert optimizer.state[all_weights(optimizer)[0]]["norm_step"] == 1


def test_a_part_of_its_own_state_is_refused() -> None:
    """Averages are all there, or it was another optimizer that saved."""
    optimizer = stable_spam([([(3,)], {})], torch.float32)
    give(optimizer, [torch.ones(3)])
    state = optimizer.state_dict()
    del state["state"][0]["norm_avg"]
    with pytest.raises(ValueError, match=r"lacks \['norm_avg'\] of `StableSPAM`"):
        stable_spam([([(3,)], {})], torch.float32).load_state_dict(state)


def test_reset_now_and_second_moment() -> None:
    """As at the interval, through the functions that act on any optimizer."""
    groups: Groups = [([(9, 5), (7,)], {"lr": 0.01, "warmup_steps": 6})]
    optimizer, expected = stable_spam(groups, torch.float64), references(groups, torch.float64)
    for step, values in enumerate(gradients(groups, 60, torch.float64)):
        if step in (10, 40):
            reset_state(optimizer)
            for reference in expected:
                reference.reset()
        give(optimizer, values)
        for parameter, reference, value in zip(all_weights(optimizer), expected, values, strict=True):
            reference.step(value.numpy())
            assert distance(parameter, reference) < 1e-12
            found = second_moment(optimizer, parameter)
            assert found is not None
            np.testing.assert_allclose(found.numpy(), reference.second, rtol=1e-9)


def test_groups_that_come_later_and_parameters_that_rest() -> None:
    """Each has a clock of its own; what has no gradient keeps its weights, and gets no state."""
    groups: Groups = [([(6, 5)], QUICK), ([(4, 4)], QUICK | {"annealing_steps": 20})]
    made, expected = parameters(groups, torch.float64), references(groups, torch.float64)
    optimizer = StableSPAM(made[0], **QUICK)
    for step, values in enumerate(gradients(groups, 60, torch.float64)):
        if step == 20:
            optimizer.add_param_group({"params": made[1], **groups[1][1]})
            give(optimizer, [None, None])
            assert made[1][0] not in optimizer.state
        values = values if step >= 20 else values[:1]
        give(optimizer, values)
        for reference, value in zip(expected, values, strict=False):
            reference.step(value.numpy())
    for parameter, reference in zip(all_weights(optimizer), expected, strict=True):
        assert distance(parameter, reference) < 1e-12
    assert [one.total for one in expected] == [60, 40]


def test_annealed_by_their_own_clocks() -> None:
    """Two tensors of one group and one point of the reset clock, of which one rested before a reset."""
    settings = {"annealing_steps": 30, "lr": 0.01, "weight_decay": 0.1}
    groups: Groups = [([(3,), (3,)], settings)]
    optimizer, expected = stable_spam(groups, torch.float64), references(groups, torch.float64)
    for step, values in enumerate(gradients(groups, 40, torch.float64)):
        if step == 10:
            optimizer.reset_moments()
            for reference in expected:
                reference.reset()
        if step < 10 and step % 2:
            values[1] = None
        give(optimizer, values)
        for parameter, reference, value in zip(all_weights(optimizer), expected, values, strict=True):
            if value is not None:
                reference.step(value.numpy())
            assert distance(parameter, reference) < 1e-12
    assert [one.total for one in expected] == [40, 35]


# ---------------------------------------------------------------------- shards


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def network() -> nn.Sequential:
    """With uneven shards, and one that is empty on the second rank."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def train(sharded: bool, foreach: bool) -> tuple[list[Tensor], list[Any]]:
    """Sixty steps with spikes in single numbers; return full weights and averages, and the collectives of a step."""
    model = network()
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
    groups = [
        {"params": list(model[0].parameters()), "weight_decay": 0.1},
        {"params": list(model[2].parameters()), "gamma3": 0.5},
    ]
    optimizer = StableSPAM(groups, **QUICK | {"foreach": foreach})
    generator = torch.Generator().manual_seed(0)
    seen: list[Any] = []
    for step in range(60):
        # one batch for both ranks, whose mean it is
        inputs = torch.randn(8, 4, generator=generator).double()
        inputs[0] *= 1000 if step % 20 == 15 else 1
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        with Traffic() as traffic:
            optimizer.step()
        seen = traffic.seen
    tensors = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    averages = [state[key] for state in optimizer.state.values() for key in ("max_avg", "norm_avg", "norm_avg_sq")]
    return [value.detach().clone() for value in (*tensors, *averages)], seen


@pytest.mark.distributed
@pytest.mark.parametrize("foreach", [False, True])
def test_shards_end_where_one_process_ends(two_ranks: Ranks, foreach: bool) -> None:
    """Norms and maxima are those of whole tensors, over all parameters in two small reductions."""
    expected, nothing = train(False, foreach)
    assert nothing == []
    for found, seen in two_ranks.run(train, True, foreach):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
        assert [(kind, size) for kind, size in seen if "reduce" in kind or "gather" in kind] == [("all-reduce", 32)] * 2


def fit_sharded(root: Path, ckpt_path: Path | None = None) -> Tensor:
    """Fit on this rank with our strategy; return the full weights."""
    module, stream = WithStableSPAM(), toy_stream(batch_size=4)
    fit = trainer(root, [every_step(root)], strategy=FSDP2Strategy(wrap=["Linear"]), devices=2)
    fit.fit(module, datamodule=stream, ckpt_path=ckpt_path)
    full = [p.full_tensor() for p in module.parameters() if isinstance(p, DTensor)]
    return torch.cat([p.detach().flatten() for p in full])


@pytest.mark.distributed
def test_two_ranks_of_our_strategy_and_their_resume(two_ranks: Ranks, tmp_path: Path) -> None:
    """The weights of one process on the joined batch; the same bits after a resume between resets."""
    expected = fit_stream(tmp_path, module=WithStableSPAM())
    straight = two_ranks.run(fit_sharded, tmp_path / "straight")
    torch.testing.assert_close(straight[0], expected, rtol=0, atol=1e-6)
    assert torch.equal(straight[0], straight[1])
    resumed = two_ranks.run(fit_sharded, tmp_path / "resumed", tmp_path / "straight" / "step=7.ckpt")
    assert torch.equal(resumed[0], straight[0])


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma1": 1.0}, r"`gamma1` must be from 0 to below 1, got 1\.0"),
        ({"gamma2": -0.1}, r"`gamma2` must be from 0 to below 1, got -0\.1"),
        ({"gamma3": math.nan}, r"`gamma3` must be from 0 to below 1, got nan"),
        ({"annealing_steps": 0}, r"`annealing_steps` must be 1 or more, or None for no annealing, got 0"),
        ({"state_dtype": "float16"}, r"`state_dtype`.*got 'float16'"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    """By name, with what was given; in the signature and in a group that comes later."""
    with pytest.raises(ValueError, match=message):
        StableSPAM([Parameter(torch.zeros(2))], **settings)
    optimizer = StableSPAM([Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [Parameter(torch.zeros(2))], **settings})
    assert len(optimizer.param_groups) == 1


# ---------------------------------------------------------------------- in a program


def test_copies() -> None:
    """A deep copy is stepped by itself, to the same weights."""
    groups: Groups = [([(6, 5)], QUICK)]
    optimizer = stable_spam(groups, torch.float32)
    steps = list(gradients(groups, 40, torch.float32))
    for values in steps[:30]:
        give(optimizer, values)
    copied = copy.deepcopy(optimizer)
    for one in (optimizer, copied):
        for values in steps[30:]:
            give(one, values)
    assert same_state(copied, optimizer)


def test_closure_and_learning_rate_as_a_tensor() -> None:
    """The closure is evaluated once, with gradients on, and its loss returned."""
    weight = Parameter(torch.ones(3))
    optimizer = StableSPAM([weight], lr=torch.tensor(0.1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    torch.testing.assert_close(weight.detach(), torch.full((3,), 0.9))


def test_bytes_of_state() -> None:
    """Those of AdamW, and five numbers for each tensor."""
    shapes = [(100, 200), (400,)]
    optimizer = stable_spam([(shapes, {})], torch.float32)
    other = torch.optim.AdamW(parameters([(shapes, {})], torch.float32)[0])
    sizes = []
    for one in (optimizer, other):
        for values in gradients([(shapes, {})], 3, torch.float32):
            give(one, values)
        sizes.append(sum(value.untyped_storage().nbytes() for state in one.state.values() for value in state.values()))
    assert sizes[0] == sizes[1] + 5 * 4 * len(shapes)


@pytest.mark.parametrize("foreach", [False, True])
def test_nothing_waits_for_the_device(foreach: bool) -> None:
    """To ask for a value on the device that has none would raise; averages lie there, in float32."""
    weight = Parameter(torch.zeros(4, 5, device="meta", dtype=torch.bfloat16))
    optimizer = StableSPAM([weight], foreach=foreach, reset_interval=1)
    for _ in range(2):
        give(optimizer, [torch.zeros_like(weight)])
    state = optimizer.state[weight]
    assert {state[key].device.type for key in ("step", "resets", "norm_step")} == {"cpu"}
    for key in ("max_avg", "norm_avg", "norm_avg_sq"):
        assert (state[key].device.type, state[key].dtype) == ("meta", torch.float32)
    assert [state[key].item() for key in ("step", "resets", "norm_step")] == [1, 1, 2]


def test_steps_without_values() -> None:
    """As `lightning-cl plan` takes them."""
    with FakeTensorMode():
        weight = Parameter(torch.zeros(4, 5))
        optimizer = StableSPAM([weight])
        for _ in range(2):
            give(optimizer, [torch.zeros_like(weight)])
        assert optimizer.state[weight]["norm_step"].item() == 2
