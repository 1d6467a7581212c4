"""MeZO against its definition, on one process and on two, through Lightning, and what it refuses."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import Parameter
from torch.nn.functional import cross_entropy, dropout
from torch.utils.data import DataLoader

from lightning_cl import EWC, ContinualCallback, FSDP2Strategy
from lightning_cl.core.live_bytes import LiveBytes
from lightning_cl.core.update import OptimizerStep
from lightning_cl.functional.mezo import direction
from lightning_cl.optim import MeZO, reset_state
from ranks import Ranks
from toys import SelfSharded, ToyModule, toy_data, toy_loaders, trainer, weights

EPS = 1e-3


def quadratic() -> tuple[list[Parameter], Callable[[], Tensor]]:
    """Three parameters in float64, and a loss with every product of two weights in it."""
    generator = torch.Generator().manual_seed(0)
    parameters = [
        Parameter(torch.randn(shape, dtype=torch.float64, generator=generator)) for shape in ((3, 2), (), (4,))
    ]
    matrix = torch.randn(11, 11, dtype=torch.float64, generator=generator)

    def loss() -> Tensor:
        vector = torch.cat([parameter.flatten() for parameter in parameters])
        return vector @ matrix @ vector + vector.sum()

    return parameters, loss


def plain_steps(
    parameters: Sequence[Tensor],
    losses: Sequence[Callable[[], Tensor]],
    settings: Sequence[dict[str, float]],
    *,
    seed: int = 0,
    first: int = 0,
) -> None:
    """The algorithm with copies of all weights and whole directions, a loss for each step."""
    with torch.no_grad():
        for step, loss in enumerate(losses, start=first):
            start = [parameter.clone() for parameter in parameters]
            along = [direction(parameter, (seed, number, step)) for number, parameter in enumerate(parameters)]
            values = []
            for side in (EPS, -EPS):
                for parameter, origin, z in zip(parameters, start, along, strict=True):
                    parameter.copy_(origin + side * z)
                values.append(float(loss()))
            slope = (values[0] - values[1]) / (2 * EPS)
            for parameter, origin, z, group in zip(parameters, start, along, settings, strict=True):
                parameter.copy_(origin - group["lr"] * (slope * z + group.get("weight_decay", 0.0) * origin))


# ---------------------------------------------------------------------- the definition


def test_a_step_on_a_quadratic_in_closed_form() -> None:
    """There the projected gradient is that of the gradient, exactly; each group has its rate and its decay."""
    parameters, loss = quadratic()
    settings = [{"lr": 0.01}, {"lr": 0.002, "weight_decay": 0.3}, {"lr": 0.002, "weight_decay": 0.3}]
    optimizer = MeZO(
        [{"params": parameters[:1], "lr": 0.01}, {"params": parameters[1:], "weight_decay": 0.3}], lr=0.002, seed=5
    )
    for step in range(3):
        start = [parameter.detach().clone() for parameter in parameters]
        gradients = torch.autograd.grad(loss(), parameters)
        along = [direction(parameter, (5, number, step)) for number, parameter in enumerate(parameters)]
        slope = sum((g * z).sum() for g, z in zip(gradients, along, strict=True))
        before = loss().item()
        returned = optimizer.step(loss)
        assert float(returned) == pytest.approx(before, abs=1e-4)
        for parameter, origin, z, group in zip(parameters, start, along, settings, strict=True):
            expected = origin - group["lr"] * (slope * z + group.get("weight_decay", 0.0) * origin)
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-10, atol=1e-10)
            assert (expected - origin).abs().max() > 1e-3


def test_the_mean_step_is_a_step_of_gradient_descent() -> None:
    """Over directions z, the mean of (z g) z is g."""
    parameters, loss = quadratic()
    start = [parameter.detach().clone() for parameter in parameters]
    (gradient,) = torch.autograd.grad(loss(), parameters[2:])
    total, count = torch.zeros(4, dtype=torch.float64), 1000
    optimizer = MeZO(parameters[2:], lr=1.0)
    for _ in range(count):
        optimizer.step(loss)
        total += start[2] - parameters[2].detach()
        with torch.no_grad():
            parameters[2].copy_(start[2])
    # each coordinate has a variance of |g|^2 + g_i^2
    bound = 4 * (2 * gradient.square().sum() / count).sqrt()
    assert (total / count - gradient).abs().max() < bound < gradient.abs().max() / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_the_plain_loop(dtype: torch.dtype) -> None:
    """Forty steps of a network, without a copy of its weights."""
    inputs, labels = toy_data().tensors
    ours, plain = (ToyModule().to(dtype) for _ in range(2))
    optimizer = MeZO(ours.parameters(), lr=0.01, weight_decay=0.1)

    def losses(model: nn.Module) -> list[Callable[[], Tensor]]:
        return [
            lambda rows=rows: cross_entropy(model(inputs[rows].to(dtype)), labels[rows])  # type: ignore[misc]
            for rows in torch.randint(48, (40, 8), generator=torch.Generator().manual_seed(0))
        ]

    start = weights(ours)
    for loss in losses(ours):
        optimizer.step(loss)
    plain_steps(list(plain.parameters()), losses(plain), [{"lr": 0.01, "weight_decay": 0.1}] * 4)
    # the losses of 32 bits differ in their last bit, which the slope multiplies by 1 / (2 eps)
    tolerance = 2e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(weights(ours), weights(plain), rtol=0, atol=tolerance)
    assert (weights(ours) - start).abs().max() > 0.1


def test_moving_there_and_back_drifts_by_rounding_only() -> None:
    """Without a rate, 400 steps leave float32 weights of 0.02 where they were to a part in a million."""
    weight = Parameter(0.02 * torch.randn(10_000, generator=torch.Generator().manual_seed(0)))
    start, optimizer = weight.detach().clone(), MeZO([weight], lr=0.0)
    for _ in range(400):
        optimizer.step(lambda: weight.sum())
    drift = float((weight.detach() - start).square().mean().sqrt())
    assert 1e-9 < drift < 4e-8


def test_a_tensor_that_is_not_contiguous_moves_along_the_same_direction() -> None:
    """Its elements are numbered as they are indexed, not as they lie in memory."""
    start = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = []
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = Parameter(start.clone(memory_format=layout))
        MeZO([weight], lr=0.1, weight_decay=0.2).step(lambda weight=weight: weight.sin().sum())
        moved.append(weight.detach().contiguous())
    torch.testing.assert_close(moved[1], moved[0], rtol=0, atol=1e-11)
    assert (moved[0] - start).abs().max() > 0.01


def test_frozen_parameters_rest() -> None:
    """They neither move nor count, and do not change the directions of the others; half precision may be among them."""
    parameters, _ = quadratic()
    alone, alone_loss = quadratic()
    alone[1].requires_grad_(False)
    half = Parameter(torch.ones(3, dtype=torch.bfloat16), requires_grad=False)
    optimizer = MeZO([*alone, half], lr=0.01)
    optimizer.step(alone_loss)
    # the direction of the others is that of a step with all
    moved = [start.detach() - p.detach() for p, start in zip(alone, parameters, strict=True)]
    assert float(moved[1]) == 0
    z = [direction(parameters[number], (0, number, 0)) for number in (0, 2)]
    torch.testing.assert_close(moved[0] / moved[0][0, 0], z[0] / z[0][0, 0])
    torch.testing.assert_close(moved[2] / moved[0][0, 0], z[1] / z[0][0, 0])
    assert [int(optimizer.state[p]["step"]) for p in alone] == [1, 0, 1]
    half.requires_grad_(True)
    with pytest.raises(ValueError, match=r"needs parameters in float32, got torch\.bfloat16"):
        optimizer.step(alone_loss)


def test_schedulers_set_the_rate() -> None:
    """A step at rate 0 moves nothing but by rounding."""
    parameters, loss = quadratic()
    optimizer = MeZO(parameters, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
    start = parameters[0].detach().clone()
    optimizer.step(loss)
    scheduler.step()
    moved = parameters[0].detach().clone()
    optimizer.step(loss)
    assert (moved - start).abs().max() > 0.01
    torch.testing.assert_close(parameters[0].detach(), moved, rtol=0, atol=1e-15)


# ---------------------------------------------------------------------- forwards


def test_both_forwards_see_the_same_noise() -> None:
    """Masks of dropout are the same on both sides, others in the next step, and cost the generator one forward."""
    weight, seen = Parameter(torch.ones(())), []

    def loss() -> Tensor:
        seen.append(dropout(torch.ones(64)))
        return (weight * seen[-1]).mean()

    optimizer = MeZO([weight])
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for _ in range(2):
            optimizer.step(loss)
        after = torch.get_rng_state()
        torch.manual_seed(3)
        for _ in range(2):
            dropout(torch.ones(64))
        assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2])


def test_copies_that_autocast_keeps_are_not_used_on_the_other_side() -> None:
    """A loop that stays in one autocast learns as well; with the copies the losses were equal."""
    model, inputs = nn.Linear(8, 1), torch.ones(4, 8)
    start, optimizer = weights(model), MeZO(model.parameters(), lr=0.01, eps=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(lambda: model(inputs).float().sum())
    assert (weights(model) - start).abs().max() > 0.01


def test_losses_that_have_no_gradient() -> None:
    """A number that no graph leads to is as good: here the share of wrong answers, over a wide step."""
    inputs = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    labels = inputs @ torch.tensor([1.0, -1.0, 2.0, 0.0, 0.0]) > 0
    weight = Parameter(torch.zeros(5))

    def error() -> float:
        return float(((inputs @ weight > 0) != labels).float().mean())

    optimizer = MeZO([weight], lr=0.1, eps=0.1)
    first = error()
    for _ in range(100):
        assert optimizer.step(error).dtype == torch.float64
    assert error() < 0.1 < first


def test_no_gradients_and_no_graph() -> None:
    """The peak is that of a forward without gradients and one direction; AdamW's here is three times as high."""
    layers = [layer for _ in range(8) for layer in (nn.Linear(128, 128), nn.Tanh())]
    inputs = torch.randn(64, 128)

    def peak(run: Callable[[nn.Module, Callable[[], Tensor]], Any]) -> int:
        model = nn.Sequential(*layers)
        with LiveBytes([*model.parameters(), inputs]) as live:
            run(model, lambda: model(inputs).square().mean())
        return live.peak

    def adamw(model: nn.Module, loss: Callable[[], Tensor]) -> None:
        loss().backward()
        torch.optim.AdamW(model.parameters()).step()
        assert all(p.grad is not None for p in model.parameters())
        model.zero_grad()

    def mezo(model: nn.Module, loss: Callable[[], Tensor]) -> None:
        MeZO(model.parameters()).step(loss)
        assert all(p.grad is None for p in model.parameters())

    forward = peak(lambda _, loss: torch.no_grad()(loss)())
    taken = peak(mezo)
    assert taken <= forward + 4 * 128 * 128
    assert taken < peak(adamw) / 3


# ---------------------------------------------------------------------- errors leave the weights


def calls_that_fail(failing: int) -> Callable[[], Tensor]:
    """A closure that raises at one of its calls."""
    calls = iter(range(2))

    def loss() -> Tensor:
        if next(calls) == failing:
            raise RuntimeError("out of memory")
        return torch.zeros(())

    return loss


@pytest.mark.parametrize("failing", [0, 1])
def test_weights_come_back_after_an_error(failing: int) -> None:
    """On either side."""
    parameters, _ = quadratic()
    start = [parameter.detach().clone() for parameter in parameters]
    with pytest.raises(RuntimeError, match="out of memory"):
        MeZO(parameters).step(calls_that_fail(failing))
    for parameter, origin in zip(parameters, start, strict=True):
        torch.testing.assert_close(parameter.detach(), origin, rtol=0, atol=1e-15)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_move_nothing(value: float) -> None:
    """Neither along the direction nor by decay; a warning says so, and the next step takes the next direction."""
    parameters, loss = quadratic()
    start = [parameter.detach().clone() for parameter in parameters]
    optimizer = MeZO(parameters, lr=0.01, weight_decay=0.5)
    values = iter([1.0, value])
    with pytest.warns(RuntimeWarning, match=f"left the weights as they are: the losses.* 1.0 and {value}"):
        returned = optimizer.step(lambda: torch.tensor(next(values)))
    assert not returned.isfinite()
    for parameter, origin in zip(parameters, start, strict=True):
        torch.testing.assert_close(parameter.detach(), origin, rtol=0, atol=1e-15)
    optimizer.step(loss)
    plain_steps(start, [quadratic_at(start)], [{"lr": 0.01, "weight_decay": 0.5}] * 3, first=1)
    for parameter, expected in zip(parameters, start, strict=True):
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-11)


def quadratic_at(parameters: Sequence[Tensor]) -> Callable[[], Tensor]:
    """The loss of :func:`quadratic` at other tensors."""
    own, loss = quadratic()

    def moved() -> Tensor:
        for mine, given in zip(own, parameters, strict=True):
            mine.data.copy_(given)
        return loss()

    return moved


def with_graph(model: nn.Module) -> Callable[[], Tensor]:
    """A closure that turns gradients on again."""
    return torch.enable_grad()(lambda: model(torch.ones(2, 6)).square().mean())


def with_backward(model: nn.Module) -> Callable[[], Tensor]:
    """A closure of an optimizer of first order whose forward keeps nothing for its backward."""

    @torch.enable_grad()
    def closure() -> Tensor:
        loss = sum(parameter.sum() for parameter in model.parameters())
        loss.backward()
        return loss.detach()

    return closure


@pytest.mark.parametrize("kind", [with_graph, with_backward])
def test_a_backward_in_the_closure_is_refused(kind: Callable[[nn.Module], Callable[[], Tensor]]) -> None:
    """At the first tensor that is kept for it, or the first gradient; the model is left as it was."""
    model = ToyModule()
    start = weights(model)
    with pytest.raises(ValueError, match=r"built a graph, or left gradients.*self\.optimizers\(\)\.step\(lambda"):
        MeZO(model.parameters(), lr=1.0).step(kind(model))
    torch.testing.assert_close(weights(model), start, rtol=0, atol=1e-7)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("value", "found"),
    [(None, "None"), (torch.ones(2), r"shape \(2,\) and torch.float32"), (torch.tensor(1j), r"torch.complex64")],
)
def test_what_is_no_loss_is_refused(value: Any, found: str) -> None:
    """A closure that forgets to return, and losses of samples."""
    with pytest.raises(ValueError, match=f"must return the loss, one number, got .*{found}"):
        MeZO([Parameter(torch.ones(2))]).step(lambda: value)


def test_a_step_without_a_closure_is_refused() -> None:
    """As of a loop of first order, and of a gradient scaler, which says nothing of itself."""
    optimizer = MeZO([Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=r"needs a closure.*'bf16-mixed'.*automatic_optimization = False"):
        optimizer.step()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(ValueError, match=r"instead of `precision='16-mixed'`"):
        scaler.step(optimizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "`lr` must be 0 or more, got -1.0"),
        ({"weight_decay": -0.1}, "`weight_decay` must be 0 or more, got -0.1"),
        ({"eps": 0.0}, "`eps` must be above 0, got 0.0"),
        ({"lr": float("nan")}, "`lr` must be 0 or more, got nan"),
    ],
)
def test_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    """Refused when the optimizer is built."""
    with pytest.raises(ValueError, match=message):
        MeZO([Parameter(torch.ones(2))], **settings)


@pytest.mark.parametrize(("name", "other"), [("eps", 0.01), ("seed", 7)])
def test_groups_move_along_one_direction(name: str, other: float) -> None:
    """Their distances and seeds may not differ; a group that is refused is not added."""
    optimizer = MeZO([Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=f"`{name}` must be the same for all groups.*{other}"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(2))], name: other})
    assert len(optimizer.param_groups) == 1


def test_parameters_that_cannot_be_moved() -> None:
    """Complex ones, sparse ones, and those that lose more by rounding than a step adds."""
    for tensor, message in (
        (torch.ones(2, dtype=torch.complex64), r"real, dense parameters only, got torch\.complex64"),
        (torch.eye(2).to_sparse(), r"real, dense parameters only, got torch\.float32 with torch\.sparse_coo"),
        (torch.ones(2, dtype=torch.bfloat16), r"in float32, got torch\.bfloat16.*precision='bf16-mixed'"),
        (torch.ones(2, dtype=torch.float16), r"in float32, got torch\.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            MeZO([Parameter(tensor)])


# ---------------------------------------------------------------------- state


def test_resumed_from_its_state() -> None:
    """The same bits as a straight run; the state is a count for each parameter."""
    parameters, loss = quadratic()
    optimizer = MeZO(parameters, lr=0.001, seed=9)
    for _ in range(3):
        optimizer.step(loss)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), [p.detach().clone() for p in parameters]], file)
    for _ in range(3):
        optimizer.step(loss)
    state, saved = torch.load(io.BytesIO(file.getvalue()))
    assert {key for values in state["state"].values() for key in values} == {"step"}
    again, again_loss = quadratic()
    for parameter, value in zip(again, saved, strict=True):
        parameter.data.copy_(value)
    resumed = MeZO(again)
    resumed.load_state_dict(state)
    for _ in range(3):
        resumed.step(again_loss)
    assert all(torch.equal(a, b) for a, b in zip(again, parameters, strict=True))


def test_copies_go_on() -> None:
    """A pickled optimizer takes the same steps, also at a rate that is a tensor."""
    weight = Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = MeZO([weight], lr=torch.tensor(0.1))  # type: ignore[arg-type]
    optimizer.step(lambda: weight.square().sum())
    other = pickle.loads(pickle.dumps(optimizer))
    (copied,) = other.param_groups[0]["params"]
    for one, values in ((optimizer, weight), (other, copied)):
        one.step(lambda values=values: values.square().sum())
    assert torch.equal(weight, copied)
    weight.requires_grad_(False)
    assert float(optimizer.step(lambda: weight.sum())) == pytest.approx(copied.sum().item())


def test_a_new_task_takes_new_directions() -> None:
    """Beginning anew keeps the count: the directions of the first task are not taken again."""
    parameters, loss = quadratic()
    optimizer = MeZO(parameters)
    optimizer.step(loss)
    reset_state(optimizer)
    assert [int(optimizer.state[p]["step"]) for p in parameters] == [1, 1, 1]


# ---------------------------------------------------------------------- through Lightning


class Manual(ToyModule):
    """Evaluates its share of each batch, in the form that the errors offer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.automatic_optimization = False
        self.double()

    def loss(self, batch: Any) -> Tensor:
        inputs, labels = (values[self.global_rank :: self.trainer.world_size] for values in batch)
        return cross_entropy(self.model(inputs.double()), labels)

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.log("train_loss", self.optimizers().step(lambda: self.loss(batch)))
        assert all(p.grad is None for p in self.parameters())
        with torch.no_grad():
            self.log("moved_loss", self.loss(batch))
        self.lr_schedulers().step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels = batch
        self.validated = float(cross_entropy(self.model(inputs.double()), labels))

    def configure_optimizers(self) -> Any:
        optimizer = MeZO(self.parameters(), lr=0.02, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)]


class ManualShards(Manual):
    """Shards itself as users of Lightning's own strategy do, a unit for each layer."""

    configure_model = SelfSharded.configure_model


class ManualUnit(Manual):
    """All weights in one unit, which stays gathered after a forward without a backward."""

    def configure_model(self) -> None:
        if not isinstance(self.model[0].weight, DTensor):
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


class ManualReshards(ManualUnit):
    """Frees what is gathered, as the error asks for."""

    def loss(self, batch: Any) -> Tensor:
        self.model.reshard()
        loss = super().loss(batch)
        self.model.reshard()
        return loss


class AfterSteps(ContinualCallback):
    """Reads the weights after each step."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def observe_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        assert step.parameters.keys() == dict(pl_module.named_parameters()).keys()
        self.seen.append(full(step.parameters.values()))


def full(parameters: Any) -> Tensor:
    """Return all parameters as one vector, gathered where they are sharded."""
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
    return torch.cat([p.detach().flatten() for p in whole])


def plain_fit(epochs: int = 3) -> list[Tensor]:
    """Weights after each step of a loop over the first task, in one process."""
    model, found = Manual(), []
    (inputs, labels), parameters = toy_loaders()[0].dataset.tensors, list(model.parameters())
    for step in range(3 * epochs):
        rows = slice(8 * (step % 3), 8 * (step % 3) + 8)
        settings = [{"lr": 0.02 * 0.5 ** (step // 4), "weight_decay": 0.1}] * 4
        plain_steps(
            parameters,
            [lambda rows=rows: cross_entropy(model.model(inputs[rows].double()), labels[rows])],  # type: ignore[misc]
            settings,
            first=step,
        )
        found.append(weights(model))
    return found


def fit(root: Path, module: LightningModule, callbacks: Sequence[Any] = (), epochs: int = 3, **settings: Any) -> Tensor:
    """Fit the first task, with batches that every rank sees whole."""
    ckpt_path = settings.pop("ckpt_path", None)
    if ckpt_path:
        # Lightning wants the callbacks of the run before
        callbacks = [ModelCheckpoint(root / "resumed", save_top_k=-1, filename="{epoch}")]
    settings = {"max_epochs": epochs, "use_distributed_sampler": False} | settings
    loader, validation = toy_loaders()[0], DataLoader(toy_data(16, seed=1), batch_size=16)
    trainer(root, callbacks, **settings).fit(module, loader, validation, ckpt_path=ckpt_path)
    return full(module.parameters())


def test_manual_optimization_equals_the_plain_loop(tmp_path: Path) -> None:
    """With a scheduler; callbacks see the weights after each step, neither side of it; steps are counted."""
    callback, module = AfterSteps(), Manual()
    found, expected = fit(tmp_path, module, [callback]), plain_fit()
    torch.testing.assert_close(torch.stack(callback.seen), torch.stack(expected), rtol=0, atol=1e-12)
    assert torch.equal(found, callback.seen[-1])
    assert (found - weights(Manual())).abs().max() > 0.1
    assert module.trainer.global_step == 9
    assert "train_loss" in module.trainer.callback_metrics


def test_resumed_through_a_checkpoint(tmp_path: Path) -> None:
    """The same bits as a straight run."""
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    straight = fit(tmp_path, Manual(), [saver])
    assert torch.equal(fit(tmp_path, Manual(), ckpt_path=tmp_path / "epoch=1.ckpt"), straight)


def test_mixed_precision(tmp_path: Path) -> None:
    """Weights of 32 bits, computed with in bfloat16."""

    class Mixed(ToyModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.losses: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            self.losses.append(float(self.optimizers().step(lambda: cross_entropy(self(batch[0]), batch[1]))))
            assert self(batch[0]).dtype == torch.bfloat16

        def configure_optimizers(self) -> MeZO:
            return MeZO(self.parameters(), lr=0.01, eps=0.03)

    module = Mixed()
    fit(tmp_path, module, epochs=20, precision="bf16-mixed", limit_val_batches=0)
    assert sum(module.losses[-3:]) < 0.6 * sum(module.losses[:3])


class Automatic(ToyModule):
    """A module as it was before, with another optimizer."""

    def configure_optimizers(self) -> MeZO:
        return MeZO(self.parameters(), lr=1.0)


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}])
def test_automatic_optimization_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    """Its closure runs a backward; nothing has moved, by not one bit."""
    module = Automatic()
    start = weights(module)
    with pytest.raises(ValueError, match=r"automatic optimization runs\. Set `self\.automatic_optimization = False`"):
        fit(tmp_path, module, **settings)
    assert torch.equal(weights(module), start)


def test_callbacks_that_act_on_gradients_are_refused(tmp_path: Path) -> None:
    """A penalty that is added to gradients would hold nothing."""
    with pytest.raises(ValueError, match="`EWC` acts on gradients, and `MeZO` computes none"):
        fit(tmp_path, Manual(), [EWC(1.0)])


class WithoutOptimizer(LightningModule):
    """The config names the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = ToyModule().model

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.optimizers().step(lambda: cross_entropy(self.model(batch[0]), batch[1]))


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_from_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings are plain values."""
    config = tmp_path / "run.yaml"
    config.write_text(
        "optimizer: { class_path: lightning_cl.optim.MeZO, init_args: { lr: 1e-2, eps: 2e-3, seed: 4 } }\n"
        "trainer: { accelerator: cpu, max_epochs: 2, logger: false, enable_checkpointing: false,"
        " enable_progress_bar: false, enable_model_summary: false }\n"
    )
    monkeypatch.setattr("sys.argv", ["train.py", "--config", str(config)])
    cli = LightningCLI(WithoutOptimizer, run=False, save_config_callback=None, seed_everything_default=0)
    loader = DataLoader(toy_data(), batch_size=8)
    cli.trainer.fit(cli.model, loader)
    expected = ToyModule()
    optimizer = MeZO(expected.parameters(), lr=1e-2, eps=2e-3, seed=4)
    for _ in range(2):
        for inputs, labels in loader:
            optimizer.step(lambda inputs=inputs, labels=labels: cross_entropy(expected(inputs), labels))
    assert torch.equal(weights(cli.model), weights(expected))


# ---------------------------------------------------------------------- two ranks


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


STRATEGIES: dict[str, tuple[Callable[[], Any], type[Manual]]] = {
    "ddp": (lambda: "ddp", Manual),
    "blocks": (lambda: FSDP2Strategy(wrap=["Linear"]), Manual),
    "blocks kept": (lambda: FSDP2Strategy(wrap=["Linear"], reshard_after_forward=False), Manual),
    "root": (lambda: FSDP2Strategy(wrap=["Dropout"]), Manual),
    "own unit": (FSDP2Strategy, ManualUnit),
    "own blocks under Lightning's": (
        lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        ManualShards,
    ),
    "own unit under Lightning's": (
        lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        ManualReshards,
    ),
}


def fit_on_a_rank(root: Path, name: str) -> tuple[Tensor, Tensor, float, bool]:
    """Weights after each step and in the end, the loss of the validation, and whether weights are as they should be."""
    strategy, kind = STRATEGIES[name]
    callback, module = AfterSteps(), kind()
    settings = {"strategy": strategy(), "devices": 2}
    # Lightning's strategy leaves a root that gathered itself in that form while hooks run
    callbacks = [callback] if name != "own unit under Lightning's" else []
    found = fit(root, module, callbacks, **settings)
    # the validation gathered it, and no strategy knows of it
    whole = name == "ddp" or issubclass(kind, ManualUnit)
    whole |= all(isinstance(p, DTensor) for p in module.parameters())
    return found, torch.stack(callback.seen or [found]), module.validated, whole


@pytest.mark.distributed
@pytest.mark.parametrize("name", STRATEGIES)
def test_two_ranks_end_where_one_does(name: str, two_ranks: Ranks, tmp_path: Path) -> None:
    """Half of a batch each: the same directions, the mean of the losses, and every forward at the moved weights."""
    module = Manual()
    fit(tmp_path, module)
    expected = plain_fit()
    for found, seen, validated, in_place in two_ranks.run(fit_on_a_rank, tmp_path, name):
        torch.testing.assert_close(found, expected[-1], rtol=0, atol=1e-11)
        torch.testing.assert_close(seen, torch.stack(expected)[-len(seen) :], rtol=0, atol=1e-11)
        assert in_place
        # an evaluation between the epochs computes with the weights as they are
        assert validated == pytest.approx(module.validated, abs=1e-11)


def stale_on_a_rank(root: Path) -> str:
    """The error where a forward computes with weights that were gathered before."""
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    with pytest.raises(ValueError, match="gathered before they moved") as error:
        fit(root, ManualUnit(), strategy=strategy, devices=2)
    return str(error.value)


@pytest.mark.distributed
def test_weights_gathered_before_they_moved_are_refused(two_ranks: Ranks, tmp_path: Path) -> None:
    """The losses would be equal on both sides, and nothing would be learnt without a word."""
    assert "shape (8, 6)" in two_ranks.run(stale_on_a_rank, tmp_path)[0]


def resume_on_a_rank(root: Path, file: bool) -> bool:
    """Whether a resumed run under FSDP2 ends with the bits of a straight one."""
    settings: dict[str, Any] = {"devices": 2}

    def strategy() -> FSDP2Strategy:
        return FSDP2Strategy(wrap=["Linear"], save_distributed_checkpoint=not file)

    saver = ModelCheckpoint(root, save_top_k=-1, filename="{epoch}")
    straight = fit(root, Manual(), [saver], strategy=strategy(), **settings)
    resumed = fit(root, Manual(), strategy=strategy(), ckpt_path=root / "epoch=1.ckpt", **settings)
    return torch.equal(resumed, straight)


@pytest.mark.distributed
@pytest.mark.parametrize("file", [False, True])
def test_resumed_on_shards(file: bool, two_ranks: Ranks, tmp_path: Path) -> None:
    """Through a checkpoint of shards, and one of full tensors."""
    assert two_ranks.run(resume_on_a_rank, tmp_path, file) == [True, True]


LAYOUTS: list[tuple[tuple[int, ...], list[Any]]] = [
    ((5, 3), [Replicate(), Shard(0)]),
    ((1, 4), [Replicate(), Shard(0)]),  # one rank has nothing
    ((3, 5), [Replicate(), Shard(1)]),
    ((2, 3), [Replicate(), Replicate()]),
    ((4,), [Shard(0), Replicate()]),
]


def move_in_layouts() -> tuple[list[Tensor], list[Tensor]]:
    """Three steps on shards of all layouts, and on whole tensors; on shards each rank adds to the loss, one is nan."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("node", "rank"))
    rank = torch.distributed.get_rank()
    starts = [torch.arange(float(torch.Size(shape).numel())).double().view(shape) / 10 for shape, _ in LAYOUTS]
    placed = [
        Parameter(distribute_tensor(start.clone(), mesh, kinds))
        for start, (_, kinds) in zip(starts, LAYOUTS, strict=True)
    ]
    step, broken = [0], [0]

    def local() -> float:
        # each rank has a loss of its own; their mean is that of one process
        value = sum(float(p.full_tensor().sin().sum()) for p in placed)
        broken[0] += 1
        return float("nan") if step[0] == 1 and rank == 1 and broken[0] == 3 else 2 * value * rank

    optimizer = MeZO(placed, lr=0.01, weight_decay=0.1)
    for step[0] in range(3):
        if step[0] == 1:
            with pytest.warns(RuntimeWarning, match="left the weights"):
                optimizer.step(local)
        else:
            optimizer.step(local)
    return [p.full_tensor().detach() for p in placed], starts


@pytest.mark.distributed
def test_every_layout_moves_as_one_process(two_ranks: Ranks) -> None:
    """Uneven and empty shards, other dimensions, replicas; a loss that is not finite on one rank holds all of them."""
    results = two_ranks.run(move_in_layouts)
    expected = results[0][1]
    loss = [lambda: sum(p.sin().sum() for p in expected)]
    settings = [{"lr": 0.01, "weight_decay": 0.1}] * len(expected)
    before = [p.clone() for p in expected]
    for step in (0, 2):
        plain_steps(expected, loss, settings, first=step)
    for found, _ in results:
        for number, value in enumerate(found):
            torch.testing.assert_close(value, expected[number], rtol=0, atol=1e-12)
            assert (value - before[number]).abs().max() > 1e-3


# ---------------------------------------------------------------------- it learns


def test_learns_digits() -> None:
    """Softmax regression: in 800 steps the loss falls from 2.30 to 1.1 at most, and 3 of 4 images are recognised."""
    images, labels = (torch.tensor(values) for values in load_digits(return_X_y=True))
    images = images.float() / 16
    model = nn.Linear(64, 10)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = MeZO(model.parameters(), lr=0.02)
    for rows in torch.randint(len(labels), (800, 64), generator=torch.Generator().manual_seed(0)):
        optimizer.step(lambda rows=rows: cross_entropy(model(images[rows]), labels[rows]))
    with torch.no_grad():
        scores = model(images)
    assert float(cross_entropy(scores, labels)) < 1.1
    assert float((scores.argmax(-1) == labels).float().mean()) > 0.75


def test_the_state_of_another_optimizer_is_refused() -> None:
    """Its `eps` would mean something else, and nothing tells which directions were taken."""
    parameter = Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"of another optimizer.*`load_from_checkpoint`"):
        MeZO([parameter]).load_state_dict(torch.optim.AdamW([parameter]).state_dict())


def test_a_group_may_be_empty() -> None:
    """As it is where a filter of parameters finds none."""
    weight = Parameter(torch.ones(2))
    optimizer = MeZO([{"params": []}, {"params": [weight]}], lr=0.1)
    optimizer.step(lambda: weight.square().sum())
    assert not torch.equal(weight, torch.ones(2))
