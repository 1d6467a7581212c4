"""What a stream takes as data, and what it refuses before training, with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_cl import TaskStreamDataModule
from lightning_cl.datamodules import (
    ClassIncremental,
    DataIncremental,
    DomainIncremental,
    Online,
    Permuted,
    Predefined,
    Recurring,
)
from toys import ToyModule, fit_stream, toy_data, toy_stream

TWO_TASKS = ClassIncremental(n_tasks=2)


def fit(root: Path, train: Any, scenario: Any = TWO_TASKS, module: Any = None, **settings: Any) -> Tensor:
    """Fit a stream over some data; return the final weights."""
    stream = TaskStreamDataModule(train, scenario=scenario, batch_size=8, **settings)
    return fit_stream(root, stream=stream, module=module)


class ListData(Dataset):
    """A dataset that nobody knows: samples one by one."""

    def __init__(self, samples: int = 48) -> None:
        self.inputs, self.targets = toy_data(samples).tensors

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.inputs[row], self.targets[row]


class MappingModule(ToyModule):
    """Takes batches as mappings, as Hugging Face models do."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch["inputs"]), batch["label"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        super().validation_step((batch["inputs"], batch["label"]), batch_idx)


# ---------------------------------------------------------------------- data of many kinds


def test_the_same_samples_in_any_form_train_the_same_model(tmp_path: Path) -> None:
    """A tensor dataset, arrays of either kind, samples one by one, a list of one dataset, a mapping of splits."""
    inputs, labels = toy_data().tensors
    expected = fit(tmp_path, toy_data())
    for data in (
        (inputs, labels),
        (inputs.numpy(), labels.numpy()),
        ListData(),
        [toy_data()],
        {"train": toy_data(), "test": toy_data(16)},
    ):
        assert torch.equal(fit(tmp_path, data), expected)


def test_a_list_of_datasets_is_a_stream(tmp_path: Path) -> None:
    """Predefined tasks, validated by a list of as many."""
    inputs, labels = toy_data().tensors
    parts = [TensorDataset(inputs[rows], labels[rows]) for rows in (labels < 2, labels >= 2)]
    assert torch.equal(fit(tmp_path, parts, Predefined(), val=parts), fit(tmp_path, toy_data()))


def test_hugging_face_data(tmp_path: Path) -> None:
    """A dataset, and a ``DatasetDict`` whose validation split has one of its usual names."""
    datasets = pytest.importorskip("datasets", reason="needs the extra llm")
    inputs, labels = toy_data().tensors
    columns = {"inputs": inputs.tolist(), "label": labels.tolist()}
    data = datasets.Dataset.from_dict(columns)
    expected = fit(tmp_path, toy_data())
    assert torch.equal(fit(tmp_path, data, module=MappingModule()), expected)
    splits = datasets.DatasetDict({"train": data, "validation": data})
    assert torch.equal(fit(tmp_path, splits, val=splits, module=MappingModule()), expected)


def test_a_collate_function_makes_the_batches(tmp_path: Path) -> None:
    """Of Python rows, as tokenizers give them."""
    datasets = pytest.importorskip("datasets", reason="needs the extra llm")
    inputs, labels = toy_data().tensors
    data = datasets.Dataset.from_dict({"inputs": inputs.tolist(), "label": labels.tolist()})
    kinds = set()

    def collate(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        kinds.add(type(samples[0]["inputs"]))
        return {key: torch.tensor([sample[key] for sample in samples]) for key in samples[0]}

    collated = fit(tmp_path, data, module=MappingModule(), collate_fn=collate)
    assert torch.equal(collated, fit(tmp_path, toy_data()))
    assert kinds == {list}


def test_a_label_that_is_named(tmp_path: Path) -> None:
    """By position or key, where it is not the last element."""
    inputs, labels = toy_data().tensors

    class Reversed(ToyModule):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step((batch[1], batch[0]), batch_idx)

    data = TensorDataset(labels, inputs)
    assert torch.equal(fit(tmp_path, data, module=Reversed(), label=0), fit(tmp_path, toy_data()))


# ---------------------------------------------------------------------- data that is refused


class Endless(IterableDataset):
    """A stream of samples."""

    def __iter__(self) -> Any:
        return iter(())


class Lengthless(Dataset):
    """Nobody knows how much it holds."""

    def __getitem__(self, row: int) -> int:
        return row


def labelled(labels: list[int]) -> TensorDataset:
    """Samples of these labels."""
    return TensorDataset(torch.zeros(len(labels), 6), torch.tensor(labels))


@pytest.mark.parametrize(
    ("train", "scenario", "message"),
    [
        (Endless(), TWO_TASKS, r"`Endless` is an iterable dataset.*map-style"),
        (Lengthless(), TWO_TASKS, r"`Lengthless` has no `__len__`"),
        (DataLoader(toy_data()), TWO_TASKS, r"Got a `DataLoader`; pass its `dataset`"),
        ("mnist", TWO_TASKS, r"Expected a map-style.*got str.*`HFSource`"),
        ([], TWO_TASKS, r"`train` holds no sample"),
        (TensorDataset(torch.zeros(0, 6), torch.zeros(0).long()), TWO_TASKS, r"`train` holds no sample"),
        ((torch.zeros(4, 6), torch.zeros(3).long()), TWO_TASKS, r"one value for each of the 4 inputs"),
        (labelled([0, 0, 0]), TWO_TASKS, r"`n_tasks=2` asks for more tasks than.*classes \(1\).*at most 1"),
        (labelled([0, 1, -100]), TWO_TASKS, r"labels must be at least 0, got -100"),
        (TensorDataset(torch.zeros(8, 6)), TWO_TASKS, r"no labels that can be read"),
        (TensorDataset(torch.zeros(4, 6), torch.rand(4)), TWO_TASKS, r"1-D array of integers, got float32"),
        (toy_data(), Predefined(), r"`Predefined` takes its tasks from a list of datasets"),
        ([toy_data(), labelled([])], Predefined(), r"Task 'dataset 1' holds no training sample"),
        (labelled([0, 1]), DataIncremental(n_tasks=3), r"3.*2"),
        (toy_data(), DomainIncremental("hospital"), r"no column or attribute 'hospital'"),
        (toy_data(), Recurring(TWO_TASKS, n_visits=1), r"`n_visits=1` is fewer than the 2 tasks"),
        (
            {"validation": toy_data()},
            TWO_TASKS,
            r"`train` was given splits \['validation'\], but none of them is train",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_data_that_cannot_be_a_stream(train: Any, scenario: Any, message: str, tmp_path: Path) -> None:
    """Before the first step, naming what was given and the way out."""
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, train, scenario)


@pytest.mark.parametrize(
    ("val", "scenario", "message"),
    [
        (labelled([0, 1]), TWO_TASKS, r"evaluation set holds no sample of task 'classes 2-3'"),
        ([toy_data(8)], Predefined(), r"`train` lists 2 datasets, `val` or `test` lists 1"),
        ({"test": toy_data()}, TWO_TASKS, r"`val` was given splits \['test'\]"),
    ],
)
def test_validation_data_that_does_not_fit(val: Any, scenario: Any, message: str, tmp_path: Path) -> None:
    """Found before training, not at the first evaluation."""
    train = [toy_data(8), toy_data(8)] if isinstance(scenario, Predefined) else toy_data()
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, train, scenario, val=val)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, r"`batch_size` must be above 0, got 0"),
        ({"epochs_per_task": 0}, r"`epochs_per_task` must be above 0, got 0"),
        ({"epochs_per_task": [1, -2]}, r"`epochs_per_task` must be above 0, got -2"),
        ({"epochs_per_task": 1, "steps_per_task": 0}, r"`steps_per_task` must be above 0, got 0"),
        ({"epochs_per_task": 2, "steps_per_task": 5}, r"`steps_per_task=5` takes the place of `epochs_per_task=2`"),
        ({"num_workers": -1}, r"`num_workers` must be at least 0, got -1"),
        ({"evaluate": "some"}, r"`evaluate` must be.*got 'some'"),
        ({"evaluate_every_n_epochs": 0}, r"`evaluate_every_n_epochs` must be above 0, got 0"),
        ({"optimizer_policy": "forget"}, r"`optimizer_policy` must be.*got 'forget'"),
        ({"scenario": "class"}, r"`scenario` must be a scenario such as.*got 'class'"),
        ({"seed": -1}, r"`seed` must be at least 0, got -1"),
        ({"scenario": Online(TWO_TASKS), "optimizer_policy": "rebuild"}, r"at task boundaries, which `?Online"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    """At once, naming the setting, what was given and what is possible."""
    with pytest.raises(ValueError, match=message):
        toy_stream(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs_per_task": [1, 2, 3]}, r"`epochs_per_task` lists 3 numbers, but.*makes 2 tasks"),
        ({"epochs_per_task": [1]}, r"`epochs_per_task` lists 1 numbers, but.*makes 2 tasks"),
        ({"scenario": Online(TWO_TASKS), "epochs_per_task": 2}, r"single pass: `epochs_per_task` must be 1, got 2"),
        ({"label": "digit"}, r"`label` must be a position among 2 tensors, got 'digit'"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_the_data(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    """When the tasks are made."""
    with pytest.raises(ValueError, match=message):
        fit_stream(tmp_path, stream=toy_stream(**settings))


def test_a_single_pass_may_be_a_number_of_steps_only_within_it(tmp_path: Path) -> None:
    """More steps than a pass would show samples again."""
    with pytest.raises(ValueError, match=r"single pass.*`steps_per_task=4`.*3 steps"):
        fit_stream(tmp_path, stream=toy_stream(scenario=Online(TWO_TASKS), epochs_per_task=1, steps_per_task=4))
    fit_stream(tmp_path, stream=toy_stream(scenario=Online(TWO_TASKS), epochs_per_task=1, steps_per_task=3))


def test_a_stream_without_a_trainer_says_so() -> None:
    """Its loaders follow the Trainer's epoch."""
    with pytest.raises(ValueError, match=r"call `setup\('fit'\)`"):
        _ = toy_stream().tasks
    with pytest.raises(ValueError, match=r"pass the datamodule to `Trainer.fit`"):
        toy_stream().train_dataloader()


def test_overfitting_a_few_batches_is_refused(tmp_path: Path) -> None:
    """Lightning would read other samples than the stream knows of."""
    with pytest.raises(ValueError, match=r"`Trainer\(overfit_batches=1\)`.*`limit_train_batches`"):
        fit_stream(tmp_path, overfit_batches=1)


def test_permuted_inputs_train(tmp_path: Path) -> None:
    """Arrays of images, in the view of each task."""
    images = np.random.default_rng(0).random((16, 2, 3), dtype=np.float32)

    class Images(ToyModule):
        def forward(self, inputs: Tensor) -> Tensor:
            return self.model(inputs.flatten(1))

    fit(tmp_path, (images, np.arange(16) % 4), Permuted(n_tasks=2), module=Images())
