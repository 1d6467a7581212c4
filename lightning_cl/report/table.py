"""The comparison of methods: mean and standard deviation over seeds, as rows and as text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lightning_cl.core.imports import require
from lightning_cl.metrics.record import RunRecord

__all__ = ["COLUMNS", "Column", "MethodRow", "Statistic", "format_markdown", "format_table", "print_table", "summarise"]


@dataclass(frozen=True)
class Statistic:
    """Mean and sample standard deviation (factor ``1 / (n - 1)``) over the ``n`` runs that have the value.

    ``mean`` is ``NaN`` for ``n`` = 0, ``std`` for ``n`` below 2.
    """

    mean: float
    std: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Statistic:
        """Summarise the values that are there."""
        present = [value for value in values if value is not None and not math.isnan(value)]
        mean = statistics.fmean(present) if present else math.nan
        return cls(mean, statistics.stdev(present) if len(present) > 1 else math.nan, len(present))

    def text(self, digits: int) -> str:
        """Write ``mean ± std``, the mean alone for one run, a dash where there is nothing.

        Example:
            >>> Statistic.of([0.5, 0.7]).text(3), Statistic.of([2.0]).text(1), Statistic.of([None]).text(1)
            ('0.600 ± 0.141', '2.0', '–')
        """
        if not self.n:
            return "–"
        # + 0.0 turns the -0.0 that rounding leaves into 0.0
        mean = f"{round(self.mean, digits) + 0.0:.{digits}f}"
        return mean if math.isnan(self.std) else f"{mean} ± {self.std:.{digits}f}"

    def interval(self) -> float:
        """Return half the width of the 95 % interval of the mean (Student's t); ``NaN`` below two runs.

        Example:
            >>> round(Statistic.of([0.5, 0.6, 0.7]).interval(), 3)  # 4.30 * 0.1 / sqrt(3)
            0.248
        """
        if self.n < 2:
            return math.nan
        quantile = float(require("scipy.stats", extra="report").t.ppf(0.975, self.n - 1))
        return quantile * self.std / math.sqrt(self.n)


@dataclass(frozen=True)
class Column:
    """One column of the comparison: where its value stands in a record, how it is shown and what it means."""

    key: str
    title: str
    meaning: str
    better: Literal["higher", "lower"]
    digits: int = 3
    unit: str = ""

    def value(self, record: RunRecord) -> float | None:
        """Return the value of one run."""
        if self.key == "train_seconds":
            return record.train_seconds
        if self.key == "peak_memory_mib":
            return record.peak_memory_mib
        return record.summary.get(self.key)


COLUMNS = (
    Column("average_accuracy", "Average accuracy", "mean score over all tasks at the end of the stream", "higher"),
    Column(
        "forgetting",
        "Forgetting",
        "best score of a task before the end minus its score at the end, mean over tasks",
        "lower",
    ),
    Column(
        "backward_transfer",
        "Backward transfer",
        "score at the end minus score just after learning, mean over tasks",
        "higher",
    ),
    Column(
        "learning_accuracy", "Learning accuracy", "score of a task just after learning it, mean over tasks", "higher"
    ),
    Column("train_seconds", "Training time", "wall-clock time of the run", "lower", digits=1, unit="s"),
    Column("peak_memory_mib", "Peak memory", "highest memory use of the run", "lower", digits=0, unit="MiB"),
)
_OF_LOSSES: dict[str, tuple[str, str, Literal["higher", "lower"]]] = {
    "average_accuracy": ("Average", "mean score over all tasks at the end of the stream", "lower"),
    "forgetting": ("Forgetting", "score of a task at the end minus its lowest before, mean over tasks", "lower"),
    "backward_transfer": (
        "Backward transfer",
        "score just after learning minus score at the end, mean over tasks",
        "higher",
    ),
    "learning_accuracy": ("After learning", "score of a task just after learning it, mean over tasks", "lower"),
}
_BOUNDS: dict[str, Literal["upper bound", "lower bound"]] = {"joint": "upper bound", "finetune": "lower bound"}


@dataclass(frozen=True)
class MethodRow:
    """One method: its runs, and a statistic over them for each of ``COLUMNS`` by key."""

    method: str
    runs: int
    values: dict[str, Statistic]
    better: Literal["higher", "lower"] = "higher"

    @property
    def bound(self) -> Literal["upper bound", "lower bound"] | None:
        """What the method is a bound of: training on all tasks at once, or on one after the other with no cure."""
        return _BOUNDS.get(self.method)


def summarise(records: Sequence[RunRecord]) -> list[MethodRow]:
    """Average the runs of each method.

    Args:
        records: Runs over as many tasks with the same score. The tasks may differ, as with an order drawn by the seed.

    Returns:
        One row for each method, in the order first seen.

    Raises:
        ValueError: If there is no record, if runs differ in their number of tasks or their score, or if two runs of a
            method have the same seed.
    """
    if not records:
        raise ValueError("no record to summarise.")
    first = records[0]
    for record in records:
        if (record.monitor, record.better, len(record.task_names)) != (
            first.monitor,
            first.better,
            len(first.task_names),
        ):
            raise ValueError(
                f"{record.title} ({len(record.task_names)} tasks, {record.monitor!r}) cannot be compared with "
                f"{first.title} ({len(first.task_names)} tasks, {first.monitor!r})."
            )
    rows = []
    for method in dict.fromkeys(record.method for record in records):
        runs = [record for record in records if record.method == method]
        seeds = [record.seed for record in runs if record.seed is not None]
        if len(set(seeds)) < len(seeds):
            raise ValueError(
                f"{len(runs)} runs are named {method!r}, with seeds {seeds}: leave out the repeated ones, or give each "
                "setting of a method a name of its own."
            )
        values = {column.key: Statistic.of(column.value(run) for run in runs) for column in COLUMNS}
        rows.append(MethodRow(method, len(runs), values, first.better))
    return rows


def filled_columns(rows: Sequence[MethodRow]) -> list[Column]:
    """Return the columns that have a value in some row, in words that fit the kind of score."""
    columns = [column for column in COLUMNS if any(row.values[column.key].n for row in rows)]
    if rows[0].better == "higher":
        return columns
    # of a loss or a perplexity
    return [
        replace(column, title=words[0], meaning=words[1], better=words[2]) if words else column
        for column, words in ((column, _OF_LOSSES.get(column.key)) for column in columns)
    ]


def best(rows: Sequence[MethodRow], column: Column) -> MethodRow | None:
    """Return the row that is best in a column, bounds aside; ``None`` unless two methods or more compete."""
    competing = [row for row in rows if row.bound is None and row.values[column.key].n]
    if len(competing) < 2:
        return None
    sign = 1 if column.better == "higher" else -1
    return max(competing, key=lambda row: sign * row.values[column.key].mean)


def format_table(rows: Sequence[MethodRow]) -> str:
    """Lay the rows out as plain text, mean ± standard deviation; columns that are empty in all rows are left out."""
    columns = filled_columns(rows)
    # Headings take two lines: the table stays narrow enough for a terminal.
    headings = [f"{column.title.lower()}{f' ({column.unit})' if column.unit else ''}" for column in columns]
    upper, lower = zip(("", "method"), ("", "runs"), *(_split(heading) for heading in headings), strict=True)
    cells = [list(upper), list(lower)]
    for row in rows:
        name = f"{row.method} ({row.bound})" if row.bound else row.method
        cells.append([name, str(row.runs), *(row.values[column.key].text(column.digits) for column in columns)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        padded = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("   ".join([first.ljust(widths[0]), *padded]))
    return "\n".join([*lines[:2], "─" * len(lines[0]), *lines[2:]])


def format_markdown(rows: Sequence[MethodRow]) -> str:
    """Lay the rows out as a table of Markdown: means with the half-widths of their 95 % intervals.

    Time and memory are left out: runs that are far apart in time share the machine with others.
    """
    columns = [column for column in filled_columns(rows) if not column.unit]
    lines = [
        "| method | runs | " + " | ".join(column.title.lower() for column in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for row in rows:
        name = f"`{row.method}` ({row.bound})" if row.bound else f"`{row.method}`"
        values = [row.values[column.key] for column in columns]
        cells = [
            replace(value, std=value.interval()).text(column.digits)
            for value, column in zip(values, columns, strict=True)
        ]
        lines.append("| " + " | ".join([name, str(row.runs), *cells]) + " |")
    return "\n".join(lines) + "\n"


def _split(heading: str) -> tuple[str, str]:
    upper, _, lower = heading.partition(" ")
    return (upper, lower) if lower else ("", upper)


def print_table(rows: Sequence[MethodRow]) -> None:
    """Print :func:`format_table`."""
    print(format_table(rows))
