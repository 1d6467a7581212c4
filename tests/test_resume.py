"""A run that is killed and resumed with fresh objects ends with the same bits as the run that was left alone."""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import Subset

from killed import KILLED, assert_same, run, run_and_save
from lightning_cl import EWC, ContinualCallback, TaskStreamDataModule
from lightning_cl.datamodules import ClassIncremental, Predefined
from ranks import exit_codes
from toys import ToyModule, fit_stream, toy_data, toy_stream, trainer

# the hook and the step at which the process dies, and the last checkpoint that it wrote
KILLS = {
    "first task": (("on_train_batch_start", 2), 2),
    "between epochs": (("on_train_batch_start", 3), 3),
    "consolidation of the first task": (("on_task_end", 6), 5),
    "evaluation at a task's end": (("on_validation_end", 6), 6),
    "start of the second task": (("on_task_start", 6), 6),
    "second task": (("on_train_batch_start", 8), 8),
    "consolidation of the second task": (("on_task_end", 12), 11),
}


def elsewhere() -> None:
    """Leave the generators where no checkpoint left them."""
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run that nobody kills, and the folder of its checkpoints."""
    return run(tmp_path_factory.mktemp("straight"))


# ---------------------------------------------------------------------- killed


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("kill", "last"), KILLS.values(), ids=KILLS.keys())
def test_killed_and_resumed(kill: Any, last: int, num_workers: int, straight: dict[str, Any], tmp_path: Path) -> None:
    """With EWC, replay, metrics, dropout and a random augmentation; the checkpoint holds no pickled object."""
    died = exit_codes(functools.partial(run_and_save, tmp_path, num_workers=num_workers, kill=kill))
    assert died == [KILLED]
    steps = [int(path.stem.partition("=")[2]) for path in (tmp_path / "checkpoints").iterdir()]
    assert max(steps) == last
    elsewhere()
    path = tmp_path / "checkpoints" / f"step={last}.ckpt"
    assert_same(run(tmp_path / "resumed", num_workers=num_workers, ckpt_path=path), straight)


def test_the_runs_are_worth_comparing(straight: dict[str, Any]) -> None:
    """There is something in all that is compared."""
    assert len(straight["optimizer"]) == len(straight["fisher"]) == len(straight["anchors"]) == 4
    assert all(bool(value.any()) for value in straight["fisher"].values())
    assert len(straight["replay"]) == 10
    assert straight["evaluated"] == [6, 12]
    assert not straight["matrix"][1].isnan().any()


def test_killed_twice(straight: dict[str, Any], tmp_path: Path) -> None:
    """A resumed run writes checkpoints that are as good."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert exit_codes(functools.partial(run_and_save, first, kill=("on_train_batch_start", 4))) == [KILLED]
    again = functools.partial(run_and_save, second, kill=("on_train_batch_start", 10))
    again.keywords["ckpt_path"] = first / "checkpoints" / "step=4.ckpt"
    assert exit_codes(again) == [KILLED]
    assert_same(run(tmp_path / "third", ckpt_path=second / "checkpoints" / "step=10.ckpt"), straight)


# ---------------------------------------------------------------------- saved at any hook


class SaveEverywhere(ContinualCallback):
    """Writes a checkpoint in every hook, before our own callbacks behind it have heard of it."""

    boundaries = "evaluation"
    needs_state = False
    hooks = (
        "on_task_start",
        "on_task_end",
        "on_train_epoch_start",
        "on_train_batch_start",
        "on_train_batch_end",
        "on_validation_start",
        "on_validation_batch_end",
        "on_validation_end",
        "on_train_epoch_end",
    )

    def __init__(self, root: Path) -> None:
        self.root = root

    def save(self, hook: str, trainer: Any) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.root / f"{hook}-{trainer.global_step}.ckpt")


for _hook in SaveEverywhere.hooks:
    setattr(SaveEverywhere, _hook, lambda self, trainer, *_, hook=_hook: self.save(hook, trainer))


@pytest.fixture(scope="module")
def saved_everywhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of a run from every hook, named by it and the step."""
    root = tmp_path_factory.mktemp("everywhere")
    run(root, extra=[SaveEverywhere(root)])
    return root


@pytest.mark.parametrize("hook", SaveEverywhere.hooks)
def test_saved_in_any_hook(hook: str, saved_everywhere: Path, straight: dict[str, Any], tmp_path: Path) -> None:
    """A checkpoint of the user's own, or one that a signal writes: no step, no task's end, no evaluation is lost."""
    files = [path for path in saved_everywhere.glob(f"{hook}-*.ckpt") if path.stem != "on_train_epoch_end-12"]
    assert len(files) >= 2
    for number, path in enumerate(files):
        elsewhere()
        assert_same(run(tmp_path / str(number), ckpt_path=path), straight)


@pytest.mark.parametrize("settings", [{"monitor": "val_acc", "mode": "max"}, {"every_n_epochs": 1}], ids=str)
def test_saved_by_lightnings_defaults(settings: dict[str, Any], straight: dict[str, Any], tmp_path: Path) -> None:
    """After every epoch, or after every evaluation with a monitor."""

    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / "own", filename="own-{step}", save_top_k=-1, **settings)

    assert_same(run(tmp_path, extra=[saver()]), straight)
    files = [path for path in (tmp_path / "own").iterdir() if path.stem != "own-step=12"]
    assert len(files) == (1 if "monitor" in settings else 3)
    for path in files:
        assert_same(run(tmp_path / path.stem, ckpt_path=path, extra=[saver()]), straight)


@pytest.mark.parametrize(
    ("stream_settings", "trainer_settings"),
    [
        ({}, {"accumulate_grad_batches": 2}),
        ({"evaluate_every_n_epochs": 1}, {}),
        ({"evaluate_every_n_epochs": 1}, {"val_check_interval": 2}),
        ({"epochs_per_task": 1, "steps_per_task": 5}, {}),
        ({"epochs_per_task": [1, 3], "evaluate": "all"}, {}),
        ({"optimizer_policy": "reset_state"}, {}),
        ({"optimizer_policy": "rebuild"}, {}),
        ({}, {"limit_train_batches": 2}),
    ],
    ids=str,
)
def test_other_settings_resume_at_every_step(stream_settings: Any, trainer_settings: Any, tmp_path: Path) -> None:
    """Each of their checkpoints, in both tasks."""
    settings = {"stream_settings": stream_settings, **trainer_settings}
    expected = run(tmp_path, **settings)
    files = sorted((tmp_path / "checkpoints").iterdir())
    assert len(files) >= 8
    for path in files[:-1]:
        elsewhere()
        assert_same(run(tmp_path / path.stem, ckpt_path=path, **settings), expected)


def test_a_longer_task_after_a_short_one(tmp_path: Path) -> None:
    """Saved at the last step of a task of two batches, a run makes all five of the next, not the last three."""
    data = toy_data()

    def fit(folder: str, ckpt_path: Path | None = None) -> Tensor:
        parts = [Subset(data, range(12)), Subset(data, range(12, 48))]
        stream = TaskStreamDataModule(parts, [data, data], scenario=Predefined(), batch_size=8)
        saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        return fit_stream(tmp_path / folder, [saver, EWC(1.0)], stream=stream, ckpt_path=ckpt_path)

    expected = fit("straight")
    for step in range(1, 7):
        assert torch.equal(fit(str(step), tmp_path / "saved" / f"step={step}.ckpt"), expected)


# ---------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"epochs_per_task": 3},
        {"epochs_per_task": 1, "steps_per_task": 6},
        {"scenario": ClassIncremental(n_tasks=2, order=[0, 2, 1, 3])},
        {"train": toy_data(56)},
    ],
    ids=["seed", "epochs", "steps", "order", "data"],
)
def test_another_stream_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    """It would go on in the middle of other samples."""

    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    fit_stream(tmp_path, [saver()])
    path = tmp_path / "step=4.ckpt"
    settings = {"train": toy_data(), "scenario": ClassIncremental(n_tasks=2), "epochs_per_task": 2, **other}
    stream = TaskStreamDataModule(val=toy_data(16, seed=1), batch_size=8, **settings)
    with pytest.raises(ValueError, match=r"checkpoint is of another stream.*`seed`"):
        fit_stream(tmp_path, [saver()], stream=stream, ckpt_path=path)


def test_another_stream_may_be_tested(tmp_path: Path) -> None:
    """Only a fit goes on where a checkpoint stopped."""

    class Tested(ToyModule):
        def test_step(self, batch: Any) -> None:
            self.log("test_acc", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    module, first = Tested(), trainer(tmp_path)
    first.fit(module, datamodule=toy_stream())
    first.save_checkpoint(tmp_path / "last.ckpt")
    fresh, other = Tested(seed=8), toy_stream(seed=5, scenario=ClassIncremental(n_tasks=4))
    results = trainer(tmp_path).test(fresh, datamodule=other, ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert len(results) == 4
    assert torch.equal(fresh.model[0].weight, module.model[0].weight)
