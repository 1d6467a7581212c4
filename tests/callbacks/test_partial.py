"""The mechanism of partial updates: what is held stays to the bit, whatever the optimizer and the other callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from lightning_cl import EWC, ContinualCallback, GradientMask, HalfFineTuning
from lightning_cl.callbacks.partial import PartialUpdate
from toys import ToyModule, fit_stream, toy_loaders, toy_stream, trainer, weights


def half() -> Tensor:
    """Every other column of the first layer's weight may move."""
    return (torch.arange(6) % 2).float().expand(8, 6).clone()


class Fixed(PartialUpdate):
    """The same shares in every step."""

    def __init__(self, shares: Mapping[str, float | Tensor], **settings: Any) -> None:
        super().__init__(**settings)
        self.shares = shares

    def movability(self, trainer: Any, pl_module: Any, step: Any) -> Mapping[str, float | Tensor]:
        return {name: share for name, share in self.shares.items() if name in step.parameters}


class Graded(Fixed):
    """Shares between 0 and 1, and a state of its own."""

    graded = True


class Watch(ContinualCallback):
    """Keeps weights and optimizer state as they are when the second task starts."""

    boundaries = "evaluation"
    needs_state = False

    def on_task_start(self, trainer: Any, pl_module: Any, task: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        self.state = self.of(trainer, pl_module)

    @staticmethod
    def of(trainer: Any, pl_module: Any) -> dict[str, dict[str, Tensor]]:
        states = trainer.optimizers[0].state
        return {
            name: {key: torch.as_tensor(value).clone() for key, value in states[p].items() if value is not None}
            for name, p in pl_module.named_parameters()
        }


class With(ToyModule):
    """The toy module under an optimizer of choice."""

    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        kind, _, way = self.optimizer.partition("-")
        if kind == "bnb":
            optim = pytest.importorskip("bitsandbytes").optim
            return optim.AdamW8bit(self.parameters(), lr=0.02, weight_decay=0.1)
        if kind == "sgd":
            settings = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "foreach": way == "foreach"}
            return torch.optim.SGD(self.parameters(), lr=0.05, **settings)
        ways = {name: name == way for name in ("fused", "foreach")}
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1, **ways)


OPTIMIZERS = ["adamw", "adamw-fused", "adamw-foreach", "sgd", "sgd-foreach", "bnb"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_held_does_not_move_by_a_bit(optimizer: str, tmp_path: Path) -> None:
    """In the second task, when moments and momentum of the first would move it; a held tensor's state stays too."""
    watch, module = Watch(), With(optimizer)
    method = Fixed({"model.0.weight": half(), "model.3.weight": 0.0, "model.3.bias": 0.0}, from_task=1)
    fit = trainer(tmp_path, [watch, method])
    fit.fit(module, datamodule=toy_stream())
    after, held = dict(module.named_parameters()), half() == 0
    moved = after["model.0.weight"] != watch.before["model.0.weight"]
    assert not moved[held].any()
    assert moved[~held].all()
    state = watch.of(fit, module)
    for name in ("model.3.weight", "model.3.bias"):
        assert torch.equal(after[name], watch.before[name])
        assert state[name].keys() == watch.state[name].keys()
        assert all(torch.equal(value, watch.state[name][key]) for key, value in state[name].items())
    assert (after["model.0.bias"] != watch.before["model.0.bias"]).any()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-fused", "sgd"])
def test_a_share_scales_the_applied_update(optimizer: str, tmp_path: Path) -> None:
    """Also under Adam, where scaling the gradient would change nothing: as a plain loop."""
    shares = {"model.0.weight": 0.25, "model.3.weight": torch.tensor([[0.0], [0.5], [0.9], [1.0]])}
    module, plain = With(optimizer), With(optimizer)
    loader = toy_loaders()[0]
    trainer(tmp_path, [Graded(shares)], max_epochs=2).fit(module, loader, loader)
    steps = plain.configure_optimizers()
    for inputs, labels in [*loader, *loader]:
        steps.zero_grad()
        cross_entropy(plain.model(inputs), labels).backward()
        before = {name: p.detach().clone() for name, p in plain.named_parameters()}
        steps.step()
        with torch.no_grad():
            for name, share in shares.items():
                p = plain.get_parameter(name)
                p.copy_(before[name] + share * (p - before[name]))
    torch.testing.assert_close(weights(module), weights(plain), rtol=0, atol=1e-6)


def test_clipping_and_accumulation_see_what_may_move(tmp_path: Path) -> None:
    """The norm is over what the shares leave, once per optimizer step."""
    module, plain = ToyModule(), ToyModule()
    loader, shares = toy_loaders(batch_size=4)[0], {"model.0.weight": half(), "model.3.weight": 0.0}
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2, "max_epochs": 1}
    trainer(tmp_path, [Fixed(shares)], **settings).fit(module, loader, loader)
    optimizer = plain.configure_optimizers()
    for number, (inputs, labels) in enumerate(loader):
        (cross_entropy(plain.model(inputs), labels) / 2).backward()
        if number % 2:
            before = plain.model[0].weight.detach().clone()
            plain.model[0].weight.grad *= half()
            plain.model[3].weight.grad = None
            assert clip_grad_norm_(plain.parameters(), 0.2) > 0.2
            optimizer.step()
            with torch.no_grad():
                plain.model[0].weight.copy_(torch.where(half() > 0, plain.model[0].weight, before))
            optimizer.zero_grad()
    torch.testing.assert_close(weights(module), weights(plain), rtol=0, atol=1e-6)


@pytest.mark.parametrize("turned", [False, True])
def test_two_methods_let_move_what_both_let_move(turned: bool, tmp_path: Path) -> None:
    """Shares multiply, and what one of them holds is held, in either order."""
    first = {"model.0.weight": half(), "model.3.weight": half()[:4].repeat(1, 2)[:, :8], "model.3.bias": 0.5}
    second = {"model.0.weight": 0.5, "model.3.weight": 0.0, "model.3.bias": torch.tensor([1.0, 0.2, 1.0, 0.5])}
    both: list[Callback] = [Fixed(first), Graded(second)]
    product = Graded(
        {"model.0.weight": 0.5 * half(), "model.3.weight": 0.0, "model.3.bias": 0.5 * second["model.3.bias"]}
    )
    together = fit_stream(tmp_path, both[::-1] if turned else both)
    torch.testing.assert_close(together, fit_stream(tmp_path, [product]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", [lambda: GradientMask(0.4), lambda: HalfFineTuning(seed=1)])
def test_the_order_beside_a_penalty_does_not_matter(method: Any, tmp_path: Path) -> None:
    """Gradients are held after all penalties are in them, and a choice is made before they are."""
    masked_first = fit_stream(tmp_path, [method(), EWC(20.0)])
    assert torch.equal(masked_first, fit_stream(tmp_path, [EWC(20.0), method()]))
    assert (masked_first - fit_stream(tmp_path, [method()])).abs().max() > 1e-2


class Manual(ToyModule):
    """Two optimizers, stepped by hand, one of them in every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
        first.step()
        first.zero_grad()
        if batch_idx % 2:
            second.step()
            second.zero_grad()

    def configure_optimizers(self) -> Any:
        settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
        return [torch.optim.SGD(self.model[layer].parameters(), **settings) for layer in (0, 3)]


def test_several_optimizers_and_manual_optimization(tmp_path: Path) -> None:
    """Each step holds its own parameters; the others' copies are left alone."""
    start, module = dict(ToyModule().named_parameters()), Manual()
    fit_stream(tmp_path, [Fixed({"model.0.weight": half(), "model.3.weight": 0.0, "model.3.bias": 0.5})], module=module)
    after = dict(module.named_parameters())
    assert torch.equal(after["model.0.weight"][half() == 0], start["model.0.weight"][half() == 0])
    assert torch.equal(after["model.3.weight"], start["model.3.weight"])
    assert (after["model.3.bias"] != start["model.3.bias"]).all()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(precision: Any, tmp_path: Path) -> None:
    """Held bits are held, free ones are the step's, in the weights' own precision."""
    module = With("adamw")
    fit_stream(tmp_path, [Fixed({"model.0.weight": half(), "model.3.weight": 0.0})], module=module, precision=precision)
    start = ToyModule().to(module.model[0].weight.dtype)
    assert torch.equal(module.model[3].weight, start.model[3].weight)
    moved = module.model[0].weight != start.model[0].weight
    assert not moved[half() == 0].any()
    assert moved[half() > 0].sum() > 18


def test_what_cannot_be_served_is_refused(tmp_path: Path) -> None:
    """With the setting and the way out."""
    with pytest.raises(ValueError, match="`from_task` must be a task's number, 0 or above, got -1"):
        Fixed({}, from_task=-1)
    with pytest.raises(ValueError, match="`include` pattern 'encoder' matches no parameter"):
        fit_stream(tmp_path, [Fixed({}, include=["encoder"])])


def test_state_of_instances_side_by_side() -> None:
    """Those for different parameters keep their own."""
    assert Fixed({}).state_key == "Fixed"
    assert Fixed({}, include=["a"]).state_key != Fixed({}, exclude=["a"]).state_key
