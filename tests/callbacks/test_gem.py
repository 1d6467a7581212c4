"""GEM through fits: one constraint for each earlier task. What it shares with A-GEM is tested there."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_cl import AGEM, GEM, ContinualCallback, MaskedHead
from lightning_cl.core import Task
from lightning_cl.datamodules import ClassIncremental, TaskIncremental
from lightning_cl.datamodules.samplers import TaskSampler
from rows.agem import constrained, turned
from toys import ToyModule, fit_stream, toy_stream

CLASSES = [np.arange(label, 48, 4) for label in range(4)]


def four_tasks() -> Any:
    """One class each."""
    return toy_stream(scenario=ClassIncremental(n_tasks=4), batch_size=4)


@pytest.mark.parametrize("size", [None, 2])
def test_a_constraint_for_each_task_ends_where_a_plain_loop_ends(size: int | None, tmp_path: Path) -> None:
    """Over four tasks, with all of the memory or a draw from each; the program solved by search."""
    callback = GEM(24, batch_size=size)
    fitted = fit_stream(tmp_path, [callback], stream=four_tasks())
    options: dict[str, Any] = {"tasks": CLASSES, "batch_size": 4, "per_task": True, "draw_size": size or 24}
    torch.testing.assert_close(fitted, turned(constrained, 24, "ring", **options), rtol=0, atol=1e-5)
    assert callback.projections > 5
    # the projection on their mean is another
    assert (fitted - fit_stream(tmp_path, [AGEM(24, policy="ring")], stream=four_tasks())).abs().max() > 1e-2


def test_with_one_earlier_task_it_is_agem(tmp_path: Path) -> None:
    """On the same draw."""
    averaged = fit_stream(tmp_path, [AGEM(12, batch_size=5, policy="ring")])
    fitted = fit_stream(tmp_path, [gem := GEM(12, batch_size=5)])
    assert gem.projections >= 2
    torch.testing.assert_close(fitted, averaged, rtol=0, atol=1e-6)


def test_a_margin_of_the_code_is_another_program(tmp_path: Path) -> None:
    """With one earlier task it is the larger of the solution and the margin, and not their sum."""

    def bounded(g: Tensor, references: list[Tensor]) -> Tensor:
        (r,) = references
        return g + max(-(g @ r) / (r @ r), torch.tensor(0.5)) * r if g @ r < 0 else g

    fitted = fit_stream(tmp_path, [GEM(12, margin=0.5, mode="bound")])
    expected = turned(bounded, 12, "ring", per_task=True, draw_size=12)
    torch.testing.assert_close(fitted, expected, rtol=0, atol=1e-6)
    added = turned(functools.partial(constrained, margin=0.5), 12, "ring", per_task=True, draw_size=12)
    assert (fitted - added).abs().max() > 1e-2


def test_the_memory_of_the_paper(tmp_path: Path) -> None:
    """Equal shares for tasks: the latest samples of each."""
    callback = GEM(8)
    fit_stream(tmp_path, [callback], stream=four_tasks())
    expected: set[int] = set()
    for task, rows in enumerate(CLASSES):
        sampler = TaskSampler(rows, task=task, batch_size=4, seed=0)
        sampler.set_position(epoch=1)
        expected |= set(sorted(sampler.global_rows(len(sampler) - 1)[0].tolist())[-2:])
    assert set(callback.buffer.sample_ids.tolist()) == expected


class Masked(MaskedHead, ToyModule):
    """Answers with the classes of the task at hand; notes tasks, labels and losses."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.steps: list[tuple[Task, Tensor, float]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        return self.mask_logits(self.model(inputs))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = cross_entropy(self(batch[0]), batch[1])
        assert self.current_task is not None
        self.steps.append((self.current_task, batch[1].clone(), loss.item()))
        return loss


def test_a_pass_is_made_as_its_task(tmp_path: Path) -> None:
    """A head that masks the classes of other tasks would else give the memory losses without meaning."""
    module = Masked()
    stream = toy_stream(scenario=TaskIncremental(n_tasks=4))
    fit_stream(tmp_path, [GEM(24)], module=module, stream=stream)
    for task, labels, loss in module.steps:
        assert set(labels.tolist()) <= set(task.classes)
        assert loss < 100
    assert [task.index for task, _, _ in module.steps[-4:]] == [3, 0, 1, 2]
    assert module.current_task is not None
    assert module.current_task.index == 3


def test_tasks_are_known_after_a_resume(tmp_path: Path) -> None:
    """In the second task, with the masks of the first."""

    def saver(directory: Path) -> ModelCheckpoint:
        return ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    def stream() -> Any:
        return toy_stream(scenario=TaskIncremental(n_tasks=2))

    straight = fit_stream(tmp_path, [GEM(24), saver(tmp_path)], module=Masked(dropout=0.3), stream=stream())
    torch.manual_seed(9)
    resumed = GEM(24)
    path = tmp_path / "step=8.ckpt"
    again = fit_stream(
        tmp_path, [resumed, saver(tmp_path / "on")], module=Masked(dropout=0.3), stream=stream(), ckpt_path=path
    )
    assert torch.equal(again, straight)
    assert resumed.projections > 0


def test_settings_out_of_range_are_refused() -> None:
    """When the callback is built, with the name of the setting."""
    with pytest.raises(ValueError, match=r"`margin` must be at least 0, got -0\.5"):
        GEM(8, margin=-0.5)
    with pytest.raises(ValueError, match="`mode` must be one of 'added', 'bound', got 'sum'"):
        GEM(8, mode="sum")  # type: ignore[arg-type]


class Asking(Callback):
    """Asks a callback in the last task what it takes, with the batch at hand."""

    def __init__(self, *asked: ContinualCallback) -> None:
        self.asked = asked

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batch = batch
        self.found = [callback.footprint(trainer, pl_module, batch) for callback in self.asked]


def test_footprints(tmp_path: Path) -> None:
    """A row for each reference, the step's gradients beside those of a pass, and the larger of the two batches."""
    module, asking = ToyModule(), Asking(AGEM(24, batch_size=6), GEM(24), AGEM(24))
    fit_stream(tmp_path, [asking], module=module, stream=four_tasks())
    size = sum(p.numel() for p in module.parameters()) * 4
    assert [footprint.device for footprint in asking.found] == [2 * size, 4 * size, 2 * size]
    assert all(footprint.host > 24 * (6 * 4 + 8) for footprint in asking.found)
    batches = [footprint.batch(asking.batch) for footprint in asking.found if footprint.batch is not None]
    assert [len(labels) for _, labels in batches] == [6, 24, 4]
