"""That a served request still means the samples that were forgotten: what changed data do to it, and the ways out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import Dataset, Subset

from lightning_cl.core.requests import ForgetRequest
from lightning_cl.datamodules import UnlearningDataModule
from lightning_cl.unlearning import RequestRecord, Unlearn
from lightning_cl.unlearning.digest import digest_of_samples
from ranks import Ranks
from toys import ToyModule, toy_data, trainer

FIRST = ForgetRequest("first", rows=[7, 9])
SECOND = ForgetRequest("second", rows=[12])

pytestmark = pytest.mark.filterwarnings("ignore:Request 'first' was served on")


class People(Dataset[Any]):
    """Toy data of eight people with six rows each; rows may be erased or deleted."""

    def __init__(self, erased: Any = (), deleted: Any = ()) -> None:
        inputs, labels = toy_data().tensors
        kept = torch.tensor([row not in deleted for row in range(48)])
        inputs = inputs.index_fill(0, torch.tensor(erased, dtype=torch.int64), 0.0)
        self.inputs, self.labels = inputs[kept], labels[kept]
        self.person = np.arange(48)[kept.numpy()] // 6

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, row: int) -> Any:
        return self.inputs[row], self.labels[row]


def serve(root: Path, data: Any, *requests: ForgetRequest, ckpt_path: Any = None, **settings: Any) -> Any:
    """Serve requests with the ledger of the model; return its records and the datamodule."""
    stream = UnlearningDataModule(data, batch_size=8, requests=list(requests), epochs_per_request=2)
    unlearn = Unlearn("npo", ledger_file=str(root / "model.jsonl"), **settings)
    saver = ModelCheckpoint(root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(root, [unlearn, saver]).fit(ToyModule(), datamodule=stream, ckpt_path=ckpt_path)
    return unlearn.ledger.records, stream


def measures_first(record: RequestRecord) -> bool:
    """Whether the samples of the first request were measured with another one."""
    return "request:first/probability" in record.after


def test_unchanged_samples_are_left_out(tmp_path: Path) -> None:
    """The record holds the digest of what its rows hold, whatever becomes of other rows behind them."""
    (first,), _ = serve(tmp_path, People(), FIRST)
    assert first.samples_hash == digest_of_samples(People()[row] for row in (9, 7))
    (again, second), _ = serve(tmp_path, People(erased=[20], deleted=[47]), FIRST, SECOND)
    assert again == first
    assert measures_first(second)


@pytest.mark.parametrize("change", [{"deleted": [0]}, {"deleted": [7]}, {"erased": [9]}, {"deleted": range(8, 48)}])
def test_other_samples_in_the_rows(change: Any, tmp_path: Path) -> None:
    """An error before training names the request and the ways out."""
    serve(tmp_path, People(), FIRST)
    known = ForgetRequest("first", rows=[7, 9] if len(People(**change)) > 9 else [7])
    with pytest.raises(
        ValueError, match=r"Request 'first' was served for other samples .* name the request in `erased`"
    ):
        serve(tmp_path, People(**change), known, ForgetRequest("second", rows=[2]))


def test_placeholders_in_the_rows(tmp_path: Path) -> None:
    """Samples that were erased are left out and measured no more; only a served request can be named, with its rows."""
    serve(tmp_path, People(), FIRST)
    data = People(erased=[7, 9])
    with pytest.raises(ValueError, match=r"`erased` names \['second'\]"):
        serve(tmp_path, data, FIRST, SECOND, erased=["second"])
    with pytest.raises(ValueError, match="was served for other samples"):
        serve(tmp_path, data, ForgetRequest("first", rows=[7, 8]), SECOND, erased=["first"])
    (_, second), stream = serve(tmp_path, data, FIRST, SECOND, erased=["first"])
    assert not measures_first(second)
    assert second.settings["erased"] == ["first"]
    assert not {7, 9} & set(stream.retained_ids(stream.tasks[-1]).tolist())


def test_rows_deleted_and_the_request_with_them(tmp_path: Path) -> None:
    """A request that the stream does not name any more is one whose samples the data have no more."""
    serve(tmp_path, People(), FIRST)
    with pytest.raises(ValueError, match="Request 'first' was served, and the data still hold its samples"):
        serve(tmp_path, People(), SECOND)
    (_, second), _ = serve(tmp_path, People(deleted=[7, 9]), SECOND)
    assert not measures_first(second)
    assert second.samples_hash == digest_of_samples([People()[14]])


def test_a_column_follows_its_samples(tmp_path: Path) -> None:
    """A request by a column means the same samples where rows before them were deleted, and they are measured there."""
    request = ForgetRequest("first", where={"person": [7]})
    (first,), _ = serve(tmp_path, People(), request)
    (_, second), stream = serve(tmp_path, People(deleted=[0, 1, 2]), request, ForgetRequest("second", rows=[1]))
    assert first.ids == [42, 43, 44, 45, 46, 47]
    assert stream.forgotten_ids(stream.tasks[1]).tolist() == [39, 40, 41, 42, 43, 44]
    assert second.before["request:first/samples"] == 6
    moved = People()[42][0]
    assert any(torch.equal(batch[0][0], moved) for batch, _ in stream.read_samples(torch.tensor([39])))


def test_a_resume_inside_a_request(tmp_path: Path) -> None:
    """The request under way is held against the data too."""
    serve(tmp_path, People(), FIRST)
    (tmp_path / "model.jsonl").unlink()
    resumed, _ = serve(tmp_path, People(), FIRST, ckpt_path=tmp_path / "step=1.ckpt")
    assert [record.name for record in resumed] == ["first"]
    (tmp_path / "model.jsonl").unlink()
    with pytest.raises(ValueError, match="Request 'first' was served for other samples"):
        serve(tmp_path, People(erased=[9]), FIRST, ckpt_path=tmp_path / "step=1.ckpt")


class Noisy(People):
    """Toy data augmented at random."""

    def __getitem__(self, row: int) -> Any:
        return self.inputs[row] + torch.rand(6), self.labels[row]


def test_augmented_samples(tmp_path: Path) -> None:
    """What is drawn while a sample is read is the same each time, and moves no generator."""
    serve(tmp_path, Noisy(), FIRST)
    records, stream = serve(tmp_path, Noisy(), FIRST, SECOND)
    assert len(records) == 2
    state = torch.get_rng_state()
    assert len(list(stream.read_raw(torch.tensor([3, 48, 2])))) == 2
    assert torch.equal(torch.get_rng_state(), state)


@dataclass
class Sample:
    """A sample of a class of the user's own."""

    text: str
    label: int


def test_digest_of_samples() -> None:
    """Every kind of content counts, with its place, its dtype and its shape; the order of the samples does not."""
    half = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    samples: list[Any] = [
        None,
        "12",
        b"12",
        12,
        12.0,
        True,
        ["1", "2"],
        ["12"],
        [["1"], "2"],
        ["a", "b"],
        ["atext:b"],
        {"a": 1},
        {"b": 1},
        {"a": 2},
        Sample("a", 1),
        Sample("a", 2),
        torch.tensor([1.0, 2.0]),
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([1, 2]),
        half.double(),
        np.array(["a", None]),
        np.array(["b", None]),
        object(),
    ]
    digests = {digest_of_samples([sample]) for sample in samples}
    assert len(digests) == len(samples)
    assert digest_of_samples(samples) == digest_of_samples(samples[::-1])
    assert digest_of_samples(samples) != digest_of_samples(samples[1:])
    # the same content in another form
    assert digest_of_samples([{"a": 1, "b": (2, 3)}]) == digest_of_samples(
        [{"b": [2, np.int64(3)], "a": torch.tensor(1)}]
    )
    assert digest_of_samples([half]) == digest_of_samples([half.float()])
    objects = [np.array(["".join(letters), None]) for letters in ("Ada", "Ada")]
    assert digest_of_samples(objects[:1]) == digest_of_samples(objects[1:])
    assert digest_of_samples([object()]) == digest_of_samples([object()])


class Unreadable(People):
    """Toy data with a row that no process can read."""

    def __getitem__(self, row: int) -> Any:
        if row == 9:
            raise OSError("row 9 is gone")
        return super().__getitem__(row)


class Opaque:
    """An object of which nothing but the class can be told."""


def test_digest_of_uncommon_tensors_and_arrays() -> None:
    """What numpy cannot take has a digest of its values; what an array of objects holds counts as it would outside."""
    dense = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    small, turned = torch.ones(2).to(torch.float8_e4m3fn), torch.tensor([1 + 2j]).conj()
    for found, same in ((dense.to_sparse(), dense), (small, torch.ones(2)), (turned, turned.resolve_conj())):
        assert digest_of_samples([found]) == digest_of_samples([same])
        assert digest_of_samples([found]) != digest_of_samples([2 * same])
    # two objects alive at once have two addresses; long arrays are printed with a gap
    opaque, long = [Opaque(), Opaque()], [np.zeros(5000), np.eye(1, 5000, 2500)[0]]
    assert digest_of_samples([np.array(opaque[:1])]) == digest_of_samples([np.array(opaque[1:])])
    first, second = (np.array([value, None], dtype=object) for value in long)
    assert digest_of_samples([first]) != digest_of_samples([second])
    assert digest_of_samples([2**70]) != digest_of_samples([2**71])
    assert digest_of_samples([bytearray(b"ab")]) == digest_of_samples([b"ab"])


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for all tests of this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def serve_on_this_rank(root: Path, data: type[People], *requests: ForgetRequest) -> Any:
    """Serve requests with a ledger in a folder of this rank's own, as on nodes that share none."""
    stream = UnlearningDataModule(data(), batch_size=4, requests=list(requests), epochs_per_request=1)
    unlearn = Unlearn("npo", ledger_file=str(root / os.environ["RANK"] / "model.jsonl"))
    try:
        trainer(root, [unlearn], strategy="ddp", devices=2).fit(ToyModule(), datamodule=stream)
    except (OSError, RuntimeError, ValueError) as error:
        return f"{error}"
    return [record.name for record in unlearn.ledger.records]


@pytest.mark.distributed
def test_nodes_that_share_no_folder(two_ranks: Ranks, tmp_path: Path) -> None:
    """The ledger that rank 0 wrote is that of all, and what is wrong with it an error of all."""
    assert two_ranks.run(serve_on_this_rank, tmp_path, People, FIRST) == [["first"]] * 2
    assert two_ranks.run(serve_on_this_rank, tmp_path, People, FIRST, SECOND) == [["first", "second"]] * 2
    (tmp_path / "0" / "model.jsonl").write_text("{}\n")
    own, other = two_ranks.run(serve_on_this_rank, tmp_path, People, FIRST)
    assert own.startswith("No record of a request")
    assert other == f"Rank 0 failed: ValueError: {own}"


def count_samples(root: Path) -> list[float]:
    """Serve a request, and return how many samples of each set were measured."""
    unlearn = Unlearn("npo", measure_samples=1)
    # all of one class, as unseen samples of others do not count
    request, unseen = ForgetRequest("one class", rows=[7, 11]), Subset(People(), [3, 15])
    stream = UnlearningDataModule(People(), unseen, batch_size=4, requests=[request], epochs_per_request=1)
    trainer(root, [unlearn], strategy="ddp", devices=2).fit(ToyModule(), datamodule=stream)
    (record,) = unlearn.ledger.records
    return [record.after[f"{name}/samples"] for name in ("forget", "retain", "holdout")]


@pytest.mark.distributed
def test_fewer_samples_than_ranks_are_counted_once(two_ranks: Ranks, tmp_path: Path) -> None:
    """Also of those held out: every rank reads them all."""
    assert two_ranks.run(count_samples, tmp_path) == [[1, 1, 1]] * 2


@pytest.mark.distributed
def test_a_sample_that_cannot_be_read(two_ranks: Ranks, tmp_path: Path) -> None:
    """An error of the rank that reads it is one of all: none waits for the digest."""
    own, other = two_ranks.run(serve_on_this_rank, tmp_path, Unreadable, FIRST)
    assert own == "row 9 is gone"
    assert other == "Rank 0 failed: OSError: row 9 is gone"
