"""When tasks start and end, over streams and over plain fits, and who is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forgetting import Serves, forgetting_stream
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_cl import EWC, ContinualCallback, ContinualMetrics, ExperienceReplay, Task, TaskStreamDataModule
from lightning_cl.core.events import TaskEvents
from lightning_cl.datamodules import ClassIncremental, Online, TaskIncremental
from toys import ToyModule, fit_stream, toy_loaders, toy_stream, trainer, weights


class Diary(ContinualCallback):
    """Writes down events, batches and evaluations in the order in which they come."""

    needs_state = False

    def __init__(self, boundaries: str = "required") -> None:
        self.boundaries = boundaries  # type: ignore[misc]
        self.lines: list[str] = []
        self.tasks: list[Task] = []
        self.steps: list[int] = []

    def on_task_start(self, trainer: Any, pl_module: Any, task: Task) -> None:
        self.lines.append(f"start {task.index}")

    def on_task_end(self, trainer: Any, pl_module: Any, task: Task) -> None:
        self.lines.append(f"end {task.index}")
        self.tasks.append(task)
        self.steps.append(trainer.global_step)

    def on_train_batch_start(self, *_: Any) -> None:
        if not self.lines or self.lines[-1] != "train":
            self.lines.append("train")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.lines.append("sanity check" if trainer.sanity_checking else "validate")

    @property
    def events(self) -> list[str]:
        return [line for line in self.lines if line.startswith(("start", "end"))]


def saver(directory: Path) -> ModelCheckpoint:
    """A checkpoint at every step."""
    return ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def fit_plain(root: Path, callbacks: list[Callback], task: int = 0, module: Any = None, **settings: Any) -> Any:
    """One fit over the loader of one task; return the Trainer."""
    loader = toy_loaders()[task]
    fit = trainer(root, callbacks, **({"max_epochs": 1} | settings))
    fit.fit(module or ToyModule(), loader, loader)
    return fit


# ---------------------------------------------------------------------- order and counts


def test_events_of_a_stream(tmp_path: Path) -> None:
    """A task ends after its last step and before the validation that follows; the epochs between are silent."""
    diary = Diary()
    fit_stream(tmp_path, [diary])
    task = ["start {0}", "train", "end {0}", "validate"]
    expected = ["sanity check", *(line.format(index) for index in (0, 1) for line in task)]
    assert [line for line in diary.lines if line in expected] == expected
    assert diary.events == ["start 0", "end 0", "start 1", "end 1"]
    assert diary.steps == [6, 12]
    assert diary.completed_tasks == 2
    assert [task.classes for task in diary.tasks] == [(0, 1), (2, 3)]
    assert [task.num_tasks for task in diary.tasks] == [2, 2]


def test_a_method_counts_the_tasks_of_its_kinds(tmp_path: Path) -> None:
    """One that learns counts no request, one of requests nothing else, one that watches both."""
    diary, ewc, serves = Diary(), EWC(1.0), Serves()
    diary_of_all = type("All", (Diary,), {"acts_on": ("learn", "forget")})()
    fit_stream(tmp_path, [diary, ewc, serves, diary_of_all], stream=forgetting_stream())
    assert [c.completed_tasks for c in (diary, ewc, serves, diary_of_all)] == [4, 4, 1, 5]


def test_uneven_tasks(tmp_path: Path) -> None:
    """With another number of epochs each."""
    diary = Diary()
    fit_stream(tmp_path, [diary], stream=toy_stream(epochs_per_task=[1, 3]))
    assert diary.events == ["start 0", "end 0", "start 1", "end 1"]
    assert diary.steps == [3, 12]


def test_events_of_plain_fits(tmp_path: Path) -> None:
    """Each fit is one task, numbered on over fresh Trainers by the callback itself."""
    diary = Diary()
    for task in (0, 1):
        fit_plain(tmp_path, [diary], task, max_epochs=2, num_sanity_val_steps=0)
    assert diary.lines == [
        *("start 0", "train", "validate", "train", "end 0", "validate"),
        *("start 1", "train", "validate", "train", "end 1", "validate"),
    ]
    assert [str(task) for task in diary.tasks] == ["task 1 (fit 1)", "task 2 (fit 2)"]
    assert diary.completed_tasks == 2


def test_callbacks_hear_in_the_order_of_the_trainer_and_before_checkpoints(tmp_path: Path) -> None:
    """The checkpoint of a task's last step holds what the callbacks learned at its end."""
    order: list[str] = []

    class Named(ContinualCallback):
        def __init__(self, name: str) -> None:
            self.name = name

        @property
        def state_key(self) -> str:
            return self.name

        def on_task_end(self, *_: Any) -> None:
            order.append(self.name)

        def state_dict(self) -> dict[str, Any]:
            order.append(f"save {self.name}")
            return {}

    every_task = ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1)
    fit_stream(tmp_path, [every_task, Named("a"), Named("b")])
    assert order == ["a", "b", "save a", "save b"] * 2


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_epochs": -1, "max_steps": 2}, 2),
        ({"max_epochs": -1, "max_steps": 3}, 3),
        ({"max_epochs": -1, "max_steps": 4}, 4),
        ({"max_epochs": 5, "max_steps": 3}, 3),
        ({"max_epochs": 2, "limit_train_batches": 2}, 4),
        ({"max_epochs": 1, "accumulate_grad_batches": 2}, 2),
        ({"max_epochs": 1, "accumulate_grad_batches": 10}, 1),
        ({"max_epochs": 1, "val_check_interval": 2}, 3),
    ],
    ids=str,
)
def test_a_fit_may_end_anywhere(settings: dict[str, Any], steps: int, tmp_path: Path) -> None:
    """The task ends once, after the last optimizer step."""
    diary = Diary()
    fit = fit_plain(tmp_path, [diary], **settings)
    assert diary.events == ["start 0", "end 0"]
    assert diary.steps == [steps] == [fit.global_step]


def test_a_limit_of_steps_ends_the_task_before_the_validation_that_follows(tmp_path: Path) -> None:
    """In the middle of an epoch, where Lightning's own schedule has an evaluation."""
    diary = Diary()
    fit_plain(tmp_path, [diary], max_epochs=-1, max_steps=2, val_check_interval=2)
    assert diary.lines[-3:] == ["train", "end 0", "validate"]


def test_early_stopping_ends_the_task_of_a_plain_fit(tmp_path: Path) -> None:
    """Nobody knows before the validation, so the task ends after it, once."""
    diary = Diary()
    fit_plain(tmp_path, [diary, EarlyStopping("val_acc", patience=0)], max_epochs=50)
    assert diary.lines[-2:] == ["validate", "end 0"]
    assert diary.events == ["start 0", "end 0"]


def test_early_stopping_is_refused_on_a_stream(tmp_path: Path) -> None:
    """It would end the stream at the first task that no longer improves."""
    with pytest.raises(ValueError, match=r"`EarlyStopping` would end the whole stream"):
        fit_stream(tmp_path, [Diary(), EarlyStopping("val_acc")])


def test_a_stream_counts_steps_of_the_optimizer(tmp_path: Path) -> None:
    """Under accumulation and with a limit of batches, too."""
    diary = Diary()
    fit_stream(tmp_path, [diary], accumulate_grad_batches=2, limit_train_batches=3)
    assert diary.steps == [4, 8]


def test_a_stream_that_is_stopped_has_not_ended_its_task(tmp_path: Path) -> None:
    """`max_steps` inside the second task: a resumed run goes on with it, and ends it once."""
    diary, later = Diary(), Diary()
    fit_stream(tmp_path, [diary, saver(tmp_path)], max_steps=8)
    assert diary.events == ["start 0", "end 0", "start 1"]
    fit_stream(tmp_path, [later, saver(tmp_path / "later")], ckpt_path=tmp_path / "step=8.ckpt")
    assert later.events == ["end 1"]
    assert later.completed_tasks == 2


def test_a_skipped_rest_of_an_epoch_ends_the_task(tmp_path: Path) -> None:
    """Lightning calls no hook after the last batch when a module's `on_train_batch_start` returns -1."""

    class Skipping(ToyModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 1 else None

    diary = Diary()
    fit_stream(tmp_path, [diary], module=Skipping())
    assert diary.events == ["start 0", "end 0", "start 1", "end 1"]
    diary = Diary()
    fit_plain(tmp_path, [diary], module=Skipping(), max_epochs=2)
    assert diary.events == ["start 0", "end 0"]


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield torch.zeros(6), torch.tensor(0)


def test_loaders_without_length(tmp_path: Path) -> None:
    """An endless stream of samples with `max_steps` is one task, also for a method that reads its data again."""
    diary, ewc = Diary(), EWC(1.0)
    fit = trainer(tmp_path, [diary, ewc], max_steps=3, limit_val_batches=0)
    fit.fit(ToyModule(), DataLoader(Endless(), batch_size=2), toy_loaders()[0])
    assert diary.events == ["start 0", "end 0"]
    assert diary.steps == [3]
    assert ewc.completed_tasks == 1


# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    ("step", "events"),
    [
        (2, ["end 0", "start 1", "end 1"]),
        (3, ["end 0", "start 1", "end 1"]),
        (6, ["start 1", "end 1"]),
        (7, ["end 1"]),
        (12, []),
    ],
)
def test_events_are_not_repeated_on_resume(step: int, events: list[str], tmp_path: Path) -> None:
    """From a checkpoint inside a task, at the end of its epoch, at a boundary, and at the end of the stream."""
    diary = Diary()
    fit_stream(tmp_path, [Diary(), saver(tmp_path)])
    fit_stream(tmp_path, [diary, saver(tmp_path / "later")], ckpt_path=tmp_path / f"step={step}.ckpt")
    assert diary.events == events
    assert all(task.num_tasks == 2 and task.classes for task in diary.tasks)


def test_plain_fits_go_on_from_checkpoints(tmp_path: Path) -> None:
    """The number of tasks is in the checkpoint; a fit that was interrupted goes on with its own task."""
    diaries = [Diary() for _ in range(3)]
    first, second = toy_loaders()
    fit = trainer(tmp_path, [diaries[0], saver(tmp_path)], max_epochs=1)
    fit.fit(ToyModule(), first, first)
    fit = trainer(tmp_path, [diaries[1], saver(tmp_path)], max_epochs=3)
    fit.fit(ToyModule(), second, second, ckpt_path=tmp_path / "step=3.ckpt")
    assert diaries[1].events == ["start 1", "end 1"]
    assert diaries[1].steps == [9]
    fit = trainer(tmp_path, [diaries[2], saver(tmp_path)], max_epochs=3)
    fit.fit(ToyModule(), second, second, ckpt_path=tmp_path / "step=6.ckpt")
    assert diaries[2].events == ["end 1"]
    assert diaries[2].tasks[0].name == "fit 2"


def test_a_plain_loader_goes_on_with_its_order(tmp_path: Path) -> None:
    """Shuffled by the global generator, which a checkpoint of Lightning alone does not hold; with dropout."""
    data = toy_loaders()[0].dataset

    def fit(callbacks: list[Any], ckpt_path: Path | None = None) -> Tensor:
        module, shuffled = ToyModule(dropout=0.3), DataLoader(data, batch_size=8, shuffle=True)
        job = trainer(tmp_path, [Diary(), *callbacks], max_epochs=3)
        job.fit(module, shuffled, toy_loaders()[0], ckpt_path=ckpt_path)
        return weights(module)

    straight = fit([saver(tmp_path)])
    torch.manual_seed(1234)
    assert torch.equal(fit([saver(tmp_path / "on")], tmp_path / "step=3.ckpt"), straight)


def test_a_checkpoint_counts_more_than_the_object(tmp_path: Path) -> None:
    """An object that has learned already and resumes from an earlier point is at that point."""
    diary = Diary()
    fit_stream(tmp_path, [diary, saver(tmp_path)])
    assert diary.completed_tasks == 2
    diary.lines.clear()
    fit_stream(tmp_path, [diary, saver(tmp_path / "later")], ckpt_path=tmp_path / "step=7.ckpt")
    assert diary.events == ["end 1"]
    assert diary.completed_tasks == 2


def test_a_fit_that_trains_nothing_warns(tmp_path: Path) -> None:
    """Lightning says nothing when `max_epochs` is reached before the second fit begins."""
    loader, module = toy_loaders()[0], ToyModule()
    fit = trainer(tmp_path, [Diary()], max_epochs=1)
    fit.fit(module, loader, loader)
    with pytest.raises(UserWarning, match=r"trained nothing: `max_epochs=1` was reached before"):
        fit.fit(module, loader, loader)
    streamed, stream = trainer(tmp_path, [Diary()]), toy_stream()
    streamed.fit(module, datamodule=stream)
    with pytest.raises(UserWarning, match="trained nothing: `max_epochs=4`"):
        streamed.fit(module, datamodule=stream)


def test_a_raised_limit_makes_a_second_task(tmp_path: Path) -> None:
    """On the same Trainer, as users do."""
    diary, module = Diary(), ToyModule()
    fit = trainer(tmp_path, [diary], max_epochs=1)
    for limit, loader in enumerate(toy_loaders(), start=1):
        fit.fit_loop.max_epochs = limit
        fit.fit(module, loader, loader)
    assert diary.events == ["start 0", "end 0", "start 1", "end 1"]


# ---------------------------------------------------------------------- who is told


class ToldModule(ToyModule):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, Task]] = []

    def on_task_start(self, task: Task) -> None:
        self.told.append(("start", task))

    def on_task_end(self, task: Task) -> None:
        self.told.append(("end", task))


class ToldData(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, Task]] = []

    def on_task_start(self, task: Task) -> None:
        self.told.append(("start", task))

    def on_task_end(self, task: Task) -> None:
        self.told.append(("end", task))

    def train_dataloader(self) -> Any:
        return toy_loaders()[0]

    def val_dataloader(self) -> Any:
        return toy_loaders()[0]


def test_modules_and_datamodules_are_told(tmp_path: Path) -> None:
    """Those that define the hooks, with the task alone, as Lightning's own hooks of modules have no Trainer."""
    module, data = ToldModule(), ToldData()
    trainer(tmp_path, [Diary()], max_epochs=1).fit(module, datamodule=data)
    assert module.told == data.told
    assert [(hook, task.index) for hook, task in module.told] == [("start", 0), ("end", 0)]


def test_modules_are_told_on_a_stream_without_callbacks(tmp_path: Path) -> None:
    """The stream alone brings the events."""
    module = ToldModule()
    fit_stream(tmp_path, [], module=module)
    assert [(hook, task.index) for hook, task in module.told] == [("start", 0), ("end", 0), ("start", 1), ("end", 1)]
    assert module.told[1][1].classes == (0, 1)


def test_callbacks_of_a_module_are_told(tmp_path: Path) -> None:
    """Lightning adds what `configure_callbacks` returns when the fit begins."""
    diary = Diary()

    class Bringing(ToyModule):
        def configure_callbacks(self) -> list[Callback]:
            return [diary]

    fit_stream(tmp_path, [], module=Bringing())
    assert diary.events == ["start 0", "end 0", "start 1", "end 1"]


# ---------------------------------------------------------------------- the task of the batch at hand


class KnowingModule(ToyModule):
    """Notes the task that it finds while it trains and evaluates."""

    def __init__(self) -> None:
        super().__init__()
        self.training_tasks: list[int | None] = []
        self.evaluation_tasks: list[tuple[str, int, int | None]] = []

    def _index(self) -> int | None:
        task = getattr(self, "current_task", None)
        return None if task is None else task.index

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.training_tasks.append(self._index())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        stage = "sanity" if self.trainer.sanity_checking else "validate"
        self.evaluation_tasks.append((stage, dataloader_idx, self._index()))

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.evaluation_tasks.append(("test", dataloader_idx, self._index()))


def test_the_task_is_known_in_training_and_in_evaluation(tmp_path: Path) -> None:
    """Under `TaskIncremental` each loader shows its task, and afterwards the module is where it was."""
    module, stream = KnowingModule(), toy_stream(scenario=TaskIncremental(n_tasks=2), epochs_per_task=1)
    fit = trainer(tmp_path, [Diary()])
    fit.fit(module, datamodule=stream)
    assert module.training_tasks == [0] * 3 + [1] * 3
    assert module.evaluation_tasks == [
        ("sanity", 0, 0),
        ("validate", 0, 0),
        ("validate", 0, 0),
        ("validate", 1, 1),
    ]
    assert module.current_task.index == 1
    module.evaluation_tasks.clear()
    fit.test(module, datamodule=stream, verbose=False)
    assert module.evaluation_tasks == [("test", 0, 0), ("test", 1, 1)]
    assert module.current_task.index == 1
    module.current_task = stream.tasks[0]
    trainer(tmp_path).validate(module, datamodule=stream, verbose=False)
    assert module.current_task.index == 0
    trainer(tmp_path).test(module, datamodule=stream, verbose=False)
    assert module.current_task.index == 0


def test_the_task_of_an_evaluation_is_hidden_where_it_must_be(tmp_path: Path) -> None:
    """Class-incremental: the module knows what it learns, not what it is asked."""
    module, stream = KnowingModule(), toy_stream(epochs_per_task=1)
    fit = trainer(tmp_path, [Diary()])
    fit.fit(module, datamodule=stream)
    assert module.evaluation_tasks == [
        ("sanity", 0, None),
        ("validate", 0, 0),
        ("validate", 0, 1),
        ("validate", 1, 1),
    ]
    module.evaluation_tasks.clear()
    for _ in range(2):
        trainer(tmp_path).validate(module, datamodule=toy_stream(), verbose=False)
    assert module.evaluation_tasks == [("validate", 0, 1), ("validate", 1, 1)] * 2


def test_evaluation_after_a_fit_leaves_events_alone(tmp_path: Path) -> None:
    """`test` and `validate` on the same Trainer are no tasks."""
    diary, stream, module = Diary(), toy_stream(), KnowingModule()
    fit = trainer(tmp_path, [diary])
    fit.fit(module, datamodule=stream)
    events = list(diary.events)
    fit.test(module, datamodule=stream, verbose=False)
    fit.validate(module, datamodule=stream, verbose=False)
    assert diary.events == events
    assert diary.completed_tasks == 2


# ---------------------------------------------------------------------- hidden boundaries


def online(**settings: Any) -> TaskStreamDataModule:
    """The toy stream in a single pass that hides its boundaries."""
    return toy_stream(scenario=Online(ClassIncremental(n_tasks=2)), **({"epochs_per_task": 1} | settings))


def test_hidden_boundaries_are_told_to_measurements_only(tmp_path: Path) -> None:
    """Neither to methods nor to the module nor by `current_task`."""

    class Told(ToldModule, KnowingModule):
        pass

    module, method, measurement = Told(), Diary("unused"), Diary("evaluation")
    fit_stream(tmp_path, [method, measurement], module=module, stream=online())
    assert measurement.events == ["start 0", "end 0", "start 1", "end 1"]
    assert method.events == []
    assert module.told == []
    assert module.training_tasks == [None] * 6
    assert {task for _, _, task in module.evaluation_tasks} == {None}


def test_a_checkpoint_of_another_version_is_refused(tmp_path: Path) -> None:
    """With what to do instead."""
    saver = ModelCheckpoint(tmp_path, save_last=True)
    fit_stream(tmp_path, [saver])
    checkpoint = torch.load(saver.last_model_path, weights_only=False)
    checkpoint["lightning_cl"]["version"] = 1
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match=r"version 1, not 2. End the run with the version that began it"):
        fit_stream(tmp_path, [saver], ckpt_path=tmp_path / "old.ckpt")


def test_methods_that_need_boundaries_are_refused(tmp_path: Path) -> None:
    """Before anything runs, with the way out."""
    with pytest.raises(ValueError, match=r"`EWC` needs to know where a task ends.*`ExperienceReplay`"):
        fit_stream(tmp_path, [EWC(1.0)], stream=online())
    with pytest.raises(ValueError, match="`ExperienceReplay` needs to know where a task ends"):
        fit_stream(tmp_path, [ExperienceReplay(8, policy="ring")], stream=online())


def test_replay_and_metrics_work_on_hidden_boundaries(tmp_path: Path) -> None:
    """The single pass fills the memory with both tasks, and the matrix is measured."""
    replay, metrics = ExperienceReplay(40), ContinualMetrics()
    final = fit_stream(tmp_path, [replay, metrics], stream=online())
    assert replay.buffer.total == 40
    assert set(replay.buffer.labels.tolist()) == {0, 1, 2, 3}
    assert metrics.matrix.shape == (2, 2)
    assert metrics.matrix.isfinite()[[0, 1, 1], [0, 0, 1]].all()
    assert not torch.equal(final, fit_stream(tmp_path, [], stream=online()))


# ---------------------------------------------------------------------- attaching


def test_one_object_serves_a_trainer(tmp_path: Path) -> None:
    """Behind all callbacks and before the checkpoints, however many callbacks ask for it."""
    first, second = Diary(), Diary()
    second.boundaries = "evaluation"  # type: ignore[misc]
    fit = trainer(tmp_path, [saver(tmp_path), first, second], max_epochs=1)
    events = TaskEvents.attach(fit)
    assert TaskEvents.attach(fit) is events
    loader = toy_loaders()[0]
    fit.fit(ToyModule(), loader, loader)
    assert [type(callback) for callback in fit.callbacks] == [Diary, Diary, TaskEvents, ModelCheckpoint]
    assert first.events == second.events == ["start 0", "end 0"]


def test_events_change_no_weights(tmp_path: Path) -> None:
    """A callback that only listens leaves the run as it is, to the bit, with dropout."""
    torch.manual_seed(5)
    module = ToyModule(dropout=0.3)
    fit_plain(tmp_path, [], module=module, max_epochs=2)
    torch.manual_seed(5)
    heard = ToyModule(dropout=0.3)
    fit_plain(tmp_path, [Diary()], module=heard, max_epochs=2)
    assert torch.equal(weights(heard), weights(module))


class Remembering(ContinualCallback):
    """Keeps the tensor it is given, and the one that stood in the checkpoint."""

    def __init__(self) -> None:
        self.loaded = self.stood = torch.zeros(3)

    def state_dict(self) -> dict[str, Any]:
        return {"tensor": self.loaded}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.stood = checkpoint["callbacks"]["Remembering"]["tensor"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = state_dict["tensor"]


def test_loaded_state_is_not_copied(tmp_path: Path) -> None:
    """Lightning would double the memory of a large state while it loads."""
    fit_stream(tmp_path, [Remembering(), ModelCheckpoint(tmp_path, filename="saved", save_top_k=1)])
    resumed = Remembering()
    path = tmp_path / "saved.ckpt"
    fit_stream(tmp_path, [resumed, ModelCheckpoint(tmp_path, filename="saved")], ckpt_path=path)
    assert resumed.loaded.data_ptr() == resumed.stood.data_ptr()
