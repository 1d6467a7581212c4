"""The record of one run on disk: a folder with ``record.json`` and ``matrix.csv``, read by reports and comparisons."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

__all__ = ["RecordsTraces", "RunRecord", "Trace", "WithinTask", "read_records", "write_record"]

VERSION = 1
_NUMBER = (int, float, type(None))
Scores: TypeAlias = list[list[float | None]]
"""Rows of scores, one column for each task; ``None`` where a task was not evaluated."""


@dataclass(frozen=True)
class WithinTask:
    """Every evaluation made during the stream, in order, those at the ends of the tasks among them.

    Args:
        step: Optimizer steps done since the start of the stream, one entry for each evaluation.
        task: Row of the stream that was being learned, or had just been.
        scores: One row for each evaluation, one column for each task.
    """

    step: list[int] = field(default_factory=list)
    task: list[int] = field(default_factory=list)
    scores: Scores = field(default_factory=list)

    def __post_init__(self) -> None:
        """Turn ``NaN`` into ``None``."""
        object.__setattr__(self, "scores", _rows(self.scores))


@dataclass(frozen=True)
class Trace:
    """A quantity over the optimizer steps of a run, and the steps at which something happened.

    Args:
        name: What it is about, such as ``"gradient spikes"``.
        quantity: What the values are, for the axis.
        step: Numbers of optimizer steps, from 0.
        value: One value for each of them; ``None`` where it was not finite.
        marks: Steps at which something happened, by what happened there.
        level: A value to compare with, ``None`` as well where it is not finite.
        scale: Of the axis.
    """

    name: str
    quantity: str
    step: list[int]
    value: list[float | None]
    marks: dict[str, list[int]] = field(default_factory=dict)
    level: float | None = None
    scale: Literal["linear", "log"] = "linear"

    def __post_init__(self) -> None:
        """Turn ``NaN`` and infinite values into ``None`` and check that the parts fit together."""
        object.__setattr__(self, "value", [_finite(value) for value in self.value])
        object.__setattr__(self, "level", _finite(self.level))
        if len(self.step) != len(self.value):
            raise ValueError(f"`step` and `value` of the trace {self.name!r} differ in length.")


@runtime_checkable
class RecordsTraces(Protocol):
    """A callback that has curves of its own for the report."""

    def traces(self) -> list[Trace]:
        """Return them."""


@dataclass(frozen=True)
class RunRecord:
    """What one run of one method over a stream gave.

    Args:
        method: Name of the method; runs that share it are averaged, so two settings of a method need two names.
            ``"joint"`` and ``"finetune"`` are shown as the upper and the lower bound.
        monitor: Name of the score in the matrix, such as ``"val_acc"``.
        task_names: One name for each column of the matrix.
        matrix: Accuracy matrix, ``matrix[t][i]`` is the score on task ``i`` after row ``t``; give ``R.tolist()``.
            ``NaN`` and infinite scores become ``None``, *not evaluated*.
        seed: Seed of the run.
        trained: What each row trained, as for :mod:`lightning_cl.metrics.functional`: ``None`` when row ``t`` trained
            task ``t``, ``[[0, 1, 2]]`` for the joint run over three tasks.
        within: The evaluations during the stream; empty when there were none but those at the tasks' ends.
        summary: Metrics by the names of :mod:`lightning_cl.metrics.functional`; ``NaN`` becomes ``None``.
        config: The run's configuration as YAML text.
        train_seconds: Wall-clock time of the training, in seconds.
        peak_memory_mib: Peak memory of the run, in MiB.
        versions: Version of each package that matters.
        created: Time of writing, ISO 8601.
        better: Which scores are better, ``"higher"`` ones, or ``"lower"`` ones as of a perplexity.
        further: More logged values by their names, a matrix of each, shown as tables.
        samples: Texts that the module wrote after each row, by prompt; empty where it wrote none.
        traces: Curves that callbacks kept, each of which becomes a figure.
    """

    method: str
    monitor: str
    task_names: list[str]
    matrix: Scores
    seed: int | None = None
    trained: list[int | list[int]] | None = None
    within: WithinTask = field(default_factory=WithinTask)
    summary: dict[str, float | None] = field(default_factory=dict)
    config: str = ""
    train_seconds: float | None = None
    peak_memory_mib: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    better: Literal["higher", "lower"] = "higher"
    further: dict[str, Scores] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Turn ``NaN`` into ``None`` and check that the parts fit together."""
        object.__setattr__(self, "matrix", _rows(self.matrix))
        object.__setattr__(self, "further", {name: _rows(rows) for name, rows in self.further.items()})
        object.__setattr__(self, "summary", {name: _finite(value) for name, value in self.summary.items()})
        tasks = len(self.task_names)
        if not tasks or not self.matrix:
            raise ValueError(f"{self.title} has no task or no row of scores.")
        further = [(f"further[{name!r}]", rows) for name, rows in self.further.items()]
        for name, rows in (("matrix", self.matrix), ("within.scores", self.within.scores), *further):
            for row in rows:
                if len(row) != tasks:
                    raise ValueError(f"{self.title} has {tasks} tasks, but `{name}` has a row of {len(row)} scores.")
        if len(self.samples) not in (0, len(self.matrix)):
            raise ValueError(
                f"{self.title} has {len(self.samples)} rows of `samples` for {len(self.matrix)} of scores."
            )
        if not len(self.within.step) == len(self.within.task) == len(self.within.scores):
            raise ValueError(f"`step`, `task` and `scores` in `within` of {self.title} differ in length.")
        if self.trained is None:
            if len(self.matrix) > tasks:
                raise ValueError(f"{self.title} has more rows than tasks; `trained` must say what each row learned.")
        elif len(self.trained) < len(self.matrix):
            raise ValueError(
                f"`trained` of {self.title} has {len(self.trained)} rows for {len(self.matrix)} of scores."
            )
        elif any(not 0 <= task < tasks for row in range(len(self.trained)) for task in self.tasks_of(row)):
            raise ValueError(f"`trained` of {self.title} names a task outside 0 to {tasks - 1}.")

    @property
    def title(self) -> str:
        """Method and seed, for headings and messages."""
        return self.method if self.seed is None else f"{self.method}, seed {self.seed}"

    @property
    def R(self) -> Tensor:
        """The accuracy matrix as ``Tensor[T, N]`` of float64, ``NaN`` where a task was not evaluated."""
        rows = [[math.nan if score is None else score for score in row] for row in self.matrix]
        return torch.tensor(rows, dtype=torch.float64)

    def tasks_of(self, row: int) -> list[int]:
        """Return the tasks that a row of the matrix trained."""
        tasks = row if self.trained is None else self.trained[row]
        return [tasks] if isinstance(tasks, int) else list(tasks)

    def row_name(self, row: int) -> str:
        """Name what a row of the matrix trained."""
        tasks = self.tasks_of(row)
        if len(tasks) > 1 and len(set(tasks)) == len(self.task_names):
            return "all tasks"
        return " + ".join(self.task_names[task] for task in tasks) or "no task"


def write_record(directory: str | Path, record: RunRecord) -> Path:
    """Write ``record.json`` and ``matrix.csv`` into ``directory``, each at once or not at all.

    Args:
        directory: Folder of the run; made if missing. A record that is already there is replaced.
        record: The record.

    Returns:
        Path of ``record.json``.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["trained", *record.task_names])
    for row, scores in enumerate(record.matrix):
        writer.writerow([record.row_name(row), *("" if score is None else repr(score) for score in scores)])
    _write_atomically(directory / "matrix.csv", table.getvalue())
    # The record comes last: where it exists, the table beside it is complete.
    content = {"version": VERSION, **asdict(record)}
    _write_atomically(directory / "record.json", json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False))
    return directory / "record.json"


def read_records(paths: Iterable[str | Path]) -> list[RunRecord]:
    """Read the records of runs; nothing on disk is changed.

    Args:
        paths: ``record.json`` files, run folders that hold one, or folders with such run folders at any depth. The
            order is kept, a record that is reached twice is read once.

    Raises:
        ValueError: If a path does not exist or holds no record, or a record is not one that this release reads.
    """
    files: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path} does not exist.")
        found = [path] if path.is_file() else sorted(path.rglob("record.json"))
        if not found:
            raise ValueError(f"no record.json in {path} or below: is it the folder of a run?")
        files.update(dict.fromkeys(file.resolve() for file in found))
    return [_read(file) for file in files]


def _read(path: Path) -> RunRecord:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # wrong JSON and wrong UTF-8
        raise ValueError(f"{path} is not JSON ({error}).") from None
    if not isinstance(content, dict) or "version" not in content:
        raise ValueError(f"{path} is not a record of a run: it has no `version`.")
    version = content.pop("version")
    if version != VERSION:
        raise ValueError(
            f"{path} has version {version!r}, this release reads version {VERSION}: run again to renew it."
        )
    try:
        _check_types(content)
        traces = [Trace(**trace) for trace in content.get("traces", [])]
        return RunRecord(**{**content, "within": WithinTask(**content.get("within", {})), "traces": traces})
    except (TypeError, ValueError) as error:
        reason = str(error).replace("RunRecord.__init__() ", "").replace("WithinTask.__init__() ", "")
        reason = reason.replace("Trace.__init__() ", "")
        raise ValueError(f"{path} is not a valid record: {reason}") from None


def _check_types(content: Mapping[str, Any]) -> None:
    """Refuse values that would fail much later, in the middle of a report."""
    within = content.get("within", {})
    if not isinstance(within, dict):
        raise ValueError("`within` must map `step`, `task` and `scores` to lists.")
    further = content.get("further", {})
    if not isinstance(further, dict):
        raise ValueError("`further` must map names to matrices.")
    matrices = {"matrix": content.get("matrix", []), "within.scores": within.get("scores", []), **further}
    for name, rows in matrices.items():
        if not isinstance(rows, list) or not all(isinstance(row, list) and _all_are(row, _NUMBER) for row in rows):
            raise ValueError(f"`{name}` must be a list of rows of numbers or null.")
    for name in ("method", "monitor", "config", "created"):
        if not isinstance(content.get(name, ""), str):
            raise ValueError(f"`{name}` must be text, got {content[name]!r}.")
    for name in ("train_seconds", "peak_memory_mib", "seed"):
        if not isinstance(content.get(name), _NUMBER):
            raise ValueError(f"`{name}` must be a number or null, got {content[name]!r}.")
    if content.get("better", "higher") not in ("higher", "lower"):
        raise ValueError(f"`better` must be 'higher' or 'lower', got {content['better']!r}.")
    samples = content.get("samples", [])
    if not isinstance(samples, list) or not all(isinstance(t, dict) and _all_are(t.values(), str) for t in samples):
        raise ValueError("`samples` must be a list that maps prompts to text.")
    _check_traces(content.get("traces", []))
    names, trained = content.get("task_names", []), content.get("trained") or []
    if not isinstance(trained, list) or not all(
        _all_are(row if isinstance(row, list) else [row], int) for row in trained
    ):
        raise ValueError("`trained` must be null or a list of task numbers or of lists of them.")
    if not isinstance(names, list) or not _all_are(names, str):
        raise ValueError("`task_names` must be a list of text.")
    for name, kind in (("summary", _NUMBER), ("versions", str)):
        values = content.get(name, {})
        if not isinstance(values, dict) or not _all_are(values.values(), kind):
            raise ValueError(f"`{name}` must map names to {'numbers or null' if name == 'summary' else 'text'}.")


def _check_traces(traces: Any) -> None:
    if not isinstance(traces, list) or not all(isinstance(trace, dict) for trace in traces):
        raise ValueError("`traces` must be a list of mappings.")
    for trace in traces:
        if not all(isinstance(trace.get(name), str) for name in ("name", "quantity")):
            raise ValueError("`name` and `quantity` of a trace must be text.")
        marks = trace.get("marks", {})
        if not isinstance(marks, dict):
            raise ValueError("`marks` of a trace must map what happened to lists of steps.")
        for steps in (trace.get("step"), *marks.values()):
            # a truth value would pass for an int
            if not isinstance(steps, list) or any(type(step) is not int for step in steps):
                raise ValueError("`step` and each of `marks` of a trace must be lists of whole numbers.")
        if not isinstance(trace.get("value"), list) or not _all_are(trace["value"], _NUMBER):
            raise ValueError("`value` of a trace must be a list of numbers.")
        if not isinstance(trace.get("level"), _NUMBER):
            raise ValueError(f"`level` of a trace must be a number or null, got {trace['level']!r}.")
        if trace.get("scale", "linear") not in ("linear", "log"):
            raise ValueError(f"`scale` of a trace must be 'linear' or 'log', got {trace['scale']!r}.")


def _all_are(values: Iterable[object], kind: type | tuple[type, ...]) -> bool:
    return all(isinstance(value, kind) for value in values)


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _rows(rows: Sequence[Sequence[float | None]]) -> Scores:
    return [[_finite(score) for score in row] for row in rows]


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
