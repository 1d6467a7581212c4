"""One fit runs the whole stream: what is trained, when tasks start and end, and what is evaluated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import TensorDataset

from lightning_cl import ContinualCallback, TaskStreamDataModule
from lightning_cl.datamodules import ClassIncremental, DataIncremental, Joint, Online, Recurring, TaskIncremental
from lightning_cl.datamodules.samplers import TaskSampler
from toys import ToyModule, fit_stream, toy_data, toy_stream, trainer, weights


class Diary(ContinualCallback):
    """Writes down what happens, and at which optimizer step."""

    boundaries = "evaluation"
    needs_state = False

    def __init__(self):
        self.entries = []

    def on_task_start(self, trainer, pl_module, task):
        self.entries.append(("start", task.index, trainer.global_step))

    def on_task_end(self, trainer, pl_module, task):
        self.entries.append(("end", task.index, trainer.global_step))

    def on_validation_start(self, trainer, pl_module):
        if not trainer.sanity_checking:
            evaluated = [task.index for task in trainer.datamodule.evaluated_tasks()]
            self.entries.append(("evaluate", evaluated, trainer.global_step))

    def of(self, kind):
        """The entries of a kind, without it."""
        return [entry[1:] for entry in self.entries if entry[0] == kind]


def diary(tmp_path, **settings):
    """The diary of a fit over a toy stream: two tasks of three steps an epoch."""
    callback = Diary()
    options = {key: settings.pop(key) for key in list(settings) if key in TRAINER_OPTIONS}
    fit_stream(tmp_path, [callback], stream=toy_stream(**settings), **options)
    return callback


TRAINER_OPTIONS = (
    "val_check_interval",
    "num_sanity_val_steps",
    "accumulate_grad_batches",
    "max_epochs",
    "limit_val_batches",
)


# ---------------------------------------------------------------------- tasks in time


def test_tasks_start_train_end_and_are_evaluated_in_this_order(tmp_path):
    """A task ends after its last step and before the evaluation that follows."""
    assert diary(tmp_path).entries == [
        ("start", 0, 0),
        ("end", 0, 6),
        ("evaluate", [0], 6),
        ("start", 1, 6),
        ("end", 1, 12),
        ("evaluate", [0, 1], 12),
    ]


@pytest.mark.parametrize("max_epochs", [-1, 1, 50])
def test_the_stream_sets_its_own_length(max_epochs, tmp_path):
    """Whatever ``max_epochs`` says."""
    assert diary(tmp_path, max_epochs=max_epochs).of("end") == [(0, 6), (1, 12)]


def test_each_task_may_have_its_own_number_of_epochs(tmp_path):
    """Three steps in the first task, nine in the second."""
    assert diary(tmp_path, epochs_per_task=[1, 3]).of("end") == [(0, 3), (1, 12)]


@pytest.mark.parametrize("steps", [2, 3, 5, 7])
def test_tasks_of_a_number_of_steps(steps, tmp_path):
    """Shorter than a pass over the task, as long, longer."""
    made = diary(tmp_path, epochs_per_task=1, steps_per_task=steps)
    assert made.of("end") == [(0, steps), (1, 2 * steps)]
    assert made.of("evaluate") == [([0], steps), ([0, 1], 2 * steps)]


def test_uneven_tasks(tmp_path):
    """Three classes in two tasks: 32 and 16 samples, so four and two steps an epoch."""
    inputs, labels = toy_data(48, classes=3).tensors
    stream = TaskStreamDataModule(
        (inputs, labels), scenario=ClassIncremental(n_tasks=2), batch_size=8, epochs_per_task=2
    )
    callback = Diary()
    fit_stream(tmp_path, [callback], stream=stream)
    assert callback.of("end") == [(0, 8), (1, 12)]


def test_accumulation_steps_at_the_end_of_a_task(tmp_path):
    """Three batches by two: two steps an epoch, none of which mixes tasks."""
    assert diary(tmp_path, accumulate_grad_batches=2).of("end") == [(0, 4), (1, 8)]


def test_module_and_datamodule_hear_of_tasks(tmp_path):
    """A LightningModule that defines the hooks is called as well."""

    class Listener(ToyModule):
        heard = ()

        def on_task_start(self, task):
            self.heard += (f"start {task.name}",)

        def on_task_end(self, task):
            self.heard += (f"end {task.name}",)

    module = Listener()
    fit_stream(tmp_path, module=module)
    assert module.heard == ("start classes 0-1", "end classes 0-1", "start classes 2-3", "end classes 2-3")


def test_a_plain_module_trains_like_a_loop_over_the_tasks(tmp_path):
    """Without callbacks the stream is fine-tuning, in the order that the sampler says."""
    inputs, labels = toy_data().tensors
    module = ToyModule()
    optimizer = module.configure_optimizers()
    for task, classes in enumerate(([0, 1], [2, 3])):
        sampler = TaskSampler(np.flatnonzero(np.isin(labels, classes)), task=task, batch_size=8, seed=0)
        for epoch in range(2):
            sampler.set_position(epoch=epoch)
            for index in sampler:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(module.model(inputs[index.rows]), labels[index.rows]).backward()
                optimizer.step()
    assert torch.equal(fit_stream(tmp_path), weights(module))


def test_hidden_boundaries_are_told_to_those_who_measure_only(tmp_path):
    """``Online`` makes one pass and tells neither the module nor a method when a task ends."""

    class Method(Diary):
        boundaries = "unused"

    class Listener(ToyModule):
        def on_task_start(self, task):
            raise AssertionError("the module must not be told")

    method, measure = Method(), Diary()
    stream = toy_stream(scenario=Online(ClassIncremental(n_tasks=2)), epochs_per_task=1)
    fit_stream(tmp_path, [method, measure], stream=stream, module=Listener())
    assert method.of("end") == []
    assert measure.of("end") == [(0, 3), (1, 6)]


# ---------------------------------------------------------------------- evaluation


@pytest.mark.parametrize(
    ("evaluate", "expected"),
    [
        ("seen", [([0], 6), ([0, 1], 12)]),
        ("all", [([0, 1], 6), ([0, 1], 12)]),
        ("current", [([0], 6), ([1], 12)]),
    ],
)
def test_what_is_evaluated(evaluate, expected, tmp_path):
    """At a task's end, one loader per task."""
    assert diary(tmp_path, evaluate=evaluate).of("evaluate") == expected


def test_evaluation_within_tasks(tmp_path):
    """Every second of three epochs, and at the end, each task counted by itself."""
    made = diary(tmp_path, epochs_per_task=3, evaluate_every_n_epochs=2)
    assert made.of("evaluate") == [([0], 6), ([0], 9), ([0, 1], 15), ([0, 1], 18)]


def test_lightning_may_evaluate_within_an_epoch(tmp_path):
    """``val_check_interval`` acts in the epochs that are evaluated."""
    made = diary(tmp_path, batch_size=4, epochs_per_task=1, val_check_interval=0.5)
    assert made.of("evaluate") == [([0], 3), ([0], 6), ([0, 1], 9), ([0, 1], 12)]


def test_recurring_tasks_share_their_evaluation(tmp_path):
    """Visits of two tasks: two loaders at most."""
    scenario = Recurring(ClassIncremental(n_tasks=2), n_visits=4)
    made = diary(tmp_path, scenario=scenario, epochs_per_task=1)
    assert made.of("end") == [(0, 3), (1, 6), (2, 9), (3, 12)]
    assert made.of("evaluate") == [([0], 3), ([0, 1], 6), ([0, 1], 9), ([0, 1], 12)]


def test_a_joint_run_is_one_task_evaluated_by_all(tmp_path):
    """Six steps an epoch over all classes, two loaders."""
    made = diary(tmp_path, scenario=Joint(ClassIncremental(n_tasks=2)), epochs_per_task=1)
    assert made.entries == [("start", 0, 0), ("end", 0, 6), ("evaluate", [0, 1], 6)]


def test_without_validation_data(tmp_path):
    """Nothing is evaluated and nothing is said."""
    callback = Diary()
    stream = TaskStreamDataModule(toy_data(), scenario=ClassIncremental(n_tasks=2), batch_size=8)
    fit_stream(tmp_path, [callback], stream=stream)
    assert callback.of("evaluate") == []
    assert callback.of("end") == [(0, 3), (1, 6)]


def test_sanity_check_leaves_no_trace(tmp_path):
    """The loaders of the check are not those of the first epoch, and the weights do not change."""
    module = ToyModule(dropout=0.5)
    torch.manual_seed(1)
    with_check = fit_stream(tmp_path, module=module, num_sanity_val_steps=2)
    torch.manual_seed(1)
    without = fit_stream(tmp_path, module=ToyModule(dropout=0.5), num_sanity_val_steps=0)
    assert torch.equal(with_check, without)
    assert diary(tmp_path, num_sanity_val_steps=2, evaluate="all").of("evaluate")[0] == ([0, 1], 6)


def test_a_limit_of_validation_batches(tmp_path):
    """One batch of each task."""

    class Counter(Callback):
        batches = 0

        def on_validation_batch_end(self, *_, **__):
            self.batches += 1

    counter = Counter()
    fit_stream(tmp_path, [counter], stream=toy_stream(batch_size=2), limit_val_batches=1, num_sanity_val_steps=0)
    assert counter.batches == 1 + 2


def test_test_and_validate_outside_of_a_fit(tmp_path):
    """All tasks, a loader each, with a ``test_step`` that knows no loaders."""

    class Tested(ToyModule):
        def test_step(self, batch):
            self.log("test_acc", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    module = Tested()
    plain = trainer(tmp_path)
    tested = plain.test(module, datamodule=toy_stream(), verbose=False)
    assert [set(result) for result in tested] == [{"test_acc/dataloader_idx_0"}, {"test_acc/dataloader_idx_1"}]
    validated = plain.validate(module, datamodule=toy_stream(), verbose=False)
    assert [set(result) for result in validated] == [{"val_acc/dataloader_idx_0"}, {"val_acc/dataloader_idx_1"}]
    assert "test_step" not in module.__dict__
    assert "validation_step" not in module.__dict__


def test_prediction_reads_the_test_set(tmp_path):
    """In its order."""

    class Predicting(ToyModule):
        def predict_step(self, batch):
            return batch[1]

    predicted = trainer(tmp_path).predict(Predicting(), datamodule=toy_stream())
    assert torch.equal(torch.cat(predicted), toy_data(16, seed=2).tensors[1])


def test_the_task_of_a_batch_is_known_in_task_incremental_streams(tmp_path):
    """In training, in each evaluation loader, and in training again."""

    class Knowing(ToyModule):
        wrong = 0

        def training_step(self, batch, batch_idx):
            self.wrong += not set(batch[1].tolist()) <= set(self.current_task.classes)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.wrong += not set(batch[1].tolist()) <= set(self.current_task.classes)
            super().validation_step(batch, batch_idx)

        def test_step(self, batch, batch_idx):
            self.wrong += not set(batch[1].tolist()) <= set(self.current_task.classes)

    stream = toy_stream(scenario=TaskIncremental(n_tasks=2), evaluate="all", evaluate_every_n_epochs=1)
    module, plain = Knowing(), trainer(tmp_path)
    plain.fit(module, datamodule=stream)
    plain.test(module, datamodule=stream, verbose=False)
    assert module.wrong == 0


# ---------------------------------------------------------------------- monitors


def test_a_checkpoint_finds_its_monitor_after_every_task(tmp_path):
    """With one loader and with two, by the name that the module logs; it is saved when the score is fresh."""
    saver = ModelCheckpoint(tmp_path, monitor="val_acc", mode="max", save_top_k=-1, filename="{step}-{val_acc:.3f}")
    scores = {}

    class Reader(Callback):
        def on_validation_end(self, trainer, pl_module):
            scores[trainer.global_step] = {name: float(value) for name, value in trainer.callback_metrics.items()}

    fit_stream(tmp_path, [Reader(), saver], module=ToyModule(seed=3))
    second = scores[12]
    mean = (second["val_acc/dataloader_idx_0"] + second["val_acc/dataloader_idx_1"]) / 2
    assert second["val_acc"] == pytest.approx(mean)
    assert second["val_acc"] != second["val_acc/dataloader_idx_1"]
    expected = [f"step={step}-val_acc={score['val_acc']:.3f}.ckpt" for step, score in scores.items() if step]
    assert sorted(path.name for path in tmp_path.glob("step=*")) == sorted(expected)
    assert saver.best_model_score == max(scores[6]["val_acc"], second["val_acc"])


def test_a_plateau_schedule_finds_its_monitor(tmp_path):
    """It steps once per evaluation, by the mean over the tasks."""

    class Scheduled(ToyModule):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=0)
            self.schedule = schedule
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_acc"}}

    module = Scheduled()
    fit_stream(tmp_path, module=module, stream=toy_stream(epochs_per_task=1))
    assert module.schedule.last_epoch == 2


def test_early_stopping_would_end_the_stream(tmp_path):
    """Refused at the start, but for a stream of one task."""
    with pytest.raises(ValueError, match=r"EarlyStopping` would end the whole stream.*`epochs_per_task`"):
        fit_stream(tmp_path, [EarlyStopping("val_acc", mode="max")])
    joint = toy_stream(scenario=Joint(ClassIncremental(n_tasks=2)), evaluate_every_n_epochs=1, epochs_per_task=9)
    fit_stream(tmp_path, [EarlyStopping("val_acc", mode="max", patience=1)], stream=joint)


# ---------------------------------------------------------------------- other fits


def test_a_second_fit_starts_from_the_beginning(tmp_path):
    """A datamodule that was resumed in the middle keeps nothing of it for the next run."""

    def saver():
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    straight = fit_stream(tmp_path, [saver()])
    stream = toy_stream()
    resumed = fit_stream(tmp_path, [saver()], stream=stream, ckpt_path=tmp_path / "step=4.ckpt")
    assert torch.equal(resumed, straight)
    assert torch.equal(fit_stream(tmp_path, [Diary()], stream=stream), straight)


def test_data_incremental_streams_need_no_labels(tmp_path):
    """Regression, say."""

    class Regression(ToyModule):
        def training_step(self, batch):
            return self(batch[0]).square().mean()

    stream = TaskStreamDataModule(
        TensorDataset(torch.randn(20, 6), torch.randn(20)), scenario=DataIncremental(n_tasks=2), batch_size=5
    )
    callback = Diary()
    fit_stream(tmp_path, [callback], stream=stream, module=Regression())
    assert callback.of("end") == [(0, 2), (1, 4)]
