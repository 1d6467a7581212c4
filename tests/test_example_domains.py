"""The script that gathers text for the cluster example finds it, keeps to its bounds, and says what is missing."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from lightning_cl.datamodules import PackedTextSource

SCRIPT = Path(__file__).parents[1] / "examples" / "cluster" / "domains.py"


@pytest.fixture
def domains() -> ModuleType:
    """The script as a module of its own."""
    spec = importlib.util.spec_from_file_location("domains", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def texts(path: Path) -> list[str]:
    """The documents of a part."""
    return [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]


def test_standard_library_is_a_domain_of_bounded_size(
    domains: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each document is in one part only, and the same call writes the same files."""
    monkeypatch.setattr(domains, "DOMAINS", {"python": domains.DOMAINS["python"]})
    for folder in ("one", "two"):
        assert domains.main([str(tmp_path / folder), "--megabytes", "0.5", "--val_share", "0.2"]) == 0
    train, val = (texts(tmp_path / "one" / f"python.{part}.jsonl") for part in ("train", "val"))
    assert not set(train) & set(val)
    for part, limit in ((train, 400_000), (val, 100_000)):
        assert limit <= sum(map(len, part)) < limit + domains.LENGTHS[1]
    for part in ("train", "val"):
        first, second = (tmp_path / folder / f"python.{part}.jsonl" for folder in ("one", "two"))
        assert first.read_bytes() == second.read_bytes()
    source = PackedTextSource(str(tmp_path / "one" / "python.train.jsonl"), 256, cache_dir=tmp_path)
    assert source.num_documents == len(train)


def test_what_a_machine_lacks_is_left_out(
    domains: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a message; compressed pages are read, what is no text and what is there twice are passed over."""
    pages = tmp_path / "pages"
    pages.mkdir()
    for number in range(20):
        (pages / f"{number}.1.gz").write_bytes(gzip.compress(f"page {number} ".encode() * 40))
        (pages / f"{number}.copy").write_text(f"page {number} " * 40)
    (pages / "broken.gz").write_bytes(b"no gzip " * 40)
    (pages / "latin").write_bytes(b"\xe9" * 400)
    found = {
        "manual": (lambda: list(pages.iterdir()), "manual pages"),
        "c": (lambda: [tmp_path / "missing.h"], "a compiler"),
    }
    monkeypatch.setattr(domains, "DOMAINS", found)
    assert domains.main([str(tmp_path / "out"), "--val_share", "0.5"]) == 0
    assert "c: left out, this machine lacks a compiler" in capsys.readouterr().err
    written = texts(tmp_path / "out" / "manual.train.jsonl") + texts(tmp_path / "out" / "manual.val.jsonl")
    assert sorted(written) == sorted(f"page {number} " * 40 for number in range(20))
    assert not list((tmp_path / "out").glob("c.*"))
    monkeypatch.setattr(domains, "DOMAINS", {"c": found["c"]})
    assert domains.main([str(tmp_path / "out")]) == 1
