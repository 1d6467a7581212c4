"""Ranks that grow: where, when, and without a change of outputs."""

from __future__ import annotations

import pickle
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_cl import ContinualCallback, GrowingLoRA
from lightning_cl.core.update import OptimizerStep
from lora_runs import LAYERS, RUNS, SLOW, Watch, logits, slot_of
from toys import LoraToy, fit_stream, toy_loaders, toy_stream, trainer, weights


class Growth(ContinualCallback):
    """Notes gates and factors of a layer after every update; its place says before or after the method."""

    needs_state = False

    def __init__(self) -> None:
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []

    def change_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        slot = slot_of(pl_module)
        self.found.append((slot.mixing("default"), *slot.weights("default")))


@pytest.mark.parametrize("run", RUNS)
def test_growth_changes_no_output(run: str, tmp_path: Path) -> None:
    """A new rank has a row outside the span of those before, and a column of zeros."""
    kind, settings = RUNS[run]
    watches, growths, method = (Watch(), Watch()), (Growth(), Growth()), GrowingLoRA(every=2, threshold=0.05)
    callbacks = [watches[0], growths[0], method, watches[1], growths[1]]
    fit_stream(tmp_path, callbacks, module=kind(), **settings)
    for old, new in zip(watches[0].steps, watches[1].steps, strict=True):
        assert torch.equal(old, new)
    for old, new in zip(watches[0].outputs, watches[1].outputs, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-5)
    grown = 0
    for (gates, old_down, up), (new_gates, down, new_up) in zip(growths[0].found, growths[1].found, strict=True):
        taken = new_gates != gates
        assert set(gates.tolist()) | set(new_gates.tolist()) <= {0.0, 1.0}
        assert torch.equal(up, new_up)
        assert torch.equal(old_down[~taken], down[~taken])
        assert not up[:, gates == 0].any()
        if taken.any():
            grown += 1
            torch.testing.assert_close(down[taken].norm(dim=1), torch.full((1,), 3**-0.5))
            torch.testing.assert_close(down[taken] @ down[gates != 0].T, torch.zeros(1, 1), rtol=0, atol=1e-6)
    assert grown == 2
    assert method.segments[LAYERS[0]] == [0, 2, 4]


def test_a_new_rank_is_the_leading_direction_outside(tmp_path: Path) -> None:
    """Of the gradient of the weight over the batch of the step, by hand."""

    class Gradient(ContinualCallback):
        needs_state = False

        def observe_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
            inputs, labels = batches[len(gradients)]
            layer = pl_module.get_submodule(LAYERS[0])
            with torch.enable_grad():
                layer.base_layer.weight.requires_grad_(True)
                loss = cross_entropy(pl_module(inputs), labels)
                (found,) = torch.autograd.grad(loss, layer.base_layer.weight)
                layer.base_layer.weight.requires_grad_(False)
            gradients.append(found)

    gradients: list[Tensor] = []
    batches = [toy_loaders()[0].dataset[start : start + 8] for start in (0, 8, 16)]
    growth = Growth()
    data: DataLoader[Any] = DataLoader(batches, batch_size=None)
    module = SLOW()
    trainer(tmp_path, [Gradient(), GrowingLoRA(every=2, threshold=0.05), growth], max_epochs=1).fit(module, data, data)
    basis = torch.nn.functional.normalize(growth.found[1][1][:1])
    left = gradients[1] - gradients[1] @ basis.T @ basis
    direction = torch.linalg.svd(left)[2][0]
    found = growth.found[1][1][1]
    torch.testing.assert_close((found @ direction).abs(), found.norm(), rtol=1e-4, atol=0)


class Apart(LoraToy):
    """Two losses that reach one layer each, stepped one after the other."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.03)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        first, second = (self.get_submodule(name) for name in LAYERS)
        hidden = first(batch[0])
        losses = (hidden.square().mean(), cross_entropy(second(hidden.detach()), batch[1]))
        for optimizer, loss in zip(self.optimizers(), losses, strict=True):  # type: ignore[arg-type]
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        layers = (self.get_submodule(name) for name in LAYERS)
        return [torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.03) for layer in layers]


def test_layers_grow_with_the_steps_of_their_own_optimizer(tmp_path: Path) -> None:
    """Each at every second step of it, by the gradient of that step."""
    method = GrowingLoRA(every=2, threshold=0.01)
    due: dict[str, list[bool]] = {name: [] for name in LAYERS}
    grown: list[tuple[str, str]] = []

    class Look(ContinualCallback):
        needs_state = False

        def observe_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
            (self.owner,) = (name for name in LAYERS if f"{name}.lora_A.default.weight" in step.parameters)
            due[self.owner].append(self.owner in method._sketches)
            self.before = dict(method.ranks)

        def observe_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
            grown.extend((self.owner, name) for name in LAYERS if method.ranks[name] != self.before[name])
            assert self.owner not in method._sketches

    loader = toy_loaders()[0]
    trainer(tmp_path, [method, Look()], max_epochs=1).fit(Apart(), loader, loader)
    for found in due.values():
        assert found == [(step + 1) % 2 == 0 for step in range(len(found))]
    assert grown == [(name, name) for name in LAYERS]


def test_without_need_nothing_grows(tmp_path: Path) -> None:
    """And only ranks in use take room: two tasks of one."""
    method, module = GrowingLoRA(every=1, threshold=0.999), SLOW()
    fit_stream(tmp_path, [method], module=module)
    assert method.segments == {name: [0, 1, 2] for name in LAYERS}
    assert method.ranks == dict.fromkeys(LAYERS, 1)
    assert slot_of(module).mixing("default").tolist() == [1.0, 0.0]


def test_every_task_begins_small(tmp_path: Path) -> None:
    """Whatever the one before grew to; with all ranks from the start there is nothing to grow."""
    method, module = GrowingLoRA(every=1, threshold=0.01), SLOW()
    fit_stream(tmp_path, [method], module=module)
    assert method.ranks == dict.fromkeys(LAYERS, 2)
    assert slot_of(module).mixing("default").tolist() == [1.0, 0.0]
    full = GrowingLoRA(2, every=1, threshold=0.01)
    fit_stream(tmp_path, [full], module=SLOW())
    assert full.segments[LAYERS[0]] == [0, 2, 4]


def test_accumulated_batches_are_looked_at_together(tmp_path: Path) -> None:
    """Two halves of a batch grow what the batch grows."""
    whole, halves = SLOW(), SLOW()
    fit_stream(tmp_path, [GrowingLoRA(every=2, threshold=0.2)], module=whole)
    stream = toy_stream(batch_size=4)
    method = GrowingLoRA(every=2, threshold=0.2)
    fit_stream(tmp_path, [method], module=halves, stream=stream, accumulate_grad_batches=2)
    torch.testing.assert_close(weights(halves), weights(whole), rtol=0, atol=1e-5)
    assert 2 in method.ranks.values()


def test_what_waits_does_not_act_under_weight_decay(tmp_path: Path) -> None:
    """Columns of ranks that are not in use stay zero."""
    growth = Growth()
    module = LoraToy(learning_rate=0.02, optimizer=partial(torch.optim.AdamW, weight_decay=0.5))
    fit_stream(tmp_path, [GrowingLoRA(every=100), growth], module=module)
    assert all(not up[:, 1].any() and up[:, 0].any() for _, _, up in growth.found)


def test_shares_and_ranks_are_logged(tmp_path: Path) -> None:
    """With the loggers of the Trainer."""
    logger = CSVLogger(tmp_path)
    fit_stream(tmp_path, [GrowingLoRA(every=2)], module=SLOW(), logger=logger)
    logger.save()
    text = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "growing_lora/share_outside" in text
    assert f"growing_lora/rank/{LAYERS[0]}" in text


class Interrupting(ContinualCallback):
    """Ends a fit in the middle of its task."""

    needs_state = False

    def observe_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        raise RuntimeError("interrupted")


@pytest.mark.parametrize("others", [[], [Interrupting()]], ids=["fit", "interrupted"])
def test_nothing_hangs_on_the_module_after_a_fit(others: list[Any], tmp_path: Path) -> None:
    """No hooks, and the callback can be pickled."""
    module, method = SLOW(), GrowingLoRA(every=1)
    with pytest.raises(RuntimeError, match="interrupted") if others else nullcontext():
        fit_stream(tmp_path, [method, *others], module=module)
    assert not any(layer._forward_hooks for layer in module.modules())
    pickle.dumps(method)
    assert logits(module).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"start_rank": 0}, "`start_rank` must be an integer of at least 1"),
        ({"every": 0}, "`every` must be an integer of at least 1"),
        ({"threshold": 0.0}, "`threshold` must be above 0 and below 1"),
        ({"threshold": 1.0}, "`threshold` must be above 0 and below 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], text: str) -> None:
    """Each names itself."""
    with pytest.raises(ValueError, match=text):
        GrowingLoRA(**settings)


def test_more_ranks_than_there_are_is_refused(tmp_path: Path) -> None:
    """The user's rank is the most."""
    with pytest.raises(ValueError, match=r"`start_rank=3` is more than the rank r=2"):
        fit_stream(tmp_path, [GrowingLoRA(3)], module=LoraToy())
