"""`lightning-cl unlearn`: requests served one after another on the model of a finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_cl.cli.main import main
from lightning_cl.cli.unlearn import read_requests
from lightning_cl.unlearning import Ledger

CONFIG: dict[str, Any] = {
    "trainer": {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {"class_path": "ExperienceReplay", "init_args": {"capacity": 40}},
            {"class_path": "Unlearn", "init_args": {"method": {"class_path": "NPO", "init_args": {"beta": 0.5}}}},
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "learned"}},
        ],
    },
    "model": {
        "class_path": "Classifier",
        "init_args": {
            "network": {"class_path": "MLP", "init_args": {"num_inputs": 64, "num_outputs": 10, "hidden": [16]}}
        },
    },
    "data": {
        "class_path": "TaskStreamDataModule",
        "init_args": {
            "train": {"class_path": "DigitsSource", "init_args": {"split": "train"}},
            "val": {"class_path": "DigitsSource", "init_args": {"split": "val"}},
            "scenario": {"class_path": "ClassIncremental", "init_args": {"n_tasks": 2}},
            "batch_size": 64,
        },
    },
}


@pytest.fixture
def learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config, two requests and the checkpoint of the run, which is the present folder."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump(CONFIG))
    Path("first.yaml").write_text("name: digit 3\nclasses: [3]\n")
    Path("second.json").write_text(json.dumps([{"name": "customer", "rows": [1, 2, 3, 4]}]))
    main(["fit", "--config", "run.yaml"])
    return next(Path("learned").iterdir())


def test_one_request_after_another(learned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each goes on from the model that the one before left, and leaves ledger, model, config and pages."""
    main(["unlearn", "run.yaml", "--request", "first.yaml", "--checkpoint", str(learned), "--output", "model"])
    before = torch.load("model/model.ckpt", weights_only=False)
    main(["unlearn", "run.yaml", "--request", "second.json", "--output", "model", "--epochs", "3"])
    first, second = Ledger.read("model/requests.jsonl").records
    # one of the four is a 3, and gone already
    assert (first.name, second.name, second.num_ids, second.steps) == ("digit 3", "customer", 3, 3)
    assert "request:digit 3/probability" in second.after
    assert [(i.owner, i.outcome) for i in first.influences] == [("ExperienceReplay", "removed")]
    after = torch.load("model/model.ckpt", weights_only=False)
    assert after["global_step"] == before["global_step"] + 3
    buffer = after["callbacks"]["ExperienceReplay"]["buffer"][0]
    assert set(first.ids) | {1, 2, 3, 4} <= set(buffer["purged"].tolist())
    assert "report: " in capsys.readouterr().out
    assert (Path("model") / "requests.html").read_text().count("customer") > 1
    assert yaml.safe_load(Path("model/config.yaml").read_text())["ckpt_path"] == "model/model.ckpt"


def test_nothing_new_is_an_error(learned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The requests of the ledger are not served again, and the user hears of it."""
    arguments = ["unlearn", "run.yaml", "--request", "second.json", "--checkpoint", str(learned), "--output", "model"]
    main(arguments)
    with pytest.raises(SystemExit):
        main(arguments)
    assert "there is nothing to do" in capsys.readouterr().err


def test_a_name_that_was_served_for_other_samples(learned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its samples are not taken for served."""
    arguments = ["unlearn", "run.yaml", "--checkpoint", str(learned), "--output", "model", "--request"]
    main([*arguments, "second.json"])
    Path("third.json").write_text(json.dumps({"name": "customer", "rows": [11]}))
    with pytest.raises(SystemExit):
        main([*arguments, "third.json"])
    assert "Request 'customer' was served for other samples" in capsys.readouterr().err


def test_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One line on standard error: a request that is none, a config without data."""
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text("customer: 3\n")
    Path("good.yaml").write_text("name: a\nrows: [1]\n")
    Path("run.yaml").write_text("model: 3\n")
    assert [request.rows for request in read_requests("good.yaml")] == [[1]]
    for request, message in (("good.yaml", "must name its data"), ("bad.yaml", "must hold a request such as")):
        Path("run.yaml").write_text("model: 3\n" if request == "good.yaml" else yaml.safe_dump(CONFIG))
        with pytest.raises(SystemExit):
            main(["unlearn", "run.yaml", "--request", request])
        assert message in capsys.readouterr().err


def test_a_config_that_serves_nothing(learned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The way out is named before anything runs."""
    config = yaml.safe_load(Path("run.yaml").read_text())
    config["trainer"]["callbacks"].pop(1)
    Path("run.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit):
        main(["unlearn", "run.yaml", "--request", "first.yaml", "--checkpoint", str(learned)])
    assert "no callback of the Trainer serves them" in capsys.readouterr().err


def test_a_run_that_dies_has_served_nothing(learned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's ledger gets a record when the model is saved: the next call does not take it for done."""
    arguments = ["unlearn", "run.yaml", "--request", "second.json", "--checkpoint", str(learned), "--output", "model"]

    def die(*_: Any) -> None:
        raise RuntimeError("died")

    with monkeypatch.context() as patch:
        patch.setattr("lightning_cl.cli.unlearn.SaveAtEnd.on_train_end", die)
        with pytest.raises(RuntimeError, match="died"):
            main(arguments)
    assert not Path("model/requests.jsonl").exists()
    main(arguments)
    assert [record.name for record in Ledger.read("model/requests.jsonl").records] == ["customer"]


def test_a_ledger_without_its_last_record(learned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model's checkpoint has it: an error before anything runs; without the file it is written anew."""
    arguments = ["unlearn", "run.yaml", "--request", "second.json", "--output", "model"]
    main(["unlearn", "run.yaml", "--request", "first.yaml", "--checkpoint", str(learned), "--output", "model"])
    ledger = Path("model/requests.jsonl")
    line = ledger.read_text()
    ledger.write_text("")
    with pytest.raises(SystemExit):
        main(arguments)
    assert "lacks the last records that model/model.ckpt has, of 'digit 3'" in capsys.readouterr().err
    ledger.unlink()
    main(arguments)
    assert ledger.read_text().startswith(line)
    assert [record.name for record in Ledger.read(ledger).records] == ["digit 3", "customer"]
