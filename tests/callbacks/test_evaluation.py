"""Evaluation within tasks: at the steps asked for, without a trace in the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_cl import ContinualEvaluation, ContinualMetrics, ExperienceReplay
from lightning_cl.datamodules import ClassIncremental, Online
from lightning_cl.metrics import functional
from toys import ToyModule, fit_stream, toy_data, toy_loaders, toy_stream, trainer, weights


def curves(root: Path, every: int, *, module: Any = None, stream: Any = None, **settings: Any) -> ContinualMetrics:
    """The metrics of a fit with an evaluation every so many steps: two tasks of six steps in two epochs."""
    metrics = ContinualMetrics(directory=root)
    callbacks = [ExperienceReplay(8), ContinualEvaluation(every), metrics]
    fit_stream(root, callbacks, module=module, stream=stream, **settings)
    return metrics


@pytest.mark.parametrize(
    ("every", "settings", "expected"),
    [
        (1, {}, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]),
        (2, {}, [2, 4, 6, 8, 10, 12]),
        (3, {}, [3, 6, 9, 12]),
        (5, {}, [5, 6, 10, 12]),
        (50, {}, [6, 12]),
        (1, {"accumulate_grad_batches": 2}, [1, 2, 3, 4, 5, 6, 7, 8]),
        (3, {"accumulate_grad_batches": 2}, [3, 4, 6, 8]),
        (1, {"accumulate_grad_batches": 3}, [1, 2, 3, 4]),
        (2, {"val_check_interval": 2}, [2, 4, 5, 6, 8, 10, 11, 12]),
        (1, {"max_steps": 4}, [1, 2, 3, 4]),
    ],
    ids=str,
)
def test_evaluates_at_these_steps(every: int, settings: dict[str, Any], expected: list[int], tmp_path: Path) -> None:
    """Every so many optimizer steps, each once, and always at the end of a task."""
    assert curves(tmp_path, every, **settings)._steps == expected


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}], ids=str)
def test_training_does_not_notice(settings: dict[str, Any], tmp_path: Path) -> None:
    """With dropout, and a validation that draws random numbers, the weights have the same bits."""

    class Drawing(ToyModule):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            torch.rand(3)
            super().validation_step(batch, batch_idx)

    module, plain = Drawing(dropout=0.4), Drawing(dropout=0.4)
    torch.manual_seed(3)
    curves(tmp_path, 1, module=module, **settings)
    torch.manual_seed(3)
    # the evaluations at the tasks' ends are the plain run's own
    metrics = ContinualMetrics(directory=tmp_path)
    fit_stream(tmp_path, [ExperienceReplay(8), metrics], module=plain, **settings)
    assert torch.equal(weights(module), weights(plain))
    assert module.training


def test_training_logs_do_not_notice(tmp_path: Path) -> None:
    """A mean over the epoch's losses goes on where the evaluation interrupted it."""

    class Logging(ToyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("mean_loss", loss, on_step=False, on_epoch=True)
            return loss

    means = []
    for callbacks in ([], [ContinualEvaluation(1)]):
        fit = trainer(tmp_path, callbacks)
        fit.fit(Logging(), datamodule=toy_stream())
        means.append(float(fit.callback_metrics["mean_loss"]))
    assert means[0] == means[1]


def test_the_curves_of_a_plain_loop(tmp_path: Path) -> None:
    """Each evaluation is that of the weights after its step, over the tasks seen so far."""
    inputs, labels = toy_data(16, seed=1).tensors
    seen = []

    class Watching(ToyModule):
        def on_train_batch_end(self, *_: Any) -> None:
            with torch.no_grad():
                right = (self.model.eval()(inputs).argmax(-1) == labels).double()
            self.model.train()
            seen.append([float(right[labels < 2].mean()), float(right[labels >= 2].mean())])

    metrics = curves(tmp_path, 1, module=Watching())
    assert metrics._step_tasks == [0] * 6 + [1] * 6
    assert metrics._step_scores == [[first] for first, _ in seen[:6]] + seen[6:]
    assert metrics._step_scores[5] == metrics._rows[0]
    assert metrics._step_scores[11] == metrics._rows[1]


def test_the_stability_gap(tmp_path: Path) -> None:
    """The summary is that of the recorded curves, which fall below what the tasks' ends show."""
    metrics = curves(tmp_path, 1, module=ToyModule(seed=1))
    nan = float("nan")
    scores = torch.tensor([[*row, nan][:2] for row in metrics._step_scores], dtype=torch.float64)
    task = torch.tensor([0] * 6 + [1] * 6)
    summary = metrics.compute()
    lowest = min(first for first, _ in metrics._step_scores[6:])
    assert summary["min_accuracy"] == lowest < metrics.matrix[1, 0]
    assert summary["worst_case_accuracy"] == pytest.approx((lowest + float(metrics.matrix[1, 1])) / 2)
    for window in (10, 100):
        for name in ("windowed_forgetting", "windowed_plasticity"):
            expected = float(getattr(functional, name)(scores, window))
            assert summary[f"{name}_{window}"] == pytest.approx(expected)
    assert summary["worst_case_accuracy"] == pytest.approx(float(functional.worst_case_accuracy(scores, task)))
    at_ends = ContinualMetrics(directory=tmp_path)
    fit_stream(tmp_path, [at_ends])
    assert "min_accuracy" not in at_ends.compute()


def test_evaluates_what_the_stream_evaluates(tmp_path: Path) -> None:
    """All tasks, where it says so, in the first task too."""
    assert {len(row) for row in curves(tmp_path, 2, stream=toy_stream(evaluate="all"))._step_scores} == {2}
    hidden = toy_stream(scenario=Online(ClassIncremental(n_tasks=2)), epochs_per_task=1)
    assert curves(tmp_path, 1, stream=hidden)._steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_goes_on_after_a_resume(accumulate: int, tmp_path: Path) -> None:
    """No evaluation is lost or made twice, from any checkpoint."""

    def fit(root: Path, ckpt_path: Path | None = None) -> ContinualMetrics:
        metrics = ContinualMetrics(directory=root)
        saver = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [ContinualEvaluation(2), metrics, saver]
        fit_stream(root, callbacks, ckpt_path=ckpt_path, accumulate_grad_batches=accumulate)
        return metrics

    straight = fit(tmp_path)
    paths = sorted(tmp_path.glob("step=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    assert len(paths) == {1: 12, 2: 8}[accumulate]
    for path in paths[:-1]:
        resumed = fit(tmp_path / path.stem, path)
        assert (resumed._steps, resumed._step_scores) == (straight._steps, straight._step_scores)


def test_plain_loaders(tmp_path: Path) -> None:
    """One fit for each task: the steps count on."""
    metrics, module = ContinualMetrics(directory=tmp_path), ToyModule()
    for loader in toy_loaders():
        trainer(tmp_path, [ContinualEvaluation(2), metrics], max_epochs=1).fit(module, loader, loader)
    assert metrics._steps == [2, 3, 5, 6]
    assert metrics._step_tasks == [0, 0, 1, 1]


def test_refuses_no_steps() -> None:
    """The setting is named."""
    with pytest.raises(ValueError, match="`every_n_steps` must be above 0, got 0"):
        ContinualEvaluation(0)
