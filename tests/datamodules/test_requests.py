"""Requests to forget in a stream: which rows, in which order, beside which retained ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_cl import TaskStreamDataModule
from lightning_cl.core.requests import ForgetRequest
from lightning_cl.datamodules import ClassIncremental, Permuted, Recurring, UnlearningDataModule
from lightning_cl.datamodules.samplers import RequestSampler
from lightning_cl.unlearning import Unlearn
from toys import toy_data, toy_stream, trainer

LABELS = np.asarray(toy_data().tensors[1])


class Recorder(LightningModule):
    """Keeps the inputs of what it is shown, which tell who the samples are."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(6, 4)
        self.seen: list[tuple[str, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        task = self.current_task
        self.seen.append((task.kind if task else "?", inputs))
        return nn.functional.cross_entropy(self.network(inputs), labels)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Lightning warns of a module without one."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def rows_of(inputs: Tensor) -> list[int]:
    """Return the rows of the toy data that inputs are."""
    return [int((toy_data().tensors[0] == sample).all(1).nonzero()[0]) for sample in inputs]


class Documents(Dataset[Any]):
    """Samples with a column that says who wrote them."""

    author = np.array(["ada", "bo", "cy"] * 4)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((6,), float(index)), torch.tensor(index % 4)


def test_learn_learn_forget_learn_in_one_fit(tmp_path: Path) -> None:
    """What is forgotten is shown once an epoch, what is retained was learned before, and nothing gone comes back."""
    gone = np.flatnonzero(LABELS == 0)
    stream = toy_stream(
        scenario=Recurring(ClassIncremental(n_tasks=2), n_visits=4, exponent=0.0),
        epochs_per_task=1,
        requests=[ForgetRequest("class 0", classes=[0], after=2), ForgetRequest("two rows", rows=[1, 3], after=2)],
        epochs_per_request=2,
    )
    module = Recorder()
    trainer(tmp_path, [Unlearn("npo")]).fit(module, datamodule=stream)
    kinds = [task.kind for task in stream.tasks]
    assert kinds == ["learn", "learn", "forget", "forget", "learn", "learn"]
    request, second = stream.tasks[2], stream.tasks[3]
    assert stream.forgotten_ids(request).tolist() == gone.tolist()
    assert stream.forgotten_ids(second).tolist() == [row for row in (1, 3) if row not in gone]
    left = sorted(set(range(len(LABELS))) - set(gone.tolist()) - {1, 3})
    assert stream.retained_ids(second).tolist() == left
    for task in stream.tasks[4:]:
        assert not set(stream.plan.plans[task.index].indices.tolist()) & ({1, 3} | set(gone.tolist()))
    shown = [rows_of(inputs) for kind, inputs in module.seen if kind == "forget"]
    # the module's step runs on a batch to forget, and then on as many retained samples
    forgotten, retained = shown[::2], shown[1::2]
    per_epoch = -(-len(gone) // 8)
    assert sorted(row for batch in forgotten[:per_epoch] for row in batch) == gone.tolist()
    assert sorted(row for batch in forgotten[per_epoch : 2 * per_epoch] for row in batch) == gone.tolist()
    assert [len(batch) for batch in forgotten] == [len(batch) for batch in retained]
    assert not {row for batch in retained for row in batch} & set(gone.tolist())


def test_documents_are_named_by_a_column() -> None:
    """All samples of the named authors, and only those of the named label where a second column says so."""
    stream = UnlearningDataModule(Documents(), requests=[ForgetRequest("ada", where={"author": ["ada"]})])
    stream.setup("fit")
    assert stream.forgotten_ids(stream.tasks[-1]).tolist() == [0, 3, 6, 9]


def test_retained_samples_are_drawn_by_rank_and_step() -> None:
    """Every rank draws its own, the same ones at every call; none is drawn that is not retained."""
    retained = np.arange(100, 200)

    def drawn(rank: int) -> list[list[int]]:
        settings = {"task": 1, "batch_size": 4, "seed": 0, "rank": rank, "world_size": 2}
        return [index.retain.rows.tolist() for index in RequestSampler(np.arange(16), retained, **settings)]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert drawn(0)[0] != drawn(0)[1]
    assert set(np.ravel(drawn(0))) <= set(retained.tolist())


def test_a_model_that_is_there_learns_nothing(tmp_path: Path) -> None:
    """`UnlearningDataModule` goes straight to its request, and `after` means nothing there."""
    stream = UnlearningDataModule(toy_data(), batch_size=8, requests=[ForgetRequest("a", rows=[4, 5], after=3)])
    module = Recorder()
    trainer(tmp_path, [Unlearn("npo")]).fit(module, datamodule=stream)
    assert [kind for kind, _ in module.seen] == ["forget", "forget"]
    assert sorted(rows_of(module.seen[0][1])) == [4, 5]


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([ForgetRequest("a", rows=[10_000])], "must be rows of the training data"),
        ([ForgetRequest("a", classes=[9])], "names 9 of `classes`"),
        ([ForgetRequest("a", where={"author": ["x"]})], "has no column or attribute 'author'"),
        ([ForgetRequest("a", rows=[1]), ForgetRequest("a", rows=[2])], "names of their own"),
        ([ForgetRequest("a", rows=[1]), ForgetRequest("b", rows=[1])], "not forgotten yet"),
        ([ForgetRequest("a", rows=[1], after=3)], "`after=3`"),
        ([ForgetRequest("a", classes=[2], after=1)], "none of them was learned before it"),
    ],
)
def test_requests_that_cannot_be_served(requests: list[ForgetRequest], message: str) -> None:
    """The error comes with the set-up and names the request."""
    stream = toy_stream(requests=requests)
    with pytest.raises(ValueError, match=message):
        stream.setup("fit")


def test_a_request_says_one_thing() -> None:
    """A name, and exactly one way to name samples."""
    with pytest.raises(ValueError, match="needs a `name`"):
        ForgetRequest("", rows=[1])
    with pytest.raises(ValueError, match="none of them"):
        ForgetRequest("a")
    with pytest.raises(ValueError, match="'rows', 'classes'"):
        ForgetRequest("a", rows=[1], classes=[2])
    with pytest.raises(ValueError, match="`after`"):
        ForgetRequest("a", rows=[1], after=-1)
    with pytest.raises(ValueError, match="`requests` must name"):
        UnlearningDataModule(toy_data(), requests=[])


def test_refused_before_training(tmp_path: Path) -> None:
    """Without a callback that serves, with transformed inputs, with a later task left empty."""
    with pytest.raises(ValueError, match="no callback of the Trainer serves them"):
        trainer(tmp_path).fit(Recorder(), datamodule=toy_stream(requests=[ForgetRequest("a", rows=[1])]))
    stream = TaskStreamDataModule(toy_data(), scenario=Permuted(n_tasks=2), requests=[ForgetRequest("a", rows=[1])])
    with pytest.raises(ValueError, match="without transforms"):
        stream.setup("fit")
    everything = ForgetRequest("a", rows=list(range(len(LABELS))), after=1)
    with pytest.raises(ValueError, match="forgotten before it comes"):
        toy_stream(requests=[everything]).setup("fit")
    stream = toy_stream(requests=[ForgetRequest("a", rows=[1])])
    with pytest.raises(ValueError, match="more than the 1 batches of an epoch of 'a'"):
        trainer(tmp_path, [Unlearn("npo")], val_check_interval=2).fit(Recorder(), datamodule=stream)


def test_a_stream_goes_on_with_further_requests() -> None:
    """A checkpoint of the finished stream fits the same stream with requests behind its end, and no other."""
    plain, longer = toy_stream(), toy_stream(requests=[ForgetRequest("a", rows=[1])])
    early, other = toy_stream(requests=[ForgetRequest("a", rows=[1], after=1)]), toy_stream(seed=3)
    for stream in (plain, longer, early, other):
        stream.setup("fit")
    saved = plain.plan.fingerprint()
    assert plain.plan.continues(saved)
    assert longer.plan.continues(saved)
    assert not early.plan.continues(saved)
    assert not other.plan.continues(saved)
    assert not plain.plan.continues(longer.plan.fingerprint())
