"""Sample identities agree with what is in the batch, and lead back to labels and samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from lightning_cl import ContinualCallback, TaskStreamDataModule
from lightning_cl.datamodules import ClassIncremental, DataIncremental, Joint, Permuted, Predefined, Recurring
from lightning_cl.datamodules.scenarios.transforms import Permutation
from toys import ToyModule, trainer

N = 30
LABELS = torch.arange(N) % 6


class Rows(Dataset):
    """A sample is its own row number, three times, and a label."""

    targets = LABELS.tolist()

    def __len__(self):
        return N

    def __getitem__(self, index):
        return torch.full((3,), float(index)), LABELS[index]


class RowModule(ToyModule):
    """A module of three inputs and six classes."""

    def __init__(self):
        super().__init__()
        self.model = nn.Linear(3, 6)


class Watch(ContinualCallback):
    """Keeps, for every step, what the batch holds and what the stream says that it holds."""

    needs_state = False
    boundaries = "evaluation"

    def __init__(self):
        self.inputs, self.labels, self.ids = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        ids, owners = trainer.datamodule.batch_sample_ids(batch_idx)
        assert owners.tolist() == [0] * len(ids)
        self.inputs.append(batch[0].clone())
        self.labels.append(batch[1].clone())
        self.ids.append(ids)


def watch(root, *, ckpt_path=None, **settings):
    """Fit a stream over the rows; return what was seen and the stream."""
    defaults = {"scenario": ClassIncremental(n_tasks=2), "batch_size": 4, "epochs_per_task": 2}
    stream = TaskStreamDataModule(settings.pop("train", Rows()), **(defaults | settings))
    seen = Watch()
    saver = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(root, [seen, saver]).fit(RowModule(), datamodule=stream, ckpt_path=ckpt_path)
    return seen, stream


def rows_in(seen):
    """Row numbers that the batches held."""
    return torch.cat(seen.inputs)[:, 0].long()


# ---------------------------------------------------------------------- batches


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("settings", [{}, {"epochs_per_task": 1, "steps_per_task": 9}], ids=["epochs", "steps"])
def test_identities_are_the_rows_of_the_batch(settings, num_workers, tmp_path):
    """In every step, also where workers read ahead; every row of a task once an epoch."""
    seen, _ = watch(tmp_path, num_workers=num_workers, **settings)
    assert torch.equal(torch.cat(seen.ids), rows_in(seen))
    if not settings:
        assert [sorted(rows.tolist()) for rows in torch.cat(seen.ids).view(4, 15)] == 2 * [
            [row for row in range(N) if row % 6 < 3]
        ] + 2 * [[row for row in range(N) if row % 6 >= 3]]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("step", [1, 4, 7, 8, 9])
def test_identities_after_a_resume(step, num_workers, tmp_path):
    """They go on with the samples that the straight run would have seen."""
    straight, _ = watch(tmp_path)
    resumed, _ = watch(tmp_path / "resumed", num_workers=num_workers, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert torch.equal(torch.cat(resumed.ids), rows_in(resumed))
    assert torch.equal(rows_in(resumed), torch.cat(straight.inputs[step:])[:, 0].long())


def test_permuted_tasks_make_other_samples_of_a_row(tmp_path):
    """The row, plus the rows of the dataset for each task before, but for the first, which shows it as it is."""
    seen, stream = watch(tmp_path, scenario=Permuted(n_tasks=3), epochs_per_task=1)
    ids = torch.cat(seen.ids)
    assert ids.unique().tolist() == list(range(3 * N))
    assert torch.equal(ids % N, rows_in(seen))
    assert torch.equal(stream.labels_of(ids), torch.cat(seen.labels))


def test_identities_are_distinct_over_a_list_of_datasets(tmp_path):
    """A row of the concatenation."""
    parts = [
        TensorDataset(torch.arange(start, stop).float()[:, None].expand(-1, 3), torch.arange(start, stop) % 6)
        for start, stop in ((0, 10), (10, 30))
    ]
    seen, stream = watch(tmp_path, train=parts, scenario=Predefined(), epochs_per_task=1)
    assert torch.equal(torch.cat(seen.ids), rows_in(seen))
    assert [task.length for task in stream.tasks] == [10, 20]
    assert torch.equal(stream.labels_of(torch.cat(seen.ids)), torch.cat(seen.labels))


def test_a_sample_that_returns_keeps_its_identity(tmp_path):
    """A second visit of a task brings no new samples, with or without a transform of its own."""
    scenario = Recurring(Permuted(n_tasks=2), n_visits=5, exponent=0.0)
    seen, stream = watch(tmp_path, scenario=scenario, epochs_per_task=1)
    assert torch.cat(seen.ids).unique().tolist() == list(range(2 * N))
    again = stream.fetch(torch.arange(N, N + 4))[0]
    assert torch.equal(again, Permutation(0, 1)(torch.arange(4.0)[:, None].expand(-1, 3)))


# ---------------------------------------------------------------------- from identities back to samples


def test_labels_without_reading_samples(tmp_path):
    """As int64, in the order asked for; nothing where the data has no labels."""
    _, stream = watch(tmp_path)
    assert stream.labels_of(torch.tensor([7, 0, 11])).tolist() == [1, 0, 5]
    stream = TaskStreamDataModule(torch.randn(8, 3), scenario=DataIncremental(n_tasks=2))
    stream.setup("fit")
    assert stream.labels_of(torch.tensor([1])) is None


def test_samples_are_read_anew(tmp_path):
    """In the order asked for, as a batch; in the view of their task."""
    _, stream = watch(tmp_path)
    inputs, labels = stream.fetch(torch.tensor([7, 0, 7]))
    assert inputs[:, 0].tolist() == [7, 0, 7]
    assert labels.tolist() == [1, 0, 1]
    _, stream = watch(tmp_path / "permuted", train=(torch.arange(3.0 * N).view(N, 3), LABELS), scenario=Permuted(2))
    inputs, _ = stream.fetch(torch.tensor([N + 5]))
    assert torch.equal(inputs, Permutation(0, 1)(torch.arange(15.0, 18.0)[None]))
    with pytest.raises(ValueError, match=r"different input transforms.*storage='memory'"):
        stream.fetch(torch.tensor([5, N + 5]))


def test_augmented_samples_are_read_anew_alike():
    """The same samples give the same bits, whatever the generators are at."""

    class Noisy(Rows):
        def __getitem__(self, index):
            return torch.randn(3), LABELS[index]

    stream = TaskStreamDataModule(Noisy(), scenario=ClassIncremental(n_tasks=2))
    stream.setup("fit")
    state = torch.get_rng_state()
    first = stream.fetch(torch.tensor([1, 2]))[0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(77)
    assert torch.equal(first, stream.fetch(torch.tensor([1, 2]))[0])


# ---------------------------------------------------------------------- the data of the task at hand


class TaskData(ContinualCallback):
    """Reads the task's data at its end."""

    needs_state = False

    def __init__(self, n_samples=None):
        self.n_samples = n_samples
        self.ids, self.inputs = [], []

    def on_task_end(self, trainer, pl_module, task):
        limit = float("inf") if trainer.limit_train_batches == 1.0 else trainer.num_training_batches
        read = list(trainer.datamodule.task_loader(self.n_samples, limit))
        self.ids.append(torch.cat([ids for _, ids in read]))
        self.inputs.append(torch.cat([batch[0][:, 0] for batch, _ in read]).long())


def task_data(root, n_samples=None, stream_settings=None, **options):
    """What a callback reads at the ends of two tasks of 15 rows, with batches of four."""
    settings = {"scenario": ClassIncremental(n_tasks=2), "batch_size": 4, **(stream_settings or {})}
    callback = TaskData(n_samples)
    trainer(root, [callback], **options).fit(RowModule(), datamodule=TaskStreamDataModule(Rows(), **settings))
    assert all(torch.equal(ids, rows) for ids, rows in zip(callback.ids, callback.inputs, strict=True))
    return [ids.tolist() for ids in callback.ids]


def test_the_task_is_read_once_in_order(tmp_path):
    """All of its rows and no other."""
    first, second = task_data(tmp_path)
    assert first == [row for row in range(N) if row % 6 < 3]
    assert second == [row for row in range(N) if row % 6 >= 3]


def test_a_sample_of_the_task(tmp_path):
    """Drawn by the stream's seed, the same one at every run, another for another seed."""
    first, second = task_data(tmp_path, n_samples=6)
    assert len(set(first)) == len(set(second)) == 6
    assert [first, second] == task_data(tmp_path, n_samples=6)
    assert first != task_data(tmp_path, n_samples=6, stream_settings={"seed": 1})[0]
    assert len(task_data(tmp_path, n_samples=100)[0]) == 15


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"limit_train_batches": 2}, 8),
        ({"limit_train_batches": 0.5}, 8),
        ({"limit_train_batches": 1.0}, 15),
        ({"limit_train_batches": 50}, 15),
    ],
)
def test_limits_of_training_hold_for_it(options, expected, tmp_path):
    """At most as many samples as training steps read."""
    assert [len(ids) for ids in task_data(tmp_path, **options)] == [expected, expected]


def test_a_task_of_few_steps_is_read_as_far(tmp_path):
    """Three steps of four."""
    assert len(task_data(tmp_path, stream_settings={"steps_per_task": 3})[0]) == 12


def test_fast_dev_run_reads_one_batch(tmp_path):
    """A dry run ends after one step, within the first task."""
    stream, seen = TaskStreamDataModule(Rows(), scenario=ClassIncremental(n_tasks=2), batch_size=4), Watch()
    trainer(tmp_path, [seen], fast_dev_run=True).fit(RowModule(), datamodule=stream)
    assert [len(ids) for ids in seen.ids] == [4]


def test_the_largest_label(tmp_path):
    """With the first task that has it, and a sample."""
    stream = TaskStreamDataModule(Rows(), scenario=ClassIncremental(n_tasks=3, order=[5, 1, 2, 0, 3, 4]))
    stream.setup("fit")
    label, task, sample_id = stream.largest_label()
    assert (label, task.index, task.classes) == (5, 0, (5, 1))
    assert stream.labels_of(sample_id).tolist() == [5]
    joint = TaskStreamDataModule(Rows(), scenario=Joint(ClassIncremental(n_tasks=3)))
    joint.setup("fit")
    assert joint.largest_label()[0] == 5
    unlabelled = TaskStreamDataModule(np.zeros((4, 2)), scenario=DataIncremental(n_tasks=2))
    unlabelled.setup("fit")
    assert unlabelled.largest_label() is None
