"""The loader of a task: lazy, seeded for each batch, the same in workers as in the main process."""

from __future__ import annotations

import multiprocessing
import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from lightning_cl.core.rng import rng_state
from lightning_cl.datamodules.batches import batch_reader
from lightning_cl.datamodules.loader import BatchDataset, TaskLoader
from lightning_cl.datamodules.samplers import EvaluationSampler, TaskSampler

ROWS = np.arange(10)


class Noisy(Dataset):
    """Row numbers with noise from each of the three generators that augmentations use."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return index, torch.rand(2), np.random.rand(2), random.random()


class Watched(Dataset):
    """Remembers what was read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        self.read.append(index)
        return index


def loader(dataset, *, num_workers=0, transform=None, **settings):
    """A loader of batches of four rows."""
    sampler = TaskSampler(ROWS, task=0, batch_size=4, seed=3, **settings)
    return TaskLoader(BatchDataset(batch_reader(dataset), transform), sampler, num_workers=num_workers)


def joined(batches):
    """All leaves of all batches as one vector, with the row numbers first."""
    return torch.cat([torch.as_tensor(leaf, dtype=torch.float64).flatten() for batch in batches for leaf in batch])


def test_augmentation_is_the_same_in_workers_and_in_the_main_process():
    """Bit for bit: what a sample looks like depends on seed, task, epoch and step."""
    here = joined(loader(Noisy()))
    workers = loader(Noisy(), num_workers=2)
    assert torch.equal(here, joined(workers))
    workers.sampler.set_position(epoch=1)
    other = joined(workers)
    assert not torch.equal(here, other)
    one = loader(Noisy())
    one.sampler.set_position(epoch=1)
    assert torch.equal(joined(one), other)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_augmentation_goes_on_at_any_step(num_workers):
    """A resumed run sees the samples as the straight run does."""
    straight = list(loader(Noisy()))
    resumed = loader(Noisy(), num_workers=num_workers)
    resumed.sampler.set_position(epoch=0, batches=1, samples=4)
    assert torch.equal(joined(straight[1:]), joined(resumed))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_global_generators_stay_as_they_are(num_workers):
    """The dropout of a model must not depend on who reads its data."""
    before = rng_state()
    list(loader(Noisy(), num_workers=num_workers))
    after = rng_state()
    assert before["python"] == after["python"]
    assert torch.equal(before["torch"], after["torch"])
    assert torch.equal(before["numpy"][1], after["numpy"][1])
    assert before["numpy"][2:] == after["numpy"][2:]


def test_samples_of_one_batch_are_augmented_apart():
    """One seed for a batch, not one noise for all of its samples."""
    _, noise, _, _ = next(iter(loader(Noisy())))
    assert len({tuple(row.tolist()) for row in noise}) == 4


def test_nothing_is_read_before_the_first_batch_is_wanted():
    """Lightning makes an iterator before it restores the position, and throws it away."""
    data = Watched()
    task_loader = loader(data)
    early = iter(task_loader)
    assert data.read == []
    task_loader.sampler.set_position(epoch=0, batches=2, samples=8)
    assert len(list(early)) == 1
    assert len(data.read) == 2


def test_abandoned_iterators_start_no_workers():
    """Two iterators an epoch must not cost two sets of processes."""
    task_loader = loader(Noisy(), num_workers=2)
    iter(task_loader)
    assert task_loader._iterator is None


def test_workers_stay_for_the_next_epoch():
    """The same processes serve all epochs of a task."""
    task_loader = loader(Noisy(), num_workers=1)
    list(task_loader)
    first = [worker.pid for worker in task_loader._iterator._workers]
    task_loader.sampler.set_position(epoch=1)
    list(task_loader)
    assert [worker.pid for worker in task_loader._iterator._workers] == first


def test_whole_batches_are_read_at_once():
    """A tensor dataset is indexed by the batch, and batches are what the default collation makes."""
    data = TensorDataset(torch.arange(10.0), torch.arange(10))
    inputs, labels = next(iter(loader(data, shuffle=False)))
    assert inputs.tolist() == labels.tolist() == [0, 1, 2, 3]


def test_evaluation_is_in_order():
    """No position, no shuffling."""
    sampler = EvaluationSampler(ROWS, batch_size=4)
    batches = TaskLoader(BatchDataset(batch_reader(TensorDataset(torch.arange(10)))), sampler)
    assert [batch[0].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_workers_of_an_evaluation_end_with_it():
    """A stream has a loader for each task: their processes must not add up."""
    sampler = EvaluationSampler(ROWS, batch_size=4)
    evaluation = TaskLoader(BatchDataset(batch_reader(Noisy())), sampler, num_workers=2)
    before = set(multiprocessing.active_children())
    assert len(list(evaluation)) == 3
    assert set(multiprocessing.active_children()) == before


# ---------------------------------------------------------------------- input transforms of a task


class Named(Dataset):
    """Samples as mappings: floating-point inputs, token ids, soft labels, text."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        value = torch.full((2,), float(index))
        return {"pixel_values": value, "input_ids": torch.tensor([index]), "labels": value, "text": str(index)}


class Pair(NamedTuple):
    """What a collator may return."""

    inputs: torch.Tensor
    targets: torch.Tensor


def test_a_task_transforms_its_inputs_only():
    """The first element of a tuple, the floating-point leaves of a mapping but its labels, a bare tensor."""
    data = TensorDataset(torch.arange(10.0), torch.arange(10.0))
    inputs, targets = next(iter(loader(data, transform=torch.neg)))
    assert torch.equal(inputs, -targets)
    batch = next(iter(loader(Named(), transform=torch.neg)))
    assert torch.equal(batch["pixel_values"], -batch["labels"])
    assert torch.equal(batch["input_ids"].expand(4, 2).float(), batch["labels"])
    assert batch["text"] == [str(int(index)) for index in batch["input_ids"]]
    bare = next(iter(loader(torch.arange(10.0), transform=torch.neg)))
    assert bare.sum() < 0


def test_a_task_transforms_what_a_collator_returns():
    """A named tuple stays one; what is unknown is refused."""
    data = TensorDataset(torch.arange(10.0), torch.arange(10.0))
    pairs = BatchDataset(
        batch_reader(data, lambda samples: Pair(*torch.utils.data.default_collate(samples))), torch.neg
    )
    index = next(iter(TaskSampler(ROWS, task=0, batch_size=4, seed=3)))
    assert torch.equal(pairs[index].inputs, -pairs[index].targets)
    unknown = BatchDataset(batch_reader(data, lambda samples: object()), torch.neg)
    with pytest.raises(ValueError, match=r"batch of type object.*`collate_fn`"):
        unknown[index]
