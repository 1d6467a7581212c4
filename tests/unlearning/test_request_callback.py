"""What all that serves requests does at the edges of a fit: errors, resumes behind it, ledgers, rehearsals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_cl import EWC, ContinualCallback
from lightning_cl.core.requests import ForgetRequest
from lightning_cl.datamodules import UnlearningDataModule
from lightning_cl.unlearning import (
    RMU,
    GradientAscent,
    Ledger,
    RequestCallback,
    SelectiveSynapticDampening,
    Unlearn,
)
from toys import ToyModule, toy_data, toy_stream, trainer, weights

EVEN_ROWS = ForgetRequest("even rows", rows=list(range(0, 48, 2)), after=1)
TWO_ROWS = ForgetRequest("two rows", rows=[7, 9])


def serve(root: Path, callbacks: list[Callback], module: LightningModule | None = None, **settings: Any) -> Tensor:
    """Learn two tasks with requests between and behind them; return the final weights."""
    stream = toy_stream(requests=settings.pop("requests", [EVEN_ROWS, TWO_ROWS]), epochs_per_request=2)
    ckpt_path = settings.pop("ckpt_path", None)
    module = module or ToyModule()
    trainer(root, callbacks, **settings).fit(module, datamodule=stream, ckpt_path=ckpt_path)
    return weights(module)


def edit() -> RequestCallback:
    """Serves without a step."""
    return SelectiveSynapticDampening(alpha=1.2)


def stopping() -> RequestCallback:
    """Serves until its floor ends it, inside an epoch."""
    return Unlearn(GradientAscent(bound=None), retain=None, forget_weight=50.0, utility_floor=0.99, utility_every=1)


def saver(directory: Path) -> ModelCheckpoint:
    """A checkpoint at every step."""
    return ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.parametrize("make", [edit, stopping])
def test_resumes_behind_steps_left_out(make: Any, tmp_path: Path) -> None:
    """From every step of the task after the request to the same bits, and its end is told to what learns."""
    straight = make()
    expected = serve(tmp_path / "a", [EWC(10.0), straight, saver(tmp_path)])
    served = straight.ledger.records[0].steps
    # of two epochs of three batches; the task behind has two of two left
    assert served < 6
    for step in range(6 + served, 10 + served):
        resumed = make()
        callbacks: list[Any] = [EWC(10.0), resumed, saver(tmp_path)]
        found = serve(tmp_path / f"b{step}", callbacks, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert torch.equal(found, expected)
        assert callbacks[0].ended_tasks == resumed.ended_tasks == straight.ended_tasks == {"learn": 2, "forget": 2}
        assert (callbacks[0].completed_tasks, resumed.completed_tasks) == (2, 2)


class EpochStarts(ContinualCallback):
    """A learning method that acts at the start of an epoch."""

    needs_state = False

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append(trainer.current_epoch)


def test_methods_rest_from_the_start_of_an_epoch(tmp_path: Path) -> None:
    """Before the task is opened: in no epoch of a request, the first of a stream included, and in all others."""
    between, alone = EpochStarts(), EpochStarts()
    serve(tmp_path / "a", [between, Unlearn("npo")])
    assert between.seen == [0, 1, 4, 5]
    data = UnlearningDataModule(toy_data(), toy_data(16, seed=1), batch_size=8, requests=[TWO_ROWS])
    trainer(tmp_path / "b", [alone, Unlearn("npo")]).fit(ToyModule(), datamodule=data)
    assert alone.seen == []


class Normalised(ToyModule):
    """The toy module with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.model.insert(1, nn.BatchNorm1d(8))


class Interrupted(Callback):
    """Ends a fit in the first step of a request."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if pl_module.current_task.kind == "forget":
            raise RuntimeError("interrupted")


def test_a_fit_after_an_interrupted_one(tmp_path: Path) -> None:
    """The request that an error left open is not that of the next fit, which learns with statistics that move."""
    unlearn, fresh = Unlearn("npo"), Unlearn("npo")
    with pytest.raises(RuntimeError, match="interrupted"):
        serve(tmp_path / "a", [unlearn, Interrupted()])
    again, expected = Normalised(), Normalised()
    serve(tmp_path / "a", [unlearn], again)
    serve(tmp_path / "b", [fresh], expected)
    assert torch.equal(again.model[1].running_mean, expected.model[1].running_mean)
    torch.testing.assert_close(weights(again), weights(expected), rtol=0, atol=0)


class Unevaluated(ToyModule):
    """The toy module without a validation step, which Lightning would miss the data of."""

    validation_step = LightningModule.validation_step


def loaders() -> dict[str, DataLoader[Any]]:
    """Four samples to forget and four others."""
    inputs, labels = toy_data().tensors
    parts = {"forget": slice(0, 4), "retain": slice(8, 12)}
    return {name: DataLoader(TensorDataset(inputs[rows], labels[rows]), batch_size=4) for name, rows in parts.items()}


def test_every_fit_on_loaders_is_served(tmp_path: Path) -> None:
    """A ledger that is carried on names them apart, for nothing tells whether they ask for the same."""
    ledger = tmp_path / "model.jsonl"
    for _ in range(2):
        module = Unevaluated()
        before = weights(module)
        trainer(tmp_path, [Unlearn("npo", ledger_file=str(ledger))], max_epochs=1).fit(module, loaders())
        assert (weights(module) - before).abs().max() > 1e-3
    assert [record.name for record in Ledger.read(ledger).records] == ["fit 1", "fit 2"]


def test_loaders_after_a_stream(tmp_path: Path) -> None:
    """Scores of a stream's samples are no reference for loaders: the same callback then keeps a copy of the weights."""
    unlearn = Unlearn("npo")
    serve(tmp_path / "a", [unlearn])
    module, expected = Unevaluated(), Unevaluated()
    trainer(tmp_path / "b", [unlearn], max_epochs=1).fit(module, loaders())
    trainer(tmp_path / "c", [Unlearn("npo")], max_epochs=1).fit(expected, loaders())
    torch.testing.assert_close(weights(module), weights(expected), rtol=0, atol=0)


def test_a_rehearsal_serves_nothing(tmp_path: Path) -> None:
    """What `fast_dev_run` did is not written down: the request is still to be served."""
    ledger = tmp_path / "model.jsonl"
    data = UnlearningDataModule(toy_data(), toy_data(16, seed=1), batch_size=8, requests=[TWO_ROWS])
    unlearn = Unlearn("npo", ledger_file=str(ledger))
    trainer(tmp_path, [unlearn], fast_dev_run=True).fit(ToyModule(), datamodule=data)
    assert len(unlearn.ledger) == 1
    assert not ledger.exists()


@pytest.mark.filterwarnings("ignore:Request '.*' was served on")
def test_a_model_destroyed_has_a_ledger(tmp_path: Path) -> None:
    """Measurements that are no numbers equal nothing, and the ledger is still that of the run."""
    unlearn = Unlearn(GradientAscent(bound=None), retain=None, forget_weight=1e30)
    serve(tmp_path, [unlearn])
    assert (
        unlearn.ledger.records[0].after["forget/probability"] != unlearn.ledger.records[0].after["forget/probability"]
    )
    serve(tmp_path, [unlearn], requests=[EVEN_ROWS, TWO_ROWS, ForgetRequest("one row", rows=[5])])
    assert len(Ledger.read(tmp_path / "requests.jsonl")) == 3


def test_a_shorter_ledger_of_another_run(tmp_path: Path) -> None:
    """It would be lost behind the records of this one."""
    unlearn = Unlearn("npo")
    serve(tmp_path / "other", [Unlearn("simnpo")], requests=[TWO_ROWS])
    serve(tmp_path / "a", [unlearn])
    with pytest.raises(ValueError, match="holds records of another run"):
        serve(tmp_path / "other", [unlearn], requests=[ForgetRequest("one row", rows=[5])])


@pytest.mark.filterwarnings("ignore:Request '.*' was served on")
def test_a_record_taken_off_the_end(tmp_path: Path) -> None:
    """The checkpoint still has it: an error, until the file is whole again or written anew."""
    serve(tmp_path, [Unlearn("npo"), saver(tmp_path)])
    path, last = tmp_path / "requests.jsonl", max(tmp_path.glob("*.ckpt"), key=lambda file: int(file.stem[5:]))
    lines = path.read_text().splitlines(keepends=True)
    more = [EVEN_ROWS, TWO_ROWS, ForgetRequest("one row", rows=[5])]
    assert len(lines) == 2
    # the checkpoint was written inside the second request
    path.write_text("")
    with pytest.raises(ValueError, match="lacks the last records that the checkpoint has, of 'even rows'"):
        serve(tmp_path, [Unlearn("npo"), saver(tmp_path)], ckpt_path=last, requests=more)
    path.unlink()
    serve(tmp_path, [Unlearn("npo"), saver(tmp_path)], ckpt_path=last, requests=more)
    assert path.read_text().splitlines(keepends=True)[0] == lines[0]
    assert [record.name for record in Ledger.read(path).records] == ["even rows", "two rows", "one row"]


def test_a_setting_that_is_no_number_of_json(tmp_path: Path) -> None:
    """It stands as text in the ledger."""
    serve(tmp_path, [SelectiveSynapticDampening(alpha=float("inf"))], requests=[TWO_ROWS])
    assert Ledger.read(tmp_path / "requests.jsonl").records[0].settings["alpha"] == "inf"


class Unsupervised(TensorDataset):
    """Toy data with one sample that no label supervises."""

    def __init__(self) -> None:
        inputs, labels = toy_data().tensors
        super().__init__(inputs, labels.index_fill(0, torch.tensor([3]), -100))


def test_a_sample_without_supervision_among_cached_scores(tmp_path: Path) -> None:
    """It has no part in the loss, and the cached scores are the same reference as a copy of the weights."""

    def run(policy: Any) -> Tensor:
        request = ForgetRequest("three rows", rows=[1, 2, 3])
        data = UnlearningDataModule(Unsupervised(), batch_size=8, epochs_per_request=3, requests=[request])
        module = ToyModule()
        trainer(tmp_path / policy, [Unlearn("npo", reference=policy)]).fit(module, datamodule=data)
        return weights(module)

    torch.testing.assert_close(run("cached_scores"), run("copy"), rtol=0, atol=1e-6)


class Autoencoder(LightningModule):
    """A module without class scores, and data without labels."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 3), nn.Linear(3, 6)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        decoded = nn.functional.linear(self.encoder(batch["inputs"]), self.decoder.weight, self.decoder.bias)
        return (decoded - batch["inputs"]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Lightning warns of a module without one."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Unlabelled(Dataset[Any]):
    """Toy inputs in mappings."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"inputs": toy_data().tensors[0][row]}


def test_activations_need_no_labels(tmp_path: Path) -> None:
    """RMU forgets where there is nothing to measure; the ledger says that nothing was."""
    data = UnlearningDataModule(Unlabelled(), batch_size=8, requests=[TWO_ROWS])
    unlearn = Unlearn(RMU(layer="encoder", coefficient=2.0), retain="own")
    trainer(tmp_path, [unlearn]).fit(Autoencoder(), datamodule=data)
    record = unlearn.ledger.records[0]
    assert (record.steps, record.before, record.after) == (1, {}, {})
