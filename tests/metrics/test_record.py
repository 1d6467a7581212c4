"""The run record on disk: round trip, atomic writes, clear errors."""

from __future__ import annotations

import csv
import json
import math
import os

import pytest

from lightning_cl.metrics.record import RunRecord, WithinTask, read_records, write_record

WITHIN = WithinTask(step=[10, 20], task=[0, 1], scores=[[0.5, math.nan, math.nan], [0.25, 0.75, math.nan]])


def make_record(method: str = "ewc", seed: int = 0, **changes) -> RunRecord:
    """Build a record of three tasks with all fields set."""
    arguments = {
        "method": method,
        "seed": seed,
        "monitor": "val_acc",
        "task_names": ["digits 0-1", "digits 2-3", "digits 4-5"],
        "matrix": [[0.9, math.nan, math.nan], [0.5, 0.9, math.nan], [0.4, 0.5, 0.9]],
        "summary": {"forgetting": 0.45},
        "config": "model:\n  lr: 0.1\n",
        "train_seconds": 10.0,
        "peak_memory_mib": 400.0,
        "versions": {"torch": "2.13.0"},
        "created": "2026-01-15T10:12:03+00:00",
    }
    return RunRecord(**{**arguments, **changes})


def test_round_trip(tmp_path):
    """What is read equals what was written, all fields set and all optional fields left out."""
    full = make_record(
        within=WITHIN,
        better="lower",
        further={"val_loss": [[0.1, math.nan, math.nan], [0.2, 0.3, math.nan], [0.4, 0.5, 0.6]]},
        samples=[{"Once": " upon"}, {}, {"Once": " more"}],
    )
    least = RunRecord(method="er", monitor="val_f1", task_names=["a"], matrix=[[0.25]])
    write_record(tmp_path / "deep" / "full", full)
    write_record(tmp_path / "least", least)
    assert read_records([tmp_path / "deep" / "full", tmp_path / "least" / "record.json"]) == [full, least]
    assert full.R[0].isnan().tolist() == [False, True, True]


def test_joint_record_round_trip(tmp_path):
    """The one row of a joint run keeps what it trained."""
    write_record(tmp_path, make_record("joint", matrix=[[0.9, 0.8, 0.7]], trained=[[0, 1, 2]]))
    (record,) = read_records([tmp_path])
    assert record.trained == [[0, 1, 2]]
    assert record.row_name(0) == "all tasks"


def test_files_are_plain(tmp_path):
    """Strict JSON with null for what was not evaluated; a CSV with a row for each task learned; nothing else."""
    matrix = [[0.5, math.nan], [math.inf, 1 / 3]]
    write_record(tmp_path, make_record(task_names=["a", "b"], matrix=matrix, summary={"forgetting": math.nan}))
    content = json.loads((tmp_path / "record.json").read_text(), parse_constant=pytest.fail)
    assert content["version"] == 1
    assert content["matrix"] == [[0.5, None], [None, 1 / 3]]
    assert content["summary"] == {"forgetting": None}
    with (tmp_path / "matrix.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["trained", "a", "b"]
    assert rows[1] == ["a", "0.5", ""]
    assert rows[2] == ["b", "", repr(1 / 3)]
    assert sorted(os.listdir(tmp_path)) == ["matrix.csv", "record.json"]


def test_failed_write_leaves_the_old_record(tmp_path, monkeypatch):
    """A crash before the rename changes nothing and leaves no temporary file."""
    write_record(tmp_path, make_record())
    before = (tmp_path / "record.json").read_bytes()

    def crash(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="disk full"):
        write_record(tmp_path, make_record("other"))
    assert (tmp_path / "record.json").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["matrix.csv", "record.json"]


def test_reading_does_not_change_the_file(tmp_path):
    """Bytes and modification time stay."""
    path = write_record(tmp_path, make_record())
    os.utime(path, ns=(1_000, 1_000))
    before = path.read_bytes()
    read_records([tmp_path])
    assert path.read_bytes() == before
    assert path.stat().st_mtime_ns == 1_000


def test_folders_are_searched_and_records_read_once(tmp_path):
    """A folder of runs gives them by name; naming a run twice does not count it twice."""
    for seed in (1, 0):
        write_record(tmp_path / "runs" / f"seed_{seed}", make_record(seed=seed))
    assert [record.seed for record in read_records([tmp_path])] == [0, 1]
    twice = [tmp_path / "runs" / "seed_1", tmp_path / "runs" / ".." / "runs", tmp_path / "runs/seed_1/record.json"]
    assert [record.seed for record in read_records(twice)] == [1, 0]


def test_recurring_rows_are_named_by_what_they_trained():
    """Visits 0, 1, 0, a row over two of three tasks, and a row that learned nothing."""
    record = make_record(matrix=[[0.5] * 3] * 5, trained=[0, 1, 0, [1, 2], []])
    names = [record.row_name(row) for row in range(5)]
    assert names == ["digits 0-1", "digits 2-3", "digits 0-1", "digits 2-3 + digits 4-5", "no task"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 0}, "version 0, this release reads version 1"),
        ({"version": None}, "version None"),
        ({"method": 3}, "`method` must be text, got 3"),
        ({"matrix": [[0.5]]}, "3 tasks, but `matrix` has a row of 1 scores"),
        ({"matrix": []}, "no task or no row"),
        ({"matrix": [["0.5", 1, 1]]}, "`matrix` must be a list of rows of numbers"),
        ({"matrix": [[0.5] * 3] * 4}, "more rows than tasks; `trained`"),
        ({"trained": [0]}, "`trained` of ewc, seed 0 has 1 rows for 3"),
        ({"trained": [0, 1, 3]}, "task outside 0 to 2"),
        ({"trained": "all"}, "`trained` must be null or"),
        ({"task_names": "abc"}, "`task_names` must be a list of text"),
        ({"seed": "1"}, "`seed` must be a number or null"),
        ({"summary": {"forgetting": "low"}}, "`summary` must map names to numbers"),
        ({"versions": []}, "`versions` must map names to text"),
        ({"within": []}, "`within` must map"),
        ({"within": {"step": [1], "task": [], "scores": []}}, "differ in length"),
        ({"better": "best"}, "`better` must be 'higher' or 'lower', got 'best'"),
        ({"further": []}, "`further` must map names to matrices"),
        ({"further": {"val_loss": [[0.5]]}}, r"3 tasks, but `further\['val_loss'\]` has a row of 1 scores"),
        ({"further": {"val_loss": [["0.5", 1, 1]]}}, "`val_loss` must be a list of rows of numbers"),
        ({"samples": [{"Once": 1}]}, "`samples` must be a list that maps prompts to text"),
        ({"samples": [{}] * 4}, "4 rows of `samples` for 3 of scores"),
        ({"surprise": 1}, "unexpected keyword argument 'surprise'"),
    ],
)
def test_wrong_record_is_refused_in_one_line(tmp_path, change, message):
    """The message names the file and what is wrong with it."""
    path = write_record(tmp_path, make_record())
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message) as caught:
        read_records([tmp_path])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[]", "not a record of a run"),
        (b'{"accuracy": 1}', "has no `version`"),
        (b'{"version": 1}', "missing .* required positional arguments: 'method'"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, content, message):
    """Files that are no record at all."""
    (tmp_path / "record.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_records([tmp_path])
    assert "\n" not in str(caught.value)


def test_missing_paths_are_refused(tmp_path):
    """A path that is not there, and a folder without a record."""
    with pytest.raises(ValueError, match="nothing does not exist"):
        read_records([tmp_path / "nothing"])
    with pytest.raises(ValueError, match=r"no record\.json in"):
        read_records([tmp_path])


def test_records_compare_after_nan_was_replaced():
    """NaN would make a record differ from itself."""
    assert WithinTask([1], [0], [[math.nan]]) == WithinTask([1], [0], [[None]])
