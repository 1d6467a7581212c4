"""The script that gathers text for the cluster example finds it, keeps to its bounds, and says what is missing."""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from lightning_cl.datamodules import InstructionSource, PackedTextSource

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
    train, val = (texts(tmp_path / "one" / f"python.text.{part}.jsonl") for part in ("train", "val"))
    assert not set(train) & set(val)
    for part, limit in ((train, 400_000), (val, 100_000)):
        assert limit <= sum(map(len, part)) < limit + domains.LENGTHS[1]
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == [f"python.{kind}.{part}.jsonl" for kind in ("instructions", "text") for part in ("train", "val")]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    source = PackedTextSource(str(tmp_path / "one" / "python.text.train.jsonl"), 256, cache_dir=tmp_path)
    assert source.num_documents == len(train)
    asked = InstructionSource(str(tmp_path / "one" / "python.instructions.train.jsonl"), 1024, cache_dir=tmp_path)
    assert asked.num_examples + asked.num_skipped > 100
    files = [
        {json.loads(line)["file"] for line in (tmp_path / "one" / name).read_text("utf-8").splitlines()}
        for name in names[:2]
    ]
    assert not files[0] & files[1], "a file asks in one part only"


def test_what_is_asked_of_each_domain(domains: ModuleType) -> None:
    """Docstrings by their functions, declarations by their comments, purposes and options by their names."""
    python = '''
def bare(x): ...

class A:
    def area(self, width: int, *, height=2):
        """Return the area.

        Further words.
        """
'''
    assert list(domains.docstrings(Path("shape.py"), python)) == [
        (
            "Write the docstring of this function in shape.py:\ndef area(self, width: int, *, height=2):",
            "Return the area.",
        )
    ]
    header = (
        "/* The largest\n   number.  */\n#define MOST 32767\n"
        "/* Print what S says.  */\nextern int say (const char *s);\nint x;\n"
    )
    assert list(domains.declarations(Path("say.h"), header)) == [
        ("Declare in C, as say.h does:\nThe largest number.", "#define MOST 32767"),
        ("Declare in C, as say.h does:\nPrint what S says.", "extern int say (const char *s);"),
    ]
    page = (
        ".TH LS 1\n.SH NAME\nls \\- list directory\ncontents\n.SH OPTIONS\n"
        ".TP\n\\fB\\-a\\fR, \\fB\\-\\-all\\fR\nshow what begins with a dot\n.PP\n"
    )
    assert list(domains.answers(Path("ls.1.gz"), page)) == [
        ("What does the command ls do?", "list directory contents"),
        ("What does the option -a, --all of ls do?", "show what begins with a dot"),
    ]
    assert list(domains.docstrings(Path("broken.py"), "def (")) == []
    assert list(domains.answers(Path("README"), "no manual page")) == []


def test_what_a_machine_lacks_is_left_out(
    domains: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a message; compressed pages are read, what is no text and what is there twice are passed over."""
    pages = tmp_path / "pages"
    pages.mkdir()
    for number in range(20):
        text = f".SH NAME\nx{number} \\- what number {number} does\n.SH DESCRIPTION\n" + f"page {number} " * 40
        (pages / f"x{number}.1.gz").write_bytes(gzip.compress(text.encode()))
        (pages / f"x{number}.copy").write_text(text)
    (pages / "broken.gz").write_bytes(b"no gzip " * 40)
    (pages / "latin").write_bytes(b"\xe9" * 400)
    found = {
        "manual": (lambda: list(pages.iterdir()), domains.answers, "manual pages"),
        "c": (lambda: [tmp_path / "missing.h"], domains.declarations, "a compiler"),
    }
    monkeypatch.setattr(domains, "DOMAINS", found)
    assert domains.main([str(tmp_path / "out"), "--val_share", "0.5"]) == 0
    assert "c: left out, this machine lacks a compiler" in capsys.readouterr().err
    written = [text for part in ("train", "val") for text in texts(tmp_path / "out" / f"manual.text.{part}.jsonl")]
    assert len(written) == len(set(written)) == 20
    assert all(text.startswith(".SH NAME") for text in written)
    asked = [(tmp_path / "out" / f"manual.instructions.{part}.jsonl").read_text("utf-8") for part in ("train", "val")]
    assert "".join(asked).count("\n") == 20
    assert '"What does the command x7 do?", "response": "what number 7 does"' in "".join(asked)
    assert not list((tmp_path / "out").glob("c.*"))
    monkeypatch.setattr(domains, "DOMAINS", {"c": found["c"]})
    assert domains.main([str(tmp_path / "out")]) == 1
