"""Every reader gives bit for bit what reading sample by sample and collating gives."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, default_collate

from lightning_cl.datamodules.batches import batch_reader
from lightning_cl.datamodules.sources import ArraySource, DigitsSource


def assert_identical(actual, expected):
    """Compare two batches: types, keys and their order, dtypes, shapes and bits."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_identical(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_identical(one, other)
    elif isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    else:
        assert actual == expected


def tensors(n, offset=0):
    """A dataset of two tensors."""
    return TensorDataset(torch.arange(offset, offset + 3.0 * n).view(n, 3), torch.arange(offset, offset + n))


class Plain(Dataset):
    """Samples of numbers; nothing is known of how they are read."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {"x": float(index), "y": [index, index + 1], "name": f"sample {index}"}


class Batched(Plain):
    """Reads by list, and remembers that it did."""

    def __init__(self):
        self.calls = []

    def __getitems__(self, indices):
        self.calls.append(list(indices))
        return [self[index] for index in indices]


class Augmented(TensorDataset):
    """A subclass that serves something else than the tensors."""

    def __getitem__(self, index):
        return tuple(2 * tensor[index] for tensor in self.tensors)


def mapped_source(folder):
    """A source over a file of inputs."""
    np.save(folder / "inputs.npy", np.arange(48, dtype=np.int16).reshape(12, 2, 2))
    return ArraySource(str(folder / "inputs.npy"), labels=np.arange(12))


KINDS = {
    "tensors": (lambda _: tensors(12), True),
    "one tensor": (lambda _: TensorDataset(torch.rand(12, 2)), True),
    "array and labels": (lambda _: ArraySource(np.random.rand(12, 4), labels=np.arange(12) % 3), True),
    "array alone": (lambda _: ArraySource(np.random.rand(12, 4)), True),
    "mapped file": (mapped_source, True),
    "subset": (lambda _: Subset(tensors(20), list(range(19, 5, -1))), True),
    "subset of subset": (lambda _: Subset(Subset(tensors(20), np.arange(18)), torch.arange(12).tolist()), True),
    "subset counting from the end": (lambda _: Subset(tensors(12), [-1, 0, -3] * 4), True),
    "concatenation": (lambda _: ConcatDataset([tensors(5), tensors(4, 100), tensors(3, 200)]), True),
    "nested concatenation": (
        lambda _: Subset(
            ConcatDataset([Subset(tensors(9), [8, 0, 3]), ConcatDataset([tensors(4), tensors(6)])]), range(13)
        ),
        True,
    ),
    "concatenation of unlike types": (
        lambda _: ConcatDataset([TensorDataset(torch.rand(6, 2)), TensorDataset(torch.arange(12).view(6, 2))]),
        True,
    ),
    "concatenation with plain samples": (lambda _: ConcatDataset([Plain(), Plain()]), False),
    "plain": (lambda _: Plain(), False),
    "subset of plain": (lambda _: Subset(Subset(Plain(), range(12)), [11, 3, 5] * 4), False),
    "read by list": (lambda _: Batched(), False),
    "subclass": (lambda _: Augmented(torch.rand(12, 2), torch.arange(12)), False),
}
INDICES = [[0], [7, 2, 11, 2], [11, 10, 9, 8, 0, 1], list(range(12))]


@pytest.mark.parametrize(("make", "deterministic"), KINDS.values(), ids=KINDS)
def test_batches_equal_collated_samples(make, deterministic, tmp_path):
    """With torch's collation and with one of the user's, from lists and arrays, after pickling too."""
    dataset = make(tmp_path)
    reader = batch_reader(dataset)
    assert reader.deterministic is deterministic
    for indices in INDICES:
        expected = default_collate([dataset[index] for index in indices])
        assert_identical(reader(indices), expected)
        assert_identical(reader(np.asarray(indices, dtype=np.int32)), expected)
        assert_identical(pickle.loads(pickle.dumps(reader))(indices), expected)
        samples = batch_reader(dataset, list)(indices)
        assert_identical(samples, [dataset[index] for index in indices])


def test_collators_of_the_user_are_not_taken_for_deterministic():
    """They may draw at random, as those that mask tokens do."""
    assert not batch_reader(tensors(4), default_collate).deterministic
    assert not batch_reader(Subset(tensors(4), [0]), default_collate).deterministic


def test_whole_batches_are_read_at_once():
    """`__getitems__` is called once with all indices, mapped through subsets."""
    dataset = Batched()
    batch_reader(Subset(Subset(dataset, [5, 6, 7, 8]), [3, 1, 0]))([2, 0])
    assert dataset.calls == [[5, 8]]


def test_concatenation_of_unlike_shapes_fails_as_collation_does():
    """No batch is made up where default collation refuses."""
    dataset = ConcatDataset([TensorDataset(torch.zeros(3, 2)), TensorDataset(torch.zeros(3, 4))])
    assert_identical(batch_reader(dataset)([0, 2]), [torch.zeros(2, 2)])
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        batch_reader(dataset)([0, 5])


def test_mapped_file_is_not_sent_to_workers(tmp_path):
    """A pickled reader holds the path of the inputs, not their data."""
    np.save(tmp_path / "large.npy", np.zeros((1000, 1000), dtype=np.float32))
    assert len(pickle.dumps(batch_reader(ArraySource(tmp_path / "large.npy")))) < 10_000


class OfBatches(Dataset):
    """What a loader with workers gets: one item is one batch."""

    def __init__(self, reader):
        self.reader = reader

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return self.reader(np.arange(4) + 4 * index)


def test_reader_serves_a_spawned_worker():
    """Tensors, index maps and sources reach a process that shares nothing with this one."""
    dataset = Subset(ConcatDataset([tensors(6), ArraySource(torch.rand(6, 3), labels=range(6))]), range(11, -1, -1))
    reader = batch_reader(dataset)
    loader = DataLoader(OfBatches(reader), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    for index, batch in enumerate(loader):
        assert_identical(batch, default_collate([dataset[row] for row in range(4 * index, 4 * index + 4)]))


def test_digits_source():
    """A source of the package, flat and as images."""
    pytest.importorskip("sklearn", reason="needs the extra examples")
    for flatten in (True, False):
        dataset = DigitsSource("val", flatten=flatten)
        expected = default_collate([dataset[index] for index in (5, 0)])
        assert_identical(batch_reader(dataset)([5, 0]), expected)


@pytest.fixture
def arrow():
    """A Hugging Face dataset of 12 rows with scalars, vectors, matrices, booleans and rows of unequal length."""
    datasets = pytest.importorskip("datasets", reason="needs the extra llm")
    rng = np.random.default_rng(0)
    return datasets.Dataset.from_dict(
        {
            "ids": rng.integers(0, 50, (12, 5)).tolist(),
            "matrix": rng.random((12, 2, 3)).tolist(),
            "small": datasets.Dataset.from_dict({"x": np.arange(12, dtype=np.int8)})["x"][:],
            "flag": [row % 2 == 0 for row in range(12)],
            "text": [f"text {row}" for row in range(12)],
            "label": list(range(12)),
            "ragged": [list(range(1 + row // 3)) for row in range(12)],
        }
    )


@pytest.mark.parametrize(
    "columns", [["label", "ids"], ["ids", "matrix", "small", "flag", "label"], ["text", "label"]], ids="-".join
)
def test_arrow_in_torch_format(arrow, columns):
    """Columns are indexed by the batch; selections, subsets and concatenations included."""
    data = arrow.select_columns(columns).with_format("torch")
    picked = data.select([3, 1, 11, 0, 5, 6, 7, 8, 9, 10, 2, 4])
    for dataset in (data, picked, Subset(picked, range(11, -1, -1)), ConcatDataset([picked, data])):
        reader = batch_reader(dataset)
        assert reader.deterministic
        for indices in INDICES:
            expected = default_collate([dataset[index] for index in indices])
            assert_identical(reader(indices), expected)
            assert_identical(pickle.loads(pickle.dumps(reader))(indices), expected)
    across = ConcatDataset([picked, data])
    assert_identical(batch_reader(across)([20, 3, 12]), default_collate([across[index] for index in (20, 3, 12)]))


def test_arrow_is_read_at_once(arrow, monkeypatch):
    """One query for a batch, where the samples would take four."""
    dataset = arrow.select_columns(["ids", "label"]).with_format("torch")
    queries = []
    original = type(dataset)._getitem
    monkeypatch.setattr(
        type(dataset), "_getitem", lambda self, key, **kw: queries.append(key) or original(self, key, **kw)
    )
    batch_reader(dataset)([3, 2, 1, 0])
    assert queries == [[3, 2, 1, 0]]


def test_arrow_rows_of_unequal_length(arrow):
    """Rows that happen to be equal are stacked; others are refused by torch's collation, or left to the user's."""
    dataset = arrow.select_columns(["ragged"]).with_format("torch")
    assert_identical(batch_reader(dataset)([3, 5]), default_collate([dataset[3], dataset[5]]))
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        batch_reader(dataset)([0, 11])
    rows = batch_reader(dataset, list)([0, 11])
    assert [row["ragged"].tolist() for row in rows] == [[0], [0, 1, 2, 3]]


def test_arrow_in_other_formats(arrow):
    """Python rows are collated as torch does it; a transform of the user may draw at random."""
    dataset = arrow.select_columns(["ids", "text", "label"])
    plain = batch_reader(dataset)
    assert plain.deterministic
    assert_identical(plain([4, 2]), default_collate([dataset[4], dataset[2]]))
    doubled = dataset.with_transform(lambda rows: {"twice": [2 * label for label in rows["label"]]})
    reader = batch_reader(doubled)
    assert not reader.deterministic
    assert_identical(reader([4, 2]), {"twice": torch.tensor([8, 4])})
