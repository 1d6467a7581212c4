"""Evaluation steps that know no loader index, and evaluation at any moment of a fit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_cl import ContinualCallback
from lightning_cl.core.evaluation import accept_dataloader_idx, average_over_loaders, restore_steps, run_validation
from lightning_cl.core.events import TaskEvents
from toys import ToyModule, fit_stream, toy_loaders, toy_stream, trainer, weights


class Bare(ToyModule):
    """Steps with a batch alone, as small projects have them."""

    def validation_step(self, batch: Any) -> Any:
        return "validated", batch

    def test_step(self, batch: Any) -> Any:
        return "tested", batch


class Indexed(ToyModule):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return "validated", batch, batch_idx


class Knowing(ToyModule):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return "validated", dataloader_idx


def test_steps_for_one_loader_serve_several() -> None:
    """Whatever they take; Lightning, which reads the names, passes the loader's index to the wrapper."""
    module = Bare()
    accept_dataloader_idx(module)
    for step in (module.validation_step, module.test_step):
        assert is_param_in_hook_signature(step, "dataloader_idx", explicit=True)
        assert is_param_in_hook_signature(step, "batch_idx", explicit=True)
    assert module.validation_step("batch", 3, 0) == ("validated", "batch")
    assert module.test_step("batch", 3) == ("tested", "batch")
    module = Indexed()
    accept_dataloader_idx(module)
    assert module.validation_step("batch", 3, 0) == ("validated", "batch", 3)


def test_steps_that_need_no_help_are_left_alone() -> None:
    """Those that know the loader, and those that the module does not define."""
    module = Knowing()
    accept_dataloader_idx(module)
    assert not vars(module).keys() & {"validation_step", "test_step"}


def test_steps_are_given_back() -> None:
    """Also those that the instance carried itself, as a compiled module does."""
    module = Indexed()
    accept_dataloader_idx(module)
    restore_steps(module)
    assert "validation_step" not in vars(module)
    compiled = torch.compile(module.validation_step, backend="eager")
    module.validation_step = compiled
    accept_dataloader_idx(module)
    assert module.validation_step is not compiled
    restore_steps(module)
    restore_steps(module)
    assert module.validation_step is compiled


@pytest.mark.parametrize("kind", [Indexed, Bare])
def test_a_stream_evaluates_a_module_for_one_loader(kind: type[ToyModule], tmp_path: Path) -> None:
    """Lightning alone would stop at the second loader."""
    seen: list[int] = []

    class Counting(kind):  # type: ignore[valid-type, misc]
        def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            seen.append(dataloader_idx)

    module = Counting()
    fit_stream(tmp_path, [], module=module, stream=toy_stream(epochs_per_task=1), num_sanity_val_steps=0)
    assert seen == [0, 0, 1]
    assert "validation_step" not in vars(module)


class Interrupting(ContinualCallback):
    """Evaluates in the middle of an epoch."""

    needs_state = False

    def __init__(self) -> None:
        self.evaluated: list[tuple[int, int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step in (1, 7):
            before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
            run_validation(trainer, TaskEvents.attach(trainer).task)
            after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
            assert torch.equal(before[0], after[0])
            assert (before[1] == after[1]).all()
            assert before[2] == after[2]
            assert trainer.training
            assert pl_module.training

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.evaluated.append((trainer.global_step, len(trainer.num_val_batches)))


class Drawing(ToyModule):
    """Uses every generator while it is evaluated."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", torch.rand(()) + np.random.rand() + random.random())


def test_evaluation_within_a_task_leaves_training_alone(tmp_path: Path) -> None:
    """The loaders are those of the task's end, Lightning's own evaluations stay, and the weights too, to the bit."""
    callback = Interrupting()

    def run(callbacks: list[Any]) -> torch.Tensor:
        torch.manual_seed(3)
        module = Drawing(dropout=0.3)
        return fit_stream(tmp_path, callbacks, module=module, num_sanity_val_steps=0)

    with_it = run([callback])
    assert callback.evaluated == [(1, 1), (6, 1), (7, 2), (12, 2)]
    callback.evaluated.clear()
    callback.on_train_batch_end = lambda *_: None
    assert torch.equal(run([callback]), with_it)
    assert callback.evaluated == [(6, 1), (12, 2)]


def test_evaluation_within_a_plain_fit(tmp_path: Path) -> None:
    """Without a stream the validation loader is the one there is."""
    callback, loader = Interrupting(), toy_loaders()[0]
    fit = trainer(tmp_path, [callback], max_epochs=1, num_sanity_val_steps=0)
    fit.fit(ToyModule(), loader, loader)
    assert callback.evaluated == [(1, 1), (3, 1)]
    plain = ToyModule()
    trainer(tmp_path, max_epochs=1).fit(plain, loader, loader)
    assert torch.equal(weights(plain), weights(fit.lightning_module))


def test_a_monitor_finds_the_mean_over_tasks(tmp_path: Path) -> None:
    """`val_acc` is the mean of the loaders, also where a later task has one loader more."""
    found: list[dict[str, float]] = []

    class Look(ContinualCallback):
        needs_state = False

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            found.append({name: float(value) for name, value in trainer.callback_metrics.items() if "val" in name})

    fit_stream(tmp_path, [Look()], num_sanity_val_steps=0)
    assert found[0].keys() == {"val_acc"}
    first, second = (found[1][f"val_acc/dataloader_idx_{loader}"] for loader in (0, 1))
    assert found[1]["val_acc"] == pytest.approx((first + second) / 2)


def test_one_loader_has_no_mean(tmp_path: Path) -> None:
    """Nothing is added where Lightning gives the plain name itself."""
    fit = trainer(tmp_path, max_epochs=1)
    loader = toy_loaders()[0]
    fit.fit(ToyModule(), loader, loader)
    before = dict(fit.callback_metrics)
    average_over_loaders(fit)
    assert fit.callback_metrics == before
