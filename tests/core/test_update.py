"""The hooks around an optimizer's step: when each is called, for whom, and with what."""

from __future__ import annotations

import contextlib
import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_cl import ContinualCallback
from lightning_cl.core.update import OptimizerStep, StepCache
from toys import ToyModule, fit_stream, toy_stream, trainer, weights

HOOKS = (
    "observe_gradients",
    "change_gradients",
    "hold_gradients",
    "limit_gradients",
    "change_update",
    "observe_update",
)


class Noting(ContinualCallback):
    """Notes every call, with the gradient and the weight of the first layer's bias."""

    def __init__(self, name: str, calls: list[Any]) -> None:
        self.name = name
        self.calls = calls

    @property
    def state_key(self) -> str:
        return self.name


def _note(hook: str) -> Any:
    def method(self: Noting, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        bias = pl_module.get_parameter("model.0.bias")
        assert not torch.is_grad_enabled()
        self.calls.append((hook, self.name, bias.grad.clone(), bias.detach().clone(), step))

    return method


for _hook in HOOKS:
    setattr(Noting, _hook, _note(_hook))


class Doubling(ContinualCallback):
    """Doubles gradients, and halves what a step moved."""

    def observe_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        step.keep(step.parameters)

    def change_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        step.keep(step.parameters)
        for parameter in step.parameters.values():
            parameter.grad.mul_(2)

    def change_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        for name, parameter in step.parameters.items():
            parameter.copy_((parameter + step.before(name)) / 2)


def test_every_hook_of_all_callbacks_comes_before_the_next_hook(tmp_path: Path) -> None:
    """In the order of the list; gradients are seen raw, changed, clipped; weights before and after the step."""
    calls: list[Any] = []
    callbacks = [Noting("a", calls), Doubling(), Noting("b", calls)]
    fit_stream(tmp_path, callbacks, max_steps=2, gradient_clip_val=1e-3)
    assert [call[:2] for call in calls] == [(hook, name) for hook in HOOKS for name in "ab"] * 2
    raw, changed, limited = calls[0][2], calls[2][2], calls[6][2]
    assert torch.equal(calls[1][2], raw)
    assert torch.equal(calls[3][2], 2 * raw)
    assert torch.equal(changed, raw)  # `a` comes before the callback that changes them
    assert torch.equal(limited, 2 * raw)
    assert calls[8][2].norm() < 1e-3  # Lightning clipped them before the step
    before, moved, corrected = calls[0][3], calls[8][3], calls[10][3]
    torch.testing.assert_close(corrected, (before + moved) / 2)
    assert not torch.equal(before, moved)
    assert calls[0][4] is calls[12][4]


def test_once_for_each_optimizer_step(tmp_path: Path) -> None:
    """Of three batches of an epoch, accumulated by two, come two steps; the gradient is that of both batches."""
    calls: list[Any] = []
    fit_stream(tmp_path, [Noting("a", calls)], accumulate_grad_batches=2)
    assert len(calls) == len(HOOKS) * 2 * 4
    alone: list[Any] = []
    fit_stream(tmp_path, [Noting("a", alone)])
    assert not torch.equal(calls[0][2], alone[0][2])


def test_copies_are_those_of_this_step(tmp_path: Path) -> None:
    """A second step does not see the first one's copies: half of every update is half of the learning rate."""
    module = ToyModule()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)  # type: ignore[method-assign]
    plain = ToyModule()
    plain.configure_optimizers = lambda: torch.optim.SGD(plain.parameters(), lr=0.1)  # type: ignore[method-assign]
    torch.testing.assert_close(fit_stream(tmp_path, [Doubling()], module=module), fit_stream(tmp_path, module=plain))


class Adversarial(ToyModule):
    """Steps two optimizers by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.model[layer].parameters(), lr=0.1) for layer in (0, 3)]


def test_several_optimizers_under_manual_optimization(tmp_path: Path) -> None:
    """Each step shows the parameters that it moves."""
    calls: list[Any] = []
    fit_stream(tmp_path, [Noting("a", calls)], module=Adversarial(), max_steps=2)
    assert [list(call[4].parameters) for call in calls] == (
        [["model.0.weight", "model.0.bias"]] * 6 + [["model.3.weight", "model.3.bias"]] * 6
    )


def test_optimizers_that_are_built_anew(tmp_path: Path) -> None:
    """A stream that rebuilds them at a boundary gets every step observed."""
    calls: list[Any] = []
    stream = toy_stream(optimizer_policy="rebuild")
    fit_stream(tmp_path, [Noting("a", calls)], stream=stream)
    assert len(calls) == len(HOOKS) * 12
    assert len({id(call[4]) for call in calls}) == 2


def test_a_group_added_to_an_optimizer(tmp_path: Path) -> None:
    """A parameter that came later is seen."""

    class Adding(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 1:
                trainer.optimizers[0].add_param_group({"params": list(pl_module.model[3].parameters())})

    class FirstLayer(ToyModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.model[0].parameters(), lr=0.1)

    calls: list[Any] = []
    fit_stream(tmp_path, [Noting("a", calls), Adding()], module=FirstLayer(), max_steps=2)
    assert [len(call[4].parameters) for call in calls] == [2] * 6 + [4] * 6


def test_a_parameter_that_takes_the_place_of_another(tmp_path: Path) -> None:
    """A new head in the old one's place in the optimizer is what the step moves."""

    class Replacing(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 1:
                head = torch.nn.Parameter(torch.zeros_like(pl_module.model[3].weight))
                pl_module.model[3].weight = trainer.optimizers[0].param_groups[0]["params"][2] = head

    calls: list[Any] = []
    module = ToyModule()
    fit_stream(tmp_path, [Noting("a", calls), Replacing()], module=module, max_steps=2)
    assert calls[6][4].parameters["model.3.weight"] is module.model[3].weight
    assert calls[0][4] is not calls[6][4]


def test_a_step_that_the_scaler_skips_moves_nothing(tmp_path: Path) -> None:
    """An infinite gradient under fp16: gradients are seen, no update is."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    class Infinite(ToyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 0 else loss

    calls: list[Any] = []
    precision = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    fit_stream(tmp_path, [Noting("a", calls)], module=Infinite(), plugins=[precision])
    counts = [sum(call[0] == hook for call in calls) for hook in HOOKS]
    assert counts == [12, 12, 12, 12, 8, 8]


def test_hooks_are_taken_off(tmp_path: Path) -> None:
    """After a fit, and after one that failed, the optimizer carries none."""
    calls: list[Any] = []
    run = trainer(tmp_path, [Noting("a", calls)])
    run.fit(ToyModule(), datamodule=toy_stream())
    assert not run.optimizers[0]._optimizer_step_post_hooks

    class Failing(ToyModule):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            raise RuntimeError("broken")

    run = trainer(tmp_path, [Noting("a", calls)])
    with pytest.raises(RuntimeError, match="broken"):
        run.fit(Failing(), datamodule=toy_stream())
    assert not run.optimizers[0]._optimizer_step_post_hooks


def test_nothing_is_registered_for_who_acts_on_no_step(tmp_path: Path) -> None:
    """A callback that only hears of tasks costs no step anything."""

    class Looking(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            assert not trainer.optimizers[0]._optimizer_step_post_hooks

    assert torch.equal(fit_stream(tmp_path, [ContinualCallback(), Looking()]), fit_stream(tmp_path))


class Behind(Adversarial):
    """Steps an optimizer that Lightning does not wrap."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)[0]
        optimizer.zero_grad()
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def test_a_step_behind_lightning_s_back_is_refused(tmp_path: Path) -> None:
    """No callback would hear of it, and the model would train unprotected."""
    with pytest.raises(ValueError, match=r"`?Doubling`? did not hear of a step of `SGD`.*self\.optimizers\(\)"):
        fit_stream(tmp_path, [Doubling()], module=Behind())
    fit_stream(tmp_path, [ContinualCallback()], module=Behind())


class Lookahead(torch.optim.SGD):
    """Steps by its base class, and moves the weights once more."""

    fails_at = -1

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        if self.fails_at == len(self.steps):
            self.fails_at = -1
            raise RuntimeError("no step")
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.mul_(0.99)
        self.steps.append(self.param_groups[0]["params"][0].clone())
        return loss


class Seen(ContinualCallback):
    """Keeps the first weights as it sees them after every step."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def observe_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        self.weights.append(next(pl_module.parameters()).detach().clone())


def test_a_step_that_calls_that_of_its_base_class_is_one_step(tmp_path: Path) -> None:
    """Hooks run once, when all of it is done."""
    module, seen = ToyModule(), Seen()
    optimizer = Lookahead(module.parameters(), lr=0.1)
    optimizer.steps = []
    module.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
    fit_stream(tmp_path, [seen], module=module)
    assert len(seen.weights) == len(optimizer.steps) == 12
    assert all(torch.equal(*pair) for pair in zip(seen.weights, optimizer.steps, strict=True))


def test_a_step_that_failed_does_not_hide_those_after_it(tmp_path: Path) -> None:
    """A user who catches an error and goes on still has callbacks."""

    class Catching(ToyModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
            with contextlib.suppress(RuntimeError):
                optimizer.step()

    module, seen = Catching(), Seen()
    optimizer = Lookahead(module.parameters(), lr=0.1)
    optimizer.steps, optimizer.fails_at = [], 3
    module.configure_optimizers = lambda: optimizer  # type: ignore[method-assign]
    fit_stream(tmp_path, [seen], module=module)
    assert len(seen.weights) == len(optimizer.steps) == 11


def test_lbfgs_is_refused(tmp_path: Path) -> None:
    """It evaluates gradients several times in a step."""
    module = ToyModule()
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters())  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="Doubling act once per optimizer step, but `LBFGS`"):
        fit_stream(tmp_path, [Doubling()], module=module)


class Reading(ContinualCallback):
    """Only reads weights after a step."""

    def observe_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        assert step.parameters


def test_sparse_gradients_are_no_matter_for_who_reads_weights(tmp_path: Path) -> None:
    """What acts on no gradient is not refused for them."""
    module = ToyModule()
    module.table = torch.nn.Embedding(3, 2, sparse=True)
    fit_stream(tmp_path, [Reading()], module=module, max_steps=1)


def test_sparse_gradients_are_refused(tmp_path: Path) -> None:
    """Before the first step, for whoever acts on gradients."""
    module = ToyModule()
    module.table = torch.nn.Embedding(3, 2, sparse=True)
    before = weights(module)
    with pytest.raises(ValueError, match=r"`Doubling` needs dense gradients.*'table'"):
        fit_stream(tmp_path, [Doubling()], module=module)
    assert torch.equal(weights(module), before)


def test_what_is_known_of_a_step_is_not_copied() -> None:
    """A callback is pickled and copied without what belongs to a running optimizer."""
    module = ToyModule()
    step = OptimizerStep(module.configure_optimizers(), dict(module.named_parameters()))
    cache: StepCache[int] = StepCache()
    cache[step] = 3
    assert cache[step] == 3
    assert len(pickle.loads(pickle.dumps(cache))) == len(copy.deepcopy(cache)) == 0
    del step
    assert not cache
