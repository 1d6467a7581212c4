"""The examples run, and show what they say."""

from __future__ import annotations

import difflib
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from lightning_cl.cli.main import main
from lightning_cl.datamodules import ClassIncremental, TaskStreamDataModule, TextFileSource

ROOT = Path(__file__).parents[1]
PROJECT, CLI, GUIDES = ROOT / "examples" / "existing_project", ROOT / "examples" / "cli", ROOT / "docs" / "guides"
CLINC150 = ROOT.parent / "shared" / "data" / "clinc150" / "data_full.json"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.logger=false"]
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Import the scripts as from their own folder, and forget them afterwards."""
    monkeypatch.syspath_prepend(str(PROJECT))
    names = [path.stem for path in PROJECT.glob("*.py")]
    yield
    for name in names:
        sys.modules.pop(name, None)


def script(name: str) -> ModuleType:
    """Return a script of the project as a module."""
    return importlib.import_module(name)


# ---------------------------------------------------------------------- an existing project


@pytest.mark.usefixtures("project")
def test_callbacks_cure_the_existing_project() -> None:
    """The months before the last are lost without the callbacks, and kept with them."""
    before, after = script("before").main(epochs=6), script("after").main(epochs=6)
    assert max(before[:4]) < 0.1
    assert min(after[:3]) > 0.5


@pytest.mark.usefixtures("project")
def test_stream_takes_the_place_of_the_datamodule(capsys: pytest.CaptureFixture[str]) -> None:
    """One fit runs all months, and the metrics are printed."""
    scores = script("after_stream").main(epochs=6)
    assert len(scores) == 5
    assert min(scores[:3]) > 0.5
    assert "'forgetting'" in capsys.readouterr().out
    assert json.loads(Path("runs/after_stream/record.json").read_text())["method"] == "EWC+ExperienceReplay"


@pytest.mark.usefixtures("project")
def test_refresh_job_remembers_the_month_before(tmp_path: Path) -> None:
    """Each month is a job of its own, with the last checkpoint."""
    refresh = script("refresh").main
    refresh(0, tmp_path)
    assert min(refresh(1, tmp_path)) > 0.8


@pytest.mark.parametrize("script_name", ["after.py", "after_stream.py"])
def test_readme_shows_the_true_diff(script_name: str) -> None:
    """What a reader copies from the README is what the scripts hold."""
    old, new = ((PROJECT / name).read_text("utf-8").splitlines() for name in ("before.py", script_name))
    diff = "\n".join(difflib.unified_diff(old, new, "before.py", script_name, lineterm="", n=1))
    assert f"```diff\n{diff}\n```" in (PROJECT / "README.md").read_text("utf-8")


# ---------------------------------------------------------------------- the command line


def test_demo_fits_and_resumes(tmp_path: Path) -> None:
    """By the commands of the README, with the key ``methods`` in place."""
    command = ["fit", "--config", str(CLI / "demo.yaml"), "--data.epochs_per_task=1", *QUIET]
    command += ["--trainer.callbacks+=EWC", "--trainer.callbacks.strength=1000"]
    command += ["--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={tmp_path}"]
    command += ["--trainer.callbacks.every_n_train_steps=10", "--trainer.callbacks.save_last=true"]
    main(command)
    main([*command, "--ckpt_path", str(tmp_path / "last.ckpt")])
    assert (tmp_path / "last.ckpt").is_file()


def test_online_fits() -> None:
    """A single pass over a blurry stream, with the curves within the tasks."""
    main(["fit", "--config", str(CLI / "online.yaml"), *QUIET])
    record = json.loads(Path("record.json").read_text())
    assert record["summary"]["average_accuracy"] > 0.5
    assert len(record["within"]["step"]) > len(record["matrix"]) == 5


def test_learns_forgets_and_forgets_more() -> None:
    """By the two commands of the README, fewer epochs apart."""
    run, request, folder = CLI / "unlearn.yaml", CLI / "request.yaml", Path("runs/unlearn")
    main(["fit", "--config", str(run), "--data.epochs_per_task=2", *QUIET])
    short = run.read_text("utf-8").replace("epochs_per_task: 10", "epochs_per_task: 2")
    Path("run.yaml").write_text(short.replace("max_epochs: -1", "enable_progress_bar: false"))
    arguments = [
        "--request",
        str(request),
        "--checkpoint",
        str(folder / "last.ckpt"),
        "--output",
        str(folder / "model"),
    ]
    main(["unlearn", "run.yaml", *arguments])
    lines = (folder / "model" / "requests.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["zeros", "customer 17"]
    assert (folder / "model" / "request_2_customer-17.html").is_file()


@pytest.mark.parametrize("name", ["text.yaml", "text_transformer.yaml"])
def test_text_example_is_a_stream_of_any_labelled_texts(name: str, tmp_path: Path) -> None:
    """The config fits a file in the form of CLINC150, with the path in the one place where it stands."""
    topics = [[f"{word} {number}", word] for word in ("ask", "book", "call", "dial") for number in range(8)]
    (tmp_path / "texts.json").write_text(json.dumps({"train": topics, "val": topics, "test": topics}))
    text = (CLI / name).read_text("utf-8")
    assert text.count("data/clinc150/data_full.json") == 1
    text = text.replace("data/clinc150/data_full.json", str(tmp_path / "texts.json"))
    (tmp_path / "text.yaml").write_text(text.replace("n_tasks: 15", "n_tasks: 2"))
    main(["fit", "--config", str(tmp_path / "text.yaml"), "--data.epochs_per_task=1", *QUIET])
    assert len(json.loads(Path("record.json").read_text())["matrix"]) == 2


# ---------------------------------------------------------------------- CLINC150


def test_clinc150_is_fifteen_tasks_of_ten_intents(tmp_path: Path) -> None:
    """The real data: the split, and a run of two epochs that learns the first tasks."""
    if not CLINC150.is_file():
        pytest.skip("CLINC150 is not here; examples/cli/README.md says where to get it")
    train = TextFileSource(CLINC150, "train", label_field="train")
    stream = TaskStreamDataModule(train, scenario=ClassIncremental(n_tasks=15, order="shuffled"))
    stream.setup("fit")
    assert [len(task.classes) for task in stream.tasks] == [10] * 15
    assert {task.length for task in stream.tasks} == {1000}
    assert sorted(stream.tasks[-1].seen_classes) == list(range(150))

    text = (CLI / "text.yaml").read_text("utf-8").replace("data/clinc150/data_full.json", str(CLINC150))
    (tmp_path / "text.yaml").write_text(text.replace("learning_rate: 0.001", "learning_rate: 0.01"))
    replay = ["--trainer.callbacks+=ExperienceReplay", "--trainer.callbacks.capacity=1500"]
    main(["fit", "--config", str(tmp_path / "text.yaml"), "--data.epochs_per_task=2", *replay, *QUIET])
    summary = json.loads(Path("record.json").read_text())["summary"]
    assert summary["learning_accuracy"] > 0.6
    assert summary["average_accuracy"] > 0.3


# ---------------------------------------------------------------------- guides


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`:UserWarning")
@pytest.mark.parametrize("guide", sorted(GUIDES.glob("*.md")), ids=lambda path: path.stem)
def test_snippets_of_the_guide_run(guide: Path) -> None:
    """All ``python`` blocks of a page, one after the other; those with a title are files for several processes."""
    blocks = PYTHON.findall(guide.read_text("utf-8"))
    exec(compile("\n".join(blocks), str(guide), "exec"), {"__name__": "__main__"})
