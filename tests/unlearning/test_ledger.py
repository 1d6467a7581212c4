"""The ledger: a chain of records that are appended, written as JSON Lines, and never changed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_cl.core.requests import Influence
from lightning_cl.unlearning import Ledger, RequestRecord
from lightning_cl.unlearning.ledger import hash_of_ids


def record(name: str, previous: str = "", **changes: Any) -> RequestRecord:
    """A record of a request for two samples."""
    settings: dict[str, Any] = {
        "asked": 3,
        "ids": [2, 5],
        "ids_hash": hash_of_ids(torch.tensor([2, 5])),
        "samples_hash": "cd",
        "method": "npo",
        "settings": {"retain": "nll"},
        "seed": 3,
        "reference_hash": None,
        "weights_hash": "ab",
        "started": "2026-01-01T00:00:00+00:00",
        "ended": "2026-01-01T00:01:00+00:00",
        "steps": 4,
        "stopped": None,
        "before": {"forget/probability": 0.5},
        "after": {"forget/probability": 0.1},
        "influences": [Influence("EWC", "importances", "recomputed", 2)],
    }
    return RequestRecord(name=name, previous=previous, **(settings | changes))


def chain(*names: str) -> Ledger:
    """A ledger of requests."""
    ledger = Ledger()
    for name in names:
        ledger.append(record(name, ledger.last_hash))
    return ledger


def test_the_hash_of_ids_is_that_of_their_set() -> None:
    """The order does not matter, a sample does; it is the SHA-256 of little-endian 64-bit integers."""
    assert hash_of_ids(torch.tensor([5, 2, 2])) == hash_of_ids(torch.tensor([2, 5]))
    assert hash_of_ids(torch.tensor([2, 5])) != hash_of_ids(torch.tensor([2, 6]))
    assert hash_of_ids(torch.tensor([1])) == "7c9fa136d4413fa6173637e883b6998d32e1d675f88cddff9dcbcf331820f4b8"


def test_written_and_read_again(tmp_path: Path) -> None:
    """Lines are appended, once each, and give the same records."""
    ledger, path = chain("a"), tmp_path / "folder" / "requests.jsonl"
    ledger.write(path)
    first = path.read_text()
    ledger.append(record("b", ledger.last_hash))
    ledger.write(path)
    ledger.write(path)
    assert path.read_text().startswith(first)
    assert Ledger.read(path).records == ledger.records
    assert [json.loads(line)["name"] for line in path.read_text().splitlines()] == ["a", "b"]
    found = ledger.find("b")
    assert found is not None
    assert found.num_ids == 2
    assert ledger.find("c") is None


def test_a_changed_record_breaks_the_chain(tmp_path: Path) -> None:
    """A line that was edited, or taken out, is found when the file is read."""
    path = tmp_path / "requests.jsonl"
    chain("a", "b", "c").write(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0].replace('"steps": 4', '"steps": 5'), *lines[1:]]))
    with pytest.raises(ValueError, match="does not follow the one before"):
        Ledger.read(path)
    path.write_text("\n".join([lines[0], lines[2]]))
    with pytest.raises(ValueError, match="does not follow"):
        Ledger.read(path)
    path.write_text('{"name": "x"}')
    with pytest.raises(ValueError, match="No record of a request"):
        Ledger.read(path)


def test_a_request_is_not_recorded_twice() -> None:
    """Nor a record behind another than the last."""
    ledger = chain("a")
    with pytest.raises(ValueError, match="not served twice"):
        ledger.append(record("a", ledger.last_hash))
    with pytest.raises(ValueError, match="does not follow"):
        ledger.append(record("b"))


def test_a_run_that_went_on_from_an_earlier_checkpoint(tmp_path: Path) -> None:
    """What it did anew takes the place of what was done after that checkpoint; both lines stay in the file."""
    path = tmp_path / "requests.jsonl"
    first = chain("a", "b")
    first.write(path)
    again = chain("a")
    again.append(replace(record("b", again.last_hash), ended="2026-01-02T00:00:00+00:00"))
    again.write(path)
    assert len(path.read_text().splitlines()) == 3
    assert Ledger.read(path).records == again.records
    assert chain("a").starts(first)
    assert not first.starts(chain("a"))


def test_a_measurement_that_is_no_number(tmp_path: Path) -> None:
    """It is null in the file, which is strict JSON, and NaN where it is read; the hash is the same."""
    path = tmp_path / "requests.jsonl"
    destroyed = record("a", before={"forget/probability": 0.5}, after={"x": float("nan"), "y": float("-inf"), "z": 2})
    ledger = Ledger([destroyed])
    ledger.write(path)
    line = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert line["after"] == {"x": None, "y": None, "z": 2}
    (read,) = Ledger.read(path).records
    assert math.isnan(read.after["x"])
    assert math.isnan(read.after["y"])
    assert (read.after["z"], read.before, read.hash) == (2, {"forget/probability": 0.5}, destroyed.hash)


def test_a_file_beside_the_records_of_a_checkpoint(tmp_path: Path) -> None:
    """It may go on behind them or be missing; without their last, or with others, it is an error."""
    path, ledger = tmp_path / "requests.jsonl", chain("a", "b")
    assert ledger.check_written(path, "x.ckpt").records == ledger.records
    chain("a", "b", "c").write(path)
    assert [r.name for r in ledger.check_written(path, "x.ckpt").records] == ["a", "b", "c"]
    first = path.read_text().splitlines()[0]
    for text in (first + "\n", ""):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"lacks the last records that x\.ckpt has, of .*'b'.* move it away"):
            ledger.check_written(path, "x.ckpt")
    path.unlink()
    Ledger([record("a", steps=7)]).write(path)
    with pytest.raises(ValueError, match="holds records of another run"):
        ledger.check_written(path, "x.ckpt")
