"""The accuracy matrix of real fits, against accuracies that a plain loop measures."""

from __future__ import annotations

import functools
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_cl import EWC, ContinualMetrics, ExperienceReplay, TaskStreamDataModule
from lightning_cl.datamodules import ClassIncremental, Joint, Online, Recurring
from lightning_cl.datamodules.samplers import TaskSampler
from lightning_cl.metrics import functional
from ranks import exit_codes
from toys import ToyModule, fit_stream, toy_data, toy_loaders, toy_stream, trainer, trainer_yaml

TASKS = ([0, 1], [2, 3])
NAN = float("nan")


def accuracies(module: ToyModule) -> list[float]:
    """The accuracy on the validation samples of each task."""
    inputs, labels = toy_data(16, seed=1).tensors
    right = (module.model(inputs).argmax(-1) == labels).double()
    return [float(right[torch.isin(labels, torch.tensor(classes))].mean()) for classes in TASKS]


@functools.cache
def plain_loop() -> tuple[list[float], ...]:
    """Accuracies before the stream and after each task, without Lightning."""
    inputs, labels = toy_data().tensors
    module = ToyModule()
    optimizer, rows = module.configure_optimizers(), [accuracies(module)]
    for task, classes in enumerate(TASKS):
        sampler = TaskSampler(np.flatnonzero(np.isin(labels, classes)), task=task, batch_size=8, seed=0)
        for epoch in range(2):
            sampler.set_position(epoch=epoch)
            for index in sampler:
                optimizer.zero_grad()
                cross_entropy(module.model(inputs[index.rows]), labels[index.rows]).backward()
                optimizer.step()
        rows.append(accuracies(module))
    return tuple(rows)


def measured(root: Path, module: LightningModule | None = None, **settings: Any) -> ContinualMetrics:
    """The metrics of a fit over a toy stream."""
    options = {key: settings.pop(key) for key in ("baseline", "further", "joint", "mode", "monitor") if key in settings}
    metrics = ContinualMetrics(directory=root / "record", **options)
    fit_stream(root, [metrics], module=module, stream=toy_stream(**settings))
    return metrics


def assert_rows(matrix: Tensor, *rows: list[float]) -> None:
    """The matrix holds these rows, NaN where it was not evaluated."""
    torch.testing.assert_close(matrix, torch.tensor(rows, dtype=torch.float64), equal_nan=True, rtol=0, atol=1e-6)


# ---------------------------------------------------------------------- modules as users write them


class WithIndex(ToyModule):
    """A ``validation_step`` that knows of loaders."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


class WithoutIndices(ToyModule):
    """A ``validation_step`` of a batch alone."""

    def validation_step(self, batch: Any) -> None:
        super().validation_step(batch, 0)


class WithMetricObject(ToyModule):
    """One torchmetrics object, as in Lightning's own examples."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(num_classes=4, average="micro")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.accuracy(self(batch[0]), batch[1])
        self.log("val_acc", self.accuracy)


class WithMetricObjects(ToyModule):
    """A torchmetrics object for each loader."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracies = nn.ModuleList(MulticlassAccuracy(num_classes=4, average="micro") for _ in TASKS)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.accuracies[dataloader_idx](self(batch[0]), batch[1])
        self.log("val_acc", self.accuracies[dataloader_idx])


class WithSteps(ToyModule):
    """Logs by step and by epoch."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        accuracy = (self(batch[0]).argmax(-1) == batch[1]).float().mean()
        self.log("val_acc", accuracy, on_step=True, on_epoch=True, batch_size=len(batch[1]))


EVERY_KIND = pytest.mark.parametrize(
    "kind", [ToyModule, WithIndex, WithoutIndices, WithMetricObject, WithMetricObjects, WithSteps]
)


@EVERY_KIND
def test_the_matrix_of_a_plain_loop(kind: type[ToyModule], tmp_path: Path) -> None:
    """Whatever the ``validation_step`` looks like."""
    metrics = measured(tmp_path, kind(), evaluate="all")
    assert_rows(metrics.matrix, *plain_loop()[1:])


@EVERY_KIND
def test_scores_are_means_over_samples(kind: type[ToyModule], tmp_path: Path) -> None:
    """Eight samples in batches of three, three and two."""
    module = kind()
    metrics = measured(tmp_path, module, batch_size=3, epochs_per_task=1)
    assert_rows(metrics.matrix[1:], accuracies(module))


def test_a_metric_object_for_all_loaders_needs_a_reset(tmp_path: Path) -> None:
    """A module that takes the loader's index and ignores it would count the tasks together."""

    class Shared(WithMetricObject):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    with pytest.raises(ValueError, match=r"logs 'val_acc' by one torchmetrics object for all loaders.*dataloader_idx"):
        measured(tmp_path, Shared(), evaluate="all")


# ---------------------------------------------------------------------- what is evaluated


def test_seen_tasks(tmp_path: Path) -> None:
    """The future is not evaluated; the summary is that of the matrix."""
    metrics = measured(tmp_path)
    _, first, second = plain_loop()
    assert_rows(metrics.matrix, [first[0], NAN], second)
    summary = metrics.compute()
    assert summary["average_accuracy"] == pytest.approx(sum(second) / 2)
    assert summary["average_incremental_accuracy"] == pytest.approx((first[0] + sum(second) / 2) / 2)
    assert summary["forgetting"] == pytest.approx(first[0] - second[0])
    assert summary["backward_transfer"] == pytest.approx(second[0] - first[0])
    assert summary["learning_accuracy"] == pytest.approx((first[0] + second[1]) / 2)
    assert summary.keys() == {
        "average_accuracy",
        "average_incremental_accuracy",
        "forgetting",
        "backward_transfer",
        "learning_accuracy",
    }


def test_the_current_task_only(tmp_path: Path) -> None:
    """What needs more is left out of the summary, not guessed."""
    metrics = measured(tmp_path, evaluate="current")
    _, first, second = plain_loop()
    assert_rows(metrics.matrix, [first[0], NAN], [NAN, second[1]])
    assert set(metrics.compute()) == {"learning_accuracy"}


def test_forward_transfer_against_the_module_before_the_stream(tmp_path: Path) -> None:
    """The second task after the first, less what an untrained module scores."""
    before, first, _ = plain_loop()
    metrics = measured(tmp_path, evaluate="all", baseline=True)
    assert metrics.compute()["forward_transfer"] == pytest.approx(first[1] - before[1])
    assert_rows(metrics.matrix, *plain_loop()[1:])
    assert "forward_transfer" not in measured(tmp_path, evaluate="all").compute()


def test_a_baseline_needs_all_tasks(tmp_path: Path) -> None:
    """Refused before the first step."""
    with pytest.raises(ValueError, match=r"baseline=True.*`TaskStreamDataModule\(evaluate='all'\)`"):
        measured(tmp_path, baseline=True)


def test_intransigence_against_a_joint_run(tmp_path: Path) -> None:
    """What the joint run reaches, less what each task reached when it was learned."""
    _, first, second = plain_loop()
    summary = measured(tmp_path, joint=[0.9, 0.8]).compute()
    assert summary["intransigence"] == pytest.approx((0.9 - first[0] + 0.8 - second[1]) / 2)


def test_a_lower_score_may_be_the_better_one(tmp_path: Path) -> None:
    """``mode="min"`` turns the differences round, and leaves matrix and averages in the unit of the score."""
    high, low = (measured(tmp_path / mode, mode=mode, evaluate="all", baseline=True) for mode in ("max", "min"))
    assert torch.equal(high.matrix, low.matrix)
    more, less = high.compute(), low.compute()
    for name in ("average_accuracy", "average_incremental_accuracy", "learning_accuracy"):
        assert less[name] == more[name]
    for name in ("backward_transfer", "forward_transfer"):
        assert less[name] == pytest.approx(-more[name])
    assert less["forgetting"] == pytest.approx(-more["forgetting"])
    assert json.loads((tmp_path / "min" / "record" / "record.json").read_text())["better"] == "lower"


def test_further_values_stand_beside_the_matrix(tmp_path: Path) -> None:
    """After every task, in the record and in the state; one that nobody logs is refused like a score."""
    metrics = measured(tmp_path, further=["val_acc"])
    record = json.loads((tmp_path / "record" / "record.json").read_text())
    assert record["further"] == {"val_acc": record["matrix"]}
    fresh = ContinualMetrics(further=["val_acc"])
    fresh.load_state_dict(metrics.state_dict())
    assert fresh.state_dict() == metrics.state_dict()
    assert fresh.state_dict()["further"]["val_acc"]["1"] == record["matrix"][1]
    with pytest.raises(ValueError, match=r"further=\['val_f1'\]\)` found no such value"):
        measured(tmp_path, further=["val_f1"])


def test_a_joint_run_has_one_row(tmp_path: Path) -> None:
    """It trains all tasks, so that each is learned and none is old."""
    module = ToyModule()
    metrics = measured(tmp_path, module, scenario=Joint(ClassIncremental(n_tasks=2)))
    assert_rows(metrics.matrix, accuracies(module))
    summary = metrics.compute()
    assert summary["learning_accuracy"] == summary["average_accuracy"] == pytest.approx(sum(accuracies(module)) / 2)
    assert np.isnan(summary["forgetting"])
    record = json.loads((tmp_path / "record" / "record.json").read_text())
    assert record["trained"] == [[0, 1]]
    assert record["task_names"] == ["classes 0-1", "classes 2-3"]


def test_tasks_that_return_share_a_column(tmp_path: Path) -> None:
    """Four visits of two tasks: four rows, two columns; the row says which task it trained."""
    module = ToyModule()
    scenario = Recurring(ClassIncremental(n_tasks=2), n_visits=4)
    metrics = measured(tmp_path, module, scenario=scenario, epochs_per_task=1)
    assert metrics.matrix.shape == (4, 2)
    assert_rows(metrics.matrix[3:], accuracies(module))
    record = json.loads((tmp_path / "record" / "record.json").read_text())
    assert record["trained"] == [[0], [1], [0], [1]]
    lost = functional.forgetting(metrics.matrix, trained=[0, 1, 0, 1])
    assert metrics.compute()["forgetting"] == pytest.approx(float(lost))


def test_a_stream_with_hidden_boundaries_is_measured(tmp_path: Path) -> None:
    """The measure is told what the methods are not."""
    module = ToyModule()
    metrics = measured(tmp_path, module, scenario=Online(ClassIncremental(n_tasks=2)), epochs_per_task=1)
    assert_rows(metrics.matrix[1:], accuracies(module))


def test_evaluation_within_tasks_is_kept_beside_the_matrix(tmp_path: Path) -> None:
    """The curves hold every evaluation, once; the matrix those at the ends."""
    metrics = measured(tmp_path, evaluate_every_n_epochs=1)
    assert metrics._steps == [3, 6, 9, 12]
    assert metrics._step_tasks == [0, 0, 1, 1]
    assert_rows(metrics.matrix, [plain_loop()[1][0], NAN], plain_loop()[2])
    assert {"min_accuracy", "worst_case_accuracy", "windowed_forgetting_10"} <= metrics.compute().keys()


@pytest.mark.parametrize("interval", [2, 0.7])
def test_no_schedule_of_lightning_leaves_out_the_end_of_a_task(interval: float, tmp_path: Path) -> None:
    """Two of three batches: Lightning alone would never evaluate the third."""
    metrics = ContinualMetrics(directory=tmp_path)
    fit_stream(tmp_path, [metrics], val_check_interval=interval)
    assert_rows(metrics.matrix, [plain_loop()[1][0], NAN], plain_loop()[2])
    assert metrics._steps == [5, 6, 11, 12]


# ---------------------------------------------------------------------- without a task stream


def task_loaders() -> list[DataLoader[Any]]:
    """A validation loader for each task."""
    inputs, labels = toy_data(16, seed=1).tensors
    rows = [torch.isin(labels, torch.tensor(classes)) for classes in TASKS]
    return [DataLoader(TensorDataset(inputs[r], labels[r]), batch_size=8) for r in rows]


def test_one_fit_for_each_task_with_all_loaders(tmp_path: Path) -> None:
    """Validation loader i stands for task i, also for a ``validation_step`` that knows no loaders."""
    metrics, module, expected = ContinualMetrics(directory=tmp_path, baseline=True), ToyModule(), []
    before = accuracies(module)
    for loader in toy_loaders():
        trainer(tmp_path, [metrics], max_epochs=1).fit(module, loader, task_loaders())
        expected.append(accuracies(module))
    assert_rows(metrics.matrix, *expected)
    assert metrics._steps == [3, 6]
    assert metrics.compute()["forward_transfer"] == pytest.approx(expected[0][1] - before[1])


def test_one_fit_for_each_task_with_its_own_loader(tmp_path: Path) -> None:
    """A single loader is that of the task being learned."""
    metrics, module, expected = ContinualMetrics(directory=tmp_path), ToyModule(), []
    for task, (loader, validation) in enumerate(zip(toy_loaders(), task_loaders(), strict=True)):
        trainer(tmp_path, [metrics], max_epochs=1).fit(module, loader, validation)
        expected.append(accuracies(module)[task])
    assert_rows(metrics.matrix, [expected[0], NAN], [NAN, expected[1]])
    assert json.loads((tmp_path / "record.json").read_text())["task_names"] == ["fit 1", "fit 2"]


def test_a_job_for_each_task_through_checkpoints(tmp_path: Path) -> None:
    """Fresh objects that load the last checkpoint continue the matrix and the count of steps."""
    module, expected = ToyModule(), []
    for number, loader in enumerate(toy_loaders(), start=1):
        metrics = ContinualMetrics(directory=tmp_path)
        job = trainer(tmp_path, [metrics], max_epochs=number)
        job.fit(module, loader, task_loaders(), ckpt_path=None if number == 1 else tmp_path / "last.ckpt")
        job.save_checkpoint(tmp_path / "last.ckpt")
        expected.append(accuracies(module))
    assert_rows(metrics.matrix, *expected)
    assert metrics._steps == [3, 6]


# ---------------------------------------------------------------------- where the numbers go


def test_the_record(tmp_path: Path) -> None:
    """JSON and CSV, with what a report needs."""
    metrics = ContinualMetrics(directory=tmp_path / "run")
    fit_stream(tmp_path, [EWC(1.0), ExperienceReplay(8), metrics], stream=toy_stream(evaluate_every_n_epochs=1))
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["method"] == "EWC+ExperienceReplay"
    assert (record["seed"], record["monitor"]) == (0, "val_acc")
    assert record["task_names"] == ["classes 0-1", "classes 2-3"]
    assert record["matrix"][0][1] is None
    assert record["matrix"][1] == metrics.matrix[1].tolist()
    assert record["within"]["step"] == [3, 6, 9, 12]
    assert record["within"]["task"] == [0, 0, 1, 1]
    assert record["summary"]["forgetting"] == metrics.compute()["forgetting"]
    assert 0 < record["train_seconds"] < 60
    assert record["peak_memory_mib"] > 1
    assert record["versions"]["torch"] == version("torch")
    table = (tmp_path / "run" / "matrix.csv").read_text().splitlines()
    assert table[0] == "trained,classes 0-1,classes 2-3"
    assert table[1] == f"classes 0-1,{record['matrix'][0][0]!r},"


def test_names_of_methods(tmp_path: Path) -> None:
    """Fine-tuning without a method; a name of one's own."""
    for name, expected in ((None, "finetune"), ("mine", "mine")):
        metrics = ContinualMetrics(directory=tmp_path, name=name)
        fit_stream(tmp_path, [metrics])
        assert json.loads((tmp_path / "record.json").read_text())["method"] == expected


def test_loggers_get_the_summary_after_every_task(tmp_path: Path) -> None:
    """Without what is undefined after one task; the record lies in the logger's folder."""
    logger, metrics = CSVLogger(tmp_path, flush_logs_every_n_steps=1), ContinualMetrics()
    fit_stream(tmp_path, [metrics], logger=logger, log_every_n_steps=1)
    lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    names = lines[0].split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in lines[1:]]
    logged = [row for row in rows if row["continual/average_accuracy"]]
    assert [int(row["step"]) for row in logged] == [6, 12]
    assert logged[0]["continual/forgetting"] == ""
    assert float(logged[1]["continual/forgetting"]) == pytest.approx(metrics.compute()["forgetting"])
    assert (Path(logger.log_dir) / "record.json").exists()


def test_no_record_of_a_dry_run(tmp_path: Path) -> None:
    """``fast_dev_run`` leaves nothing behind."""
    fit_stream(tmp_path, [ContinualMetrics(directory=tmp_path / "record")], fast_dev_run=True)
    assert not (tmp_path / "record").exists()


def test_a_fit_that_stops_within_a_task_is_recorded(tmp_path: Path) -> None:
    """With the rows that it has."""
    metrics = ContinualMetrics(directory=tmp_path)
    fit_stream(tmp_path, [metrics], stream=toy_stream(evaluate_every_n_epochs=1), max_steps=9)
    record = json.loads((tmp_path / "record.json").read_text())
    assert [len(row) for row in record["matrix"]] == [2]
    assert record["within"]["step"] == [3, 6, 9]


def test_state_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    """All of it, and the time goes on from what was spent."""
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    metrics = ContinualMetrics(directory=tmp_path, baseline=True)
    fit_stream(tmp_path, [metrics, saver], stream=toy_stream(evaluate="all", evaluate_every_n_epochs=1))
    saved = torch.load(tmp_path / "step=8.ckpt", weights_only=True)["callbacks"]["ContinualMetrics"]
    fresh = ContinualMetrics()
    fresh.load_state_dict(saved)
    assert fresh.state_dict() == saved
    assert saved["seconds"] > 0
    assert saved["steps"] == [3, 6]
    final = metrics.state_dict()
    assert final["seconds"] > saved["seconds"]
    assert metrics.state_dict() == final
    assert fresh.compute()["average_accuracy"] == saved["rows"]["0"][0]


# ---------------------------------------------------------------------- refused


def test_a_score_that_nobody_logs(tmp_path: Path) -> None:
    """The message lists what was logged."""
    with pytest.raises(ValueError, match=r"monitor='accuracy'\)` found no such value.*task 1 of 2.*'val_acc'"):
        measured(tmp_path, monitor="accuracy")


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning")
def test_no_validation_data(tmp_path: Path) -> None:
    """Found at the start of the fit, however it comes about."""
    stream = TaskStreamDataModule(toy_data(), scenario=ClassIncremental(n_tasks=2))
    message = r"`ContinualMetrics` needs validation data.*`val=`"
    with pytest.raises(ValueError, match=message):
        fit_stream(tmp_path, [ContinualMetrics()], stream=stream)
    with pytest.raises(ValueError, match=message):
        fit_stream(tmp_path, [ContinualMetrics()], limit_val_batches=0)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, [ContinualMetrics()], max_epochs=1).fit(ToyModule(), toy_loaders()[0])


def test_no_score_yet() -> None:
    """Before a task has ended."""
    with pytest.raises(ValueError, match="no score yet"):
        ContinualMetrics().compute()


# ---------------------------------------------------------------------- the command line and two ranks


def test_the_config_of_the_command_line_is_recorded(tmp_path: Path) -> None:
    """As YAML that runs again."""
    from lightning_cl.cli.main import main

    (tmp_path / "run.yaml").write_text(
        f"""
{trainer_yaml(tmp_path)}
  callbacks:
    - class_path: ContinualMetrics
      init_args: {{directory: {tmp_path}}}
model:
  class_path: Classifier
  init_args: {{network: {{class_path: MLP, init_args: {{num_inputs: 64, num_outputs: 10, hidden: [8]}}}}}}
data:
  class_path: TaskStreamDataModule
  init_args:
    train: {{class_path: DigitsSource, init_args: {{split: train}}}}
    val: {{class_path: DigitsSource, init_args: {{split: val}}}}
    scenario: {{class_path: ClassIncremental, init_args: {{n_tasks: 2}}}}
    batch_size: 256
"""
    )
    main(["fit", "--config", str(tmp_path / "run.yaml")])
    config = yaml.safe_load(json.loads((tmp_path / "record.json").read_text())["config"])
    assert config["data"]["init_args"]["batch_size"] == 256


def evaluate_on_ranks(root: Path, devices: int, samples: int) -> None:
    """Fit without learning and save the matrix; the record goes where the Trainer says."""
    metrics = ContinualMetrics()
    logger = CSVLogger(root, version=0)
    fit: Trainer = trainer(root, [metrics], devices=devices, strategy="ddp", logger=logger, log_every_n_steps=1)
    stream = TaskStreamDataModule(
        toy_data(), toy_data(samples, seed=1), scenario=ClassIncremental(n_tasks=2), batch_size=2
    )
    fit.fit(ToyModule(learning_rate=0.0), datamodule=stream)
    torch.save(metrics.matrix, root / f"matrix-{fit.global_rank}.pt")


@pytest.mark.distributed
@pytest.mark.parametrize("samples", [20, 10, 4], ids=["uneven shares", "one sample each", "fewer samples than ranks"])
def test_ranks_with_unlike_shares_measure_what_one_process_measures(samples: int, tmp_path: Path) -> None:
    """Validation samples of a task on three ranks: no mean of means, and two samples count alike on each."""
    assert exit_codes(functools.partial(evaluate_on_ranks, tmp_path, 3, samples), world_size=3) == [0, 0, 0]
    module = ToyModule()
    inputs, labels = toy_data(samples, seed=1).tensors
    right = (module.model(inputs).argmax(-1) == labels).double()
    expected = [float(right[torch.isin(labels, torch.tensor(classes))].mean()) for classes in TASKS]
    for rank in range(3):
        matrix = torch.load(tmp_path / f"matrix-{rank}.pt")
        assert_rows(matrix, [expected[0], NAN], expected)
    assert (tmp_path / "lightning_logs" / "version_0" / "record.json").exists()
