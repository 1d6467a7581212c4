"""Labels and columns are read right, and without decoding inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_cl.datamodules.labels import check_label_names, label_names, read_column, read_labels
from lightning_cl.datamodules.sources import ArraySource


class Undecodable(Dataset):
    """Fails when a sample is read; labels stand in the attribute ``name``."""

    def __init__(self, labels, name="targets", target_transform=None):
        setattr(self, name, labels)
        self.length = len(labels)
        self.target_transform = target_transform

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        raise AssertionError("an input was decoded")


class Samples(Dataset):
    """Plain samples, with a count of how many were read."""

    def __init__(self, samples):
        self.samples = samples
        self.reads = 0

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        self.reads += 1
        return self.samples[index]


TENSORS = TensorDataset(torch.zeros(4, 2), torch.tensor([3, 1, 0, 1]), torch.tensor([9, 8, 7, 6]))


@pytest.mark.parametrize("name", ["targets", "labels"])
@pytest.mark.parametrize(
    "values", [[2, 0, 1], (2, 0, 1), np.array([2, 0, 1], dtype=np.uint8), torch.tensor([2, 0, 1])], ids=type
)
def test_attribute_of_the_dataset(name, values):
    """As datasets of torchvision have it: list, array or tensor."""
    labels = read_labels(Undecodable(values, name))
    assert labels.dtype == np.int64
    assert labels.tolist() == [2, 0, 1]


def test_attribute_by_name():
    """A key names an attribute that is not one of the usual."""
    assert read_labels(Undecodable([1, 0], "fine"), "fine").tolist() == [1, 0]


def test_target_transform_is_applied_to_the_classes():
    """The served labels count, not the stored ones; one call per class."""
    calls = []

    def halve(label):
        calls.append(label)
        return torch.tensor(label // 2)

    dataset = Undecodable([5, 2, 5, 4, 2], target_transform=halve)
    assert read_labels(dataset).tolist() == [2, 1, 2, 2, 1]
    assert calls == [2, 4, 5]


@pytest.mark.parametrize(
    ("dataset", "key", "expected"),
    [
        (TENSORS, None, [9, 8, 7, 6]),
        (TENSORS, 1, [3, 1, 0, 1]),
        (TensorDataset(torch.zeros(4)), None, None),
        (TensorDataset(torch.zeros(2), torch.tensor([True, False])), None, [1, 0]),
        (Subset(Undecodable([5, 6, 7]), [2, 0]), None, [7, 5]),
        (Subset(Subset(TENSORS, [3, 2, 1]), [2, 0]), 1, [1, 1]),
        (ConcatDataset([TENSORS, Subset(Undecodable([5, 6, 7]), [1])]), None, [9, 8, 7, 6, 6]),
        (Subset(ConcatDataset([Undecodable([5, 6]), TENSORS]), [3, 1]), None, [8, 6]),
        (ConcatDataset([TENSORS, TensorDataset(torch.zeros(1))]), None, None),
        (ArraySource(np.zeros((2, 3)), labels=[4, 2]), None, [4, 2]),
        (ArraySource(np.zeros((2, 3))), None, None),
        (Samples([(0.5, 1, 7), (0.5, 0, 8)]), None, [7, 8]),
        (Samples([(0.5, 1, 7), (0.5, 0, 8)]), 1, [1, 0]),
        (Samples([{"x": 0.5, "label": torch.tensor(3)}, {"x": 0.5, "label": np.int32(1)}]), None, [3, 1]),
        (Samples([{"x": 0.5, "labels": 3}]), None, [3]),
        (Samples([{"x": 0.5, "y": 3}]), "y", [3]),
        (Samples([{"x": 0.5}]), None, None),
        (Samples([torch.zeros(3), torch.ones(3)]), None, None),
    ],
)
def test_kinds_of_datasets(dataset, key, expected):
    """Each kind by hand; ``None`` where there is no label."""
    labels = read_labels(dataset, key)
    assert (None if labels is None else labels.tolist()) == expected
    assert labels is None or labels.dtype == np.int64


def test_last_resort_reads_only_the_subset_and_only_when_required():
    """A split that needs no labels must not decode a dataset for them."""
    samples = Samples([(index, index % 3) for index in range(10)])
    assert read_labels(Subset(samples, [4, 2]), required=False) is None
    assert samples.reads == 0
    assert read_labels(Subset(samples, [4, 2])).tolist() == [1, 2]
    assert samples.reads == 2


def test_targets_that_are_no_classes():
    """A regression may go without labels; a key that names them is taken at its word."""
    regression = TensorDataset(torch.zeros(3, 2), torch.rand(3))
    assert read_labels(regression, required=False) is None
    with pytest.raises(ValueError, match=r"must be a 1-D array of integers, got float32 of shape \(3,\).*`label`"):
        read_labels(regression)
    with pytest.raises(ValueError, match="1-D array of integers"):
        read_labels(regression, 1, required=False)


@pytest.mark.parametrize(
    ("dataset", "key", "message"),
    [
        (Undecodable(["cat", "dog"]), None, "`Undecodable.targets` must be .*integers.*`targets`"),
        (Undecodable([[0, 1], [1, 0]]), None, r"of shape \(2, 2\)"),
        (TENSORS, 3, "`label` must be a position among 3 tensors, got 3"),
        (TENSORS, "y", "`label` must be a position among 3 tensors, got 'y'"),
        (Samples([{"x": 1}]), "y", "`label='y'` is missing in sample 0 of `Samples`"),
        (Samples([(1, 2), (1,)]), 1, "`label=1` is missing in sample 1"),
        (Samples([(1, "cat")]), None, "labels in samples of `Samples` must be .*integers"),
        (Samples([(1, torch.zeros(2))]), None, "integers"),
        (Undecodable([1], target_transform=str), None, "result of `target_transform` must be .*integers"),
    ],
)
def test_refused_labels(dataset, key, message):
    """The message names what was found and the way out."""
    with pytest.raises(ValueError, match=message):
        read_labels(dataset, key)


def test_columns_of_any_type():
    """Domains from sources, attributes and dict samples, through subsets and concatenations."""
    source = ArraySource(np.zeros(3), domains=["a", "b", "a"])
    assert read_column(source, "domain").tolist() == ["a", "b", "a"]
    assert read_column(Subset(source, [1, 2]), "domains").tolist() == ["b", "a"]
    assert read_column(Undecodable([0.5, 1.5], "year"), "year").tolist() == [0.5, 1.5]
    dicts = Samples([{"site": "x"}, {"site": "y"}])
    assert read_column(ConcatDataset([dicts, dicts]), "site").tolist() == ["x", "y", "x", "y"]
    with pytest.raises(ValueError, match="`TensorDataset` has no column or attribute 'site'"):
        read_column(TENSORS, "site")
    with pytest.raises(ValueError, match="`ArraySource` has no column or attribute 'domain'"):
        read_column(ArraySource(np.zeros(3)), "domain")


def test_hugging_face_columns():
    """Through Arrow: other columns are not decoded, selections and shuffles are honoured."""
    datasets = pytest.importorskip("datasets", reason="needs the extra llm")
    data = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c", "d"], "intent": [3, 1, 2, 0], "site": ["x", "y", "x", "z"], "score": [0.5] * 4}
    )
    assert read_labels(data) is None
    assert read_labels(data, "intent").tolist() == [3, 1, 2, 0]
    chosen = data.select([2, 0, 3]).rename_column("intent", "label")
    assert read_labels(chosen).tolist() == [2, 3, 0]
    assert read_labels(Subset(chosen.with_format("torch"), [1])).tolist() == [3]
    shuffled = data.shuffle(seed=1)
    assert read_labels(shuffled, "intent").tolist() == [row["intent"] for row in shuffled]
    assert read_column(chosen, "site").tolist() == ["x", "x", "z"]
    assert read_labels(chosen.with_transform(lambda rows: 1 / 0)).tolist() == [2, 3, 0]
    encoded = data.class_encode_column("site")
    assert read_labels(encoded, "site").tolist() == [0, 1, 0, 2]
    assert label_names(encoded.rename_column("site", "label")) == ["x", "y", "z"]
    assert label_names(data) is None
    for key, message in (
        ("site", r"holds text, labels must be integers. Pass `dataset.class_encode_column\('site'\)`"),
        ("score", "holds float64, labels must be integers"),
        ("answer", "no column 'answer'; it has"),
    ):
        with pytest.raises(ValueError, match=message):
            read_labels(data, key)
    missing = datasets.Dataset.from_dict({"label": [1, None]})
    with pytest.raises(ValueError, match="'label' has 1 missing values"):
        read_labels(missing)
    nested = datasets.Dataset.from_dict({"label": [[1], [2, 3]]})
    with pytest.raises(ValueError, match="holds object, labels must be integers"):
        read_labels(nested)


def test_label_names_must_agree():
    """The same number for another class would be a silent mistake."""
    named = ArraySource(np.zeros(2), labels=[0, 1])
    named.label_names = ["no", "yes"]
    other = ArraySource(np.zeros(2), labels=[0, 1])
    other.label_names = ["maybe", "no", "yes"]
    plain = ArraySource(np.zeros(2), labels=[0, 1])
    assert label_names(Subset(ConcatDataset([named, plain]), [0])) == ["no", "yes"]
    check_label_names({"train": named, "val": plain, "test": Subset(named, [0])})
    with pytest.raises(ValueError, match=r"`train` and `test` number .*\(2 and 3 names; in one only: \['maybe'\]\)"):
        check_label_names({"train": named, "val": plain, "test": other})
