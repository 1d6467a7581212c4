"""Spike-aware clipping around other optimizers, in runs of every kind."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_cl import ContinualCallback, FSDP2Strategy, SpikeAware
from lightning_cl.core.update import OptimizerStep
from lightning_cl.datamodules import ClassIncremental, Online, TaskStreamDataModule
from lightning_cl.optim import SPAM, MeZO, second_moment
from ranks import Ranks
from spam_reference import SpamReference
from toys import ToyModule, fit_stream, toy_loaders, toy_stream, trainer, weights
from users import Manual, Texts, loader

# seen in a few steps
QUICK: dict[str, Any] = {"threshold": 30.0, "reset_interval": 9, "warmup_steps": 4, "clip_delay": 3}

Make = Callable[..., Optimizer]


class Given(LightningModule):
    """Three tensors in two groups whose gradients are given: noise, and a spike in every 37th step.

    Args:
        make: Makes the optimizer of groups.
        rests: Whether one tensor of the first group has no gradient in steps 5 to 9 and in every 30th.
    """

    def __init__(self, make: Make, rests: bool = False, shape: int = 5) -> None:
        super().__init__()
        self.make, self.rests = make, rests
        generator = torch.Generator().manual_seed(3)
        self.wide, self.narrow, self.other = (
            nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64))
            for size in ((4, shape), (3,), (2, 2))
        )
        self.path: list[Tensor] = []

    def gradients(self, step: int) -> list[Tensor | None]:
        """Of any step, without the steps before it."""
        generator = torch.Generator().manual_seed(step)
        found: list[Tensor | None] = [
            torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in self.parameters()
        ]
        assert found[0] is not None
        if step % 37 == 5:
            found[0][step % 4, step % 5] *= 1000
        if self.rests and (5 <= step < 10 or step % 30 == 29):
            found[1] = None
        return found

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        pairs = zip(self.parameters(), self.gradients(batch_idx), strict=True)
        return sum((p * g.to(p)).sum() for p, g in pairs if g is not None)  # type: ignore[return-value]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.path.append(weights(self))

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": [self.wide, self.narrow], "lr": 0.01},
            {"params": [self.other], "lr": 0.003, "betas": (0.8, 0.99), "weight_decay": 0.5},
        ]
        return self.make(groups, weight_decay=0.1)


class Scheduled(Given):
    """With a learning rate that a scheduler multiplies in every step."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def made(kind: Callable[..., Optimizer], **settings: Any) -> Make:
    """A maker of an optimizer with these settings."""
    return lambda groups, **more: kind(groups, **(settings | more))


def given(root: Path, module: Given, *callbacks: Callback, steps: int = 60, **settings: Any) -> Tensor:
    """Fit by given gradients; return the weights after every step."""
    settings = {"precision": "64-true", "max_epochs": 1} | settings
    trainer(root, callbacks, **settings).fit(module, DataLoader(range(steps)))  # type: ignore[arg-type]
    return torch.stack(module.path)


# ---------------------------------------------------------------------- what SPAM does


def test_equals_spam_and_a_plain_loop_over_two_resets(tmp_path: Path) -> None:
    """1200 steps of AdamW with spikes planted, two groups, weight decay, and a tensor that rests now and then."""
    module, other = Given(made(torch.optim.AdamW), rests=True), Given(SPAM)
    spam = other.configure_optimizers()
    reference = SpamReference(
        [
            ([module.wide.detach().numpy(), module.narrow.detach().numpy()], {"lr": 0.01, "weight_decay": 0.1}),
            ([module.other.detach().numpy()], {"lr": 0.003, "betas": (0.8, 0.99), "weight_decay": 0.5}),
        ]
    )
    for step, found in enumerate(given(tmp_path, module, SpikeAware(), steps=1200)):
        gradients = module.gradients(step)
        for parameter, gradient in zip(other.parameters(), gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        spam.step()
        torch.testing.assert_close(found, weights(other), rtol=0, atol=1e-10)
        reference.step([None if gradient is None else gradient.numpy() for gradient in gradients])
        values = torch.cat([torch.as_tensor(value).flatten() for value in reference.values()])
        torch.testing.assert_close(found, values, rtol=0, atol=1e-10)
    assert [one.resets for one in reference.weights] == [2, 2, 2]
    assert len({one.step for one in reference.weights}) == 2
    assert reference.weights[0].clipped > 25


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"warmup_steps": 0},
        {"reset_interval": None},
        {"clip_delay": 1},
        {"threshold": math.inf},
        {"reset_interval": 1, "threshold": math.inf},
    ],
    ids=str,
)
def test_settings_mean_what_they_mean_for_spam(settings: dict[str, Any], tmp_path: Path) -> None:
    """At their ends."""
    ours = given(tmp_path, Given(made(torch.optim.AdamW)), SpikeAware(**(QUICK | settings)))
    torch.testing.assert_close(ours, given(tmp_path, Given(made(SPAM, **(QUICK | settings)))), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kernels", ["fused", "foreach"])
def test_fused_and_joined_kernels(kernels: str, tmp_path: Path) -> None:
    """As with one kernel after the other; AdamW alone ends elsewhere."""
    make = made(torch.optim.AdamW, **{kernels: True})
    ours = given(tmp_path, Given(make, rests=True), SpikeAware(**QUICK))
    torch.testing.assert_close(ours, given(tmp_path, Given(made(SPAM, **QUICK), rests=True)), rtol=0, atol=1e-10)
    assert (ours - given(tmp_path, Given(make, rests=True))).abs().max() > 1e-2


def test_a_scheduler_sees_its_own_learning_rate(tmp_path: Path) -> None:
    """One that multiplies the rate it finds; the groups are the user's own objects all along."""

    class Rates(Callback):
        def __init__(self) -> None:
            self.seen: list[float] = []

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.seen += [group["lr"] for group in trainer.optimizers[0].param_groups]
            self.seen += [group["weight_decay"] for group in trainer.optimizers[0].param_groups]
            self.seen += [len(group["params"]) for group in trainer.optimizers[0].param_groups]

    with_callback, plain = Rates(), Rates()
    ours = given(tmp_path, Scheduled(made(torch.optim.AdamW), rests=True), SpikeAware(**QUICK), with_callback)
    spam = given(tmp_path, Scheduled(made(SPAM, **QUICK), rests=True), plain)
    assert with_callback.seen == plain.seen
    torch.testing.assert_close(ours, spam, rtol=0, atol=1e-10)


def test_a_learning_rate_that_is_a_tensor(tmp_path: Path) -> None:
    """It stays the object that it is."""

    class Tensors(Given):
        def configure_optimizers(self) -> Any:
            self.rate = torch.tensor(0.01, dtype=torch.float64)
            return torch.optim.AdamW(self.parameters(), lr=self.rate, foreach=False, weight_decay=0.1)

    class Spam(Given):
        def configure_optimizers(self) -> Any:
            return SPAM(self.parameters(), lr=0.01, weight_decay=0.1, **QUICK)

    module = Tensors(made(torch.optim.AdamW))
    ours = given(tmp_path, module, SpikeAware(**QUICK))
    torch.testing.assert_close(ours, given(tmp_path, Spam(SPAM)), rtol=0, atol=1e-10)
    assert module.optimizers().param_groups[0]["lr"] is module.rate
    assert module.rate == 0.01


class Infinite(Scheduled):
    """Its loss is infinite where a step is warmed up, and elsewhere."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * math.inf if batch_idx in (2, 10, 11, 25) else loss


def test_a_step_that_the_scaler_skips(tmp_path: Path) -> None:
    """It counts as none, and leaves no learning rate behind: the schedule goes on after it."""

    def run(make: Make, *callbacks: Callback) -> Tensor:
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
        return given(tmp_path, Infinite(make), *callbacks, precision=None, plugins=[plugin])

    ours, spam = run(made(torch.optim.AdamW), SpikeAware(**QUICK)), run(made(SPAM, **QUICK))
    torch.testing.assert_close(ours, spam, rtol=0, atol=1e-10)
    assert torch.equal(ours[10], ours[9])


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_a_loss(tmp_path: Path) -> None:
    """Lightning steps without gradients then."""

    class Silent(Scheduled):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx in (10, 11) else super().training_step(batch, batch_idx)

    ours = given(tmp_path, Silent(made(torch.optim.AdamW)), SpikeAware(**QUICK))
    torch.testing.assert_close(ours, given(tmp_path, Silent(made(SPAM, **QUICK))), rtol=0, atol=1e-10)


def test_an_error_inside_a_step_leaves_the_optimizer_as_it_was(tmp_path: Path) -> None:
    """Where the weights move, with the scaled groups."""
    scaled: list[float] = []

    class Breaking(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            loss = closure()
            if len(steps) == 10:
                scaled.extend(group["lr"] for group in self.param_groups)
                raise RuntimeError("broken")
            steps.append(super().step())
            return loss

    steps: list[Any] = []
    run = trainer(tmp_path, [SpikeAware(**QUICK)], precision="64-true", max_epochs=1)
    with pytest.raises(RuntimeError, match="broken"):
        run.fit(Given(Breaking, rests=True), DataLoader(range(60)))  # type: ignore[arg-type]
    assert len(scaled) == 3
    assert min(scaled) < 0.0011
    assert [group["lr"] for group in run.optimizers[0].param_groups] == [0.01, 0.003]
    assert [len(group["params"]) for group in run.optimizers[0].param_groups] == [2, 1]
    assert not run.optimizers[0]._optimizer_step_pre_hooks


@pytest.mark.parametrize("positional", [True, False])
def test_a_step_of_a_step(positional: bool, tmp_path: Path) -> None:
    """One that hands its closure to that of its base class is scaled once, with whatever else it takes."""

    class Nested(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure) if positional else super().step(closure=closure)

    ours = given(tmp_path, Given(made(Nested), rests=True), SpikeAware(**QUICK))
    assert torch.equal(ours, given(tmp_path, Given(made(torch.optim.AdamW), rests=True), SpikeAware(**QUICK)))


class Looking(Given):
    """Reads and sets learning rates in the hooks of a step, and fails in one."""

    def __init__(self, make: Make, fails: int | None = None, sets: bool = False) -> None:
        super().__init__(make, rests=True)
        self.fails, self.sets = fails, sets
        self.seen: list[Any] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append([(group["lr"], len(group["params"])) for group in optimizer.param_groups])
        if self.sets:
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (1 + self.trainer.global_step)

    def configure_gradient_clipping(self, optimizer: Optimizer, **_: Any) -> None:
        self.seen.append([(group["lr"], len(group["params"])) for group in optimizer.param_groups])
        if self.trainer.global_step == self.fails:
            raise RuntimeError("broken")


@pytest.mark.parametrize("scaler", [True, False])
def test_hooks_of_a_step_see_their_own_groups(scaler: bool, tmp_path: Path) -> None:
    """Before the step and where gradients are clipped, while the moments of a group differ in age."""
    module = Looking(made(torch.optim.AdamW))
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))] if scaler else []
    given(tmp_path, module, SpikeAware(**QUICK), precision=None if scaler else "64-true", plugins=plugins, steps=20)
    assert module.seen == [[(0.01, 2), (0.003, 1)]] * 40


def test_hooks_of_a_closure_that_is_called_twice(tmp_path: Path) -> None:
    """Neither time do they see more than their own."""

    class Twice(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            closure()
            return super().step(closure)

    module = Looking(made(Twice))
    given(tmp_path, module, SpikeAware(**QUICK), steps=20)
    assert module.seen == [[(0.01, 2), (0.003, 1)]] * 80


def test_a_rate_set_in_a_hook_of_the_step_stays(tmp_path: Path) -> None:
    """And is what the step is scaled from."""
    module = Looking(made(torch.optim.AdamW), sets=True)
    ours = given(tmp_path, module, SpikeAware(**QUICK), steps=20)
    spam = given(tmp_path, Looking(made(SPAM, **QUICK), sets=True), steps=20)
    torch.testing.assert_close(ours, spam, rtol=0, atol=1e-10)
    assert [group["lr"] for group in module.optimizers().param_groups] == [0.01 / 20] * 2


def test_a_checkpoint_of_a_failed_step_has_the_own_learning_rate(tmp_path: Path) -> None:
    """Also where a callback that comes first writes it."""

    class Saving(Callback):
        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            trainer.save_checkpoint(tmp_path / "failed.ckpt", weights_only=False)

    module = Looking(made(torch.optim.AdamW), fails=11)
    with pytest.raises(RuntimeError, match="broken"):
        given(tmp_path, module, Saving(), SpikeAware(**QUICK))
    saved = torch.load(tmp_path / "failed.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert [(group["lr"], len(group["params"])) for group in saved] == [(0.01, 2), (0.003, 1)]


def test_parameters_that_differ_in_age_part_for_a_step_only(tmp_path: Path) -> None:
    """Each has its own warm-up; what the step notes in its group stays there."""
    seen: list[list[float]] = []

    def noting(groups: Any, **settings: Any) -> Optimizer:
        optimizer = torch.optim.AdamW(groups, **settings)
        optimizer.register_step_post_hook(note)
        return optimizer

    def note(optimizer: Optimizer, *_: Any) -> None:
        # at the end of the step itself: what was registered later comes later
        seen.append([group["lr"] for group in optimizer.param_groups])
        for group in optimizer.param_groups:
            group["noted"] = group.get("noted", 0) + 1

    module = Given(noting, rests=True)
    ours = given(tmp_path, module, SpikeAware(**QUICK), steps=25)
    torch.testing.assert_close(
        ours, given(tmp_path, Given(made(SPAM, **QUICK), rests=True), steps=25), rtol=0, atol=1e-10
    )
    # the narrow tensor rests in steps 5 to 9, so that its reset comes 5 steps later
    assert [len(rates) for rates in seen[8:18]] == [2, 2, 3, 3, 3, 2, 3, 3, 3, 3]
    assert [group["noted"] for group in module.optimizers().param_groups] == [25, 25]


# ---------------------------------------------------------------------- other optimizers


class ByHand(Callback):
    """What the callback must do, in Lightning's own hooks, where all parameters are of one age."""

    def __init__(self, apart: bool = True) -> None:
        self.apart = apart
        self.resets: dict[Optimizer, int] = {}
        self.ages: dict[Optimizer, int] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: LightningModule, optimizer: Any) -> None:
        age = self.ages.get(optimizer, 0)
        if age == QUICK["reset_interval"]:
            optimizer.state.clear()
            self.resets[optimizer] = self.resets.get(optimizer, 0) + 1
            age = 0
        self.ages[optimizer] = age + 1
        for group in optimizer.param_groups:
            scale = 1.0
            if optimizer in self.resets and age < QUICK["warmup_steps"]:
                scale = 1 - 0.99 * (1 + math.cos(math.pi * age / (QUICK["warmup_steps"] + 1))) / 2
            group["lr"] = group.setdefault("own_lr", group["lr"]) * scale
            if self.apart:
                group["weight_decay"] = group.setdefault("own_decay", group["weight_decay"]) / scale
            for parameter in group["params"]:
                second = second_moment(optimizer, parameter)
                if age < QUICK["clip_delay"] or second is None or parameter.grad is None:
                    continue
                bound = (QUICK["threshold"] * second).sqrt()
                clipped = torch.minimum(parameter.grad.abs(), bound) * parameter.grad.sign()
                parameter.grad.copy_(torch.where(second > 0, clipped, parameter.grad))


def bitsandbytes(name: str) -> Make:
    """An optimizer of bitsandbytes, which takes seconds to import."""
    return lambda groups, **settings: getattr(pytest.importorskip("bitsandbytes").optim, name)(groups, **settings)


KINDS: dict[str, tuple[Make, bool]] = {
    "adam": (made(torch.optim.Adam), False),
    "amsgrad": (made(torch.optim.AdamW, amsgrad=True), True),
    "nadam": (made(torch.optim.NAdam), False),
    "nadamw": (made(torch.optim.NAdam, decoupled_weight_decay=True), True),
    "radam": (made(torch.optim.RAdam), False),
    "rmsprop": (made(torch.optim.RMSprop, momentum=0.5), False),
    "bnb-adamw": (bitsandbytes("AdamW"), True),
    "bnb-adamw-8bit": (bitsandbytes("AdamW8bit"), True),
    "bnb-adam-8bit": (bitsandbytes("Adam8bit"), True),
    "bnb-rmsprop-8bit": (bitsandbytes("RMSprop8bit"), False),
}


@pytest.mark.parametrize("name", KINDS)
def test_other_kinds(name: str, tmp_path: Path) -> None:
    """Clipped by what each keeps, begun anew, warmed up, weight decay scaled only as part of a gradient."""
    make, apart = KINDS[name]

    def with_own_settings(groups: Any, **settings: Any) -> Optimizer:
        betas = {"betas": (0.9, 0.99)} if "adam" in name else {}
        return make([{k: v for k, v in group.items() if k != "betas"} | betas for group in groups], **settings)

    def run(*callbacks: Callback) -> Tensor:
        # as large as bitsandbytes keeps in 8 bits
        return given(tmp_path, Given(with_own_settings, shape=1024), *callbacks, steps=30, precision="32-true")

    ours = run(SpikeAware(**QUICK))
    torch.testing.assert_close(ours, run(ByHand(apart)), rtol=0, atol=1e-6)
    assert (ours - run()).abs().max() > 1e-2


# ---------------------------------------------------------------------- runs of every kind


class Adam(ToyModule):
    """The toy with a fused optimizer and enough steps to be reset."""

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1, fused=True)


class ManualAdam(Manual):
    """Two optimizers, stepped by hand."""

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(part.parameters(), lr=0.02) for part in (self.body, self.head)]


class TextsAdam(Texts):
    """Batches in mappings; the row of padding never has a gradient."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "clipped on": {"gradient_clip_val": 0.3},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_of_every_kind(name: str, tmp_path: Path) -> None:
    """As by hand; no reset but those on schedule within one task."""

    def run(*callbacks: Callback) -> Tensor:
        module, data = Adam(), toy_loaders(batch_size=4)[0]
        run = trainer(tmp_path, callbacks, max_epochs=4, limit_val_batches=0, **RUNS[name])
        run.fit(module, data, data)
        return weights(module).float()

    ours = run(SpikeAware(**QUICK))
    torch.testing.assert_close(ours, run(ByHand()), rtol=0, atol=2e-2 if name == "bf16-true" else 1e-6)
    assert (ours - run()).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [ManualAdam, TextsAdam])
def test_several_optimizers_and_batches_in_mappings(kind: type[Any], tmp_path: Path) -> None:
    """Under manual optimization each optimizer has its own clock; the one who owns no optimizer is left alone."""

    def run(*callbacks: Callback) -> Tensor:
        module, data = kind(), loader(kind)
        trainer(tmp_path, callbacks, max_epochs=8, limit_val_batches=0).fit(module, data, data)
        return weights(module)

    ours = run(SpikeAware(**QUICK))
    torch.testing.assert_close(ours, run(ByHand()), rtol=0, atol=1e-6)
    assert (ours - run()).abs().max() > 1e-3


class Ages(ContinualCallback):
    """Notes before every step how many gradients the moments hold."""

    needs_state = False
    boundaries = "unused"

    def __init__(self) -> None:
        self.seen: list[int] = []

    def limit_gradients(self, trainer: Any, pl_module: LightningModule, step: OptimizerStep) -> None:
        states = [step.optimizer.state.get(parameter) for parameter in step.parameters.values()]
        ages = {int(state["step"]) if state else 0 for state in states}
        assert len(ages) == 1
        self.seen += ages


def ages_of(root: Path, stream: TaskStreamDataModule | None = None, **settings: Any) -> list[int]:
    """What the moments held before each step of the two toy tasks."""
    ages = Ages()
    fit_stream(root, [SpikeAware(**(QUICK | settings)), ages], module=Adam(), stream=stream)
    return ages.seen


def test_a_task_begins_anew(tmp_path: Path) -> None:
    """Every one but the first, whether the optimizer is kept or built again; unless told not to."""
    fresh, kept = [0, 1, 2, 3, 4, 5] * 2, [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2]
    assert ages_of(tmp_path) == fresh
    assert ages_of(tmp_path, reset_at_task=False) == kept
    assert ages_of(tmp_path, stream=toy_stream(optimizer_policy="rebuild")) == fresh
    hidden = toy_stream(scenario=Online(ClassIncremental(n_tasks=2)), epochs_per_task=1)
    assert ages_of(tmp_path, stream=hidden) == [0, 1, 2, 3, 4, 5]


def test_an_optimizer_that_is_built_again_is_warmed_up(tmp_path: Path) -> None:
    """From its first step, to the bit as one that is kept."""
    kept, rebuilt = (
        fit_stream(tmp_path, [SpikeAware(**QUICK)], module=Adam(), stream=toy_stream(optimizer_policy=policy))
        for policy in ("keep", "rebuild")
    )
    assert torch.equal(kept, rebuilt)


def test_a_second_fit_is_warmed_up(tmp_path: Path) -> None:
    """A task is one, in a fit of its own as in a stream; the callback can be pickled in between."""
    steps: list[Tensor] = []

    class Moves(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            self.before = weights(pl_module)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            steps.append((weights(pl_module) - self.before).abs().max())

    callback, module = SpikeAware(**QUICK), Adam()
    for data in toy_loaders():
        trainer(tmp_path, [callback, Moves()], max_epochs=1).fit(module, data, data)
        callback = pickle.loads(pickle.dumps(callback))
    assert steps[0] > 0.019
    assert steps[3] < 0.02 * 0.011 + 0.02 * 0.1 * 5


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_resume_inside_a_warm_up(tmp_path: Path) -> None:
    """And between resets: to the bit, with the very first steps not warmed up again."""

    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    straight = given(tmp_path, Given(made(torch.optim.AdamW), rests=True), SpikeAware(**QUICK), saver(), steps=30)
    for step in (2, 8, 9, 11, 16):
        module = Given(made(torch.optim.AdamW), rests=True)
        run = trainer(tmp_path, [SpikeAware(**QUICK), saver()], precision="64-true", max_epochs=1)
        run.fit(module, DataLoader(range(30)), ckpt_path=tmp_path / f"step={step}.ckpt")  # type: ignore[arg-type]
        assert torch.equal(torch.stack(module.path), straight[step:])


# ---------------------------------------------------------------------- what was clipped


class Clipped(ContinualCallback):
    """Asks for the numbers, and notes them."""

    needs_state = False
    boundaries = "unused"

    def __init__(self, of: SpikeAware) -> None:
        self.of = of
        self.seen: list[dict[str, int]] = []

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.of.count_clipped = True

    def observe_update(self, trainer: Any, pl_module: LightningModule, step: OptimizerStep) -> None:
        self.seen.append(self.of.clipped)


def test_numbers_of_what_was_clipped(tmp_path: Path) -> None:
    """For those that ask: the spike that is planted in step 42, and nothing else; none before the delay."""
    callback = SpikeAware(clip_delay=20, reset_interval=60)
    noting = Clipped(callback)
    given(tmp_path, Given(made(torch.optim.AdamW)), callback, noting, steps=85)
    none = {"wide": 0, "narrow": 0, "other": 0}
    assert noting.seen[:20] == noting.seen[60:80] == [{}] * 20
    assert noting.seen[20:60] == [none | {"wide": int(step == 42)} for step in range(20, 60)]
    assert noting.seen[80:] == [none] * 5
    unasked = SpikeAware(**QUICK)
    given(tmp_path, Given(made(torch.optim.AdamW)), unasked, steps=10)
    assert unasked.clipped == {}


def clipped_on_this_rank(root: Path, strategy: Any) -> tuple[list[dict[str, int]], Tensor]:
    """Numbers of a fit over shards, and what it ends with."""
    callback = SpikeAware(threshold=2.0, reset_interval=9, warmup_steps=2, clip_delay=1)
    noting = Clipped(callback)
    module = ToyModule(optimizer=torch.optim.AdamW, learning_rate=0.02)
    chosen = FSDP2Strategy(wrap=["Linear"]) if strategy == "fsdp2" else strategy
    trainer(root, [callback, noting], strategy=chosen, devices=2).fit(module, datamodule=toy_stream(batch_size=4))
    return noting.seen, weights(module)


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.mark.distributed
def test_numbers_are_those_of_all_shards(two_ranks: Ranks, tmp_path: Path) -> None:
    """The same as where every rank has all weights."""
    (whole, _), _ = two_ranks.run(clipped_on_this_rank, tmp_path, "ddp")
    first, second = (seen for seen, _ in two_ranks.run(clipped_on_this_rank, tmp_path, "fsdp2"))
    assert first == second == whole
    assert sum(sum(step.values()) for step in whole) > 50


# ---------------------------------------------------------------------- refusals


class Plain(torch.optim.SGD):
    """An unknown kind without a second moment."""


class Partial(torch.optim.Adam):
    """A kind that keeps something else for matrices."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.register_step_post_hook(self._factor)

    def _factor(self, *_: Any) -> None:
        for parameter, state in self.state.items():
            if parameter.ndim == 2:
                state["exp_avg_sq_row"] = state.pop("exp_avg_sq").mean(1)


class Ageless(torch.optim.Adam):
    """A kind that counts its steps elsewhere."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.register_step_post_hook(lambda *_: [state.pop("step") for state in self.state.values()] and None)


def test_optimizers_that_it_does_not_go_with(tmp_path: Path) -> None:
    """Before the first step, or right after it where only the state can tell."""
    before = weights(ToyModule())
    for optimizer, words in (
        (torch.optim.SGD, r"running average of their squares, which `SGD` does not keep\. Use `torch\.optim\.AdamW`"),
        (torch.optim.Adagrad, "which `Adagrad` does not keep"),
        (MeZO, "which `MeZO` does not keep"),
        (SPAM, "`SPAM` clips spikes and resets its moments by itself: leave `SpikeAware` out"),
    ):
        module = ToyModule(optimizer=optimizer)
        with pytest.raises(ValueError, match=words):
            fit_stream(tmp_path, [SpikeAware()], module=module)
        assert torch.equal(weights(module), before)
    with pytest.raises(ValueError, match="which `Plain` does not keep"):
        fit_stream(tmp_path, [SpikeAware()], module=ToyModule(optimizer=Plain))
    with pytest.raises(ValueError, match=r"which `Partial` does not keep for model\.0\.weight, model\.3\.weight\. Use"):
        fit_stream(tmp_path, [SpikeAware()], module=ToyModule(optimizer=Partial))
    with pytest.raises(ValueError, match="`Ageless` keeps no `step` in their state"):
        fit_stream(tmp_path, [SpikeAware()], module=ToyModule(optimizer=Ageless))


def test_settings_out_of_range_are_refused() -> None:
    """With the name of the setting and what was given."""
    with pytest.raises(ValueError, match=r"`threshold` must be above 0, got 0\.0"):
        SpikeAware(0.0)
    with pytest.raises(ValueError, match="`reset_interval` must be an integer of at least 1, got 0"):
        SpikeAware(reset_interval=0)
    with pytest.raises(ValueError, match="`warmup_steps` must be at least 0, got -1"):
        SpikeAware(warmup_steps=-1)
    with pytest.raises(ValueError, match=r"`reset_interval=20` leaves no step.*`clip_delay=20`"):
        SpikeAware(reset_interval=20)
    with pytest.raises(ValueError, match="`clip_delay` must be an integer of at least 1, got 0"):
        SpikeAware(clip_delay=0)
