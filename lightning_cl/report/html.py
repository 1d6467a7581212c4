"""The HTML report: one file that needs no network, with the figures inside it and as PNG files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_cl.core.imports import require
from lightning_cl.metrics.record import RunRecord, Trace
from lightning_cl.report import plots
from lightning_cl.report.pages import Image, draw, render, slug
from lightning_cl.report.style import cell_colors
from lightning_cl.report.sweep import find_sweeps
from lightning_cl.report.table import COLUMNS, MethodRow, Statistic, best, filled_columns, summarise

__all__ = ["write_report"]


def write_report(records: Sequence[RunRecord], directory: str | Path) -> Path:
    """Write ``report.html`` and its figures as PNG files into a folder.

    The page holds its figures twice, for light and for dark mode; the PNG files are the light ones.

    Args:
        records: Runs over as many tasks with the same score.
        directory: Folder to write into; made if missing.

    Returns:
        Path of ``report.html``.

    Raises:
        ValueError: If the records cannot be compared, see :func:`~lightning_cl.report.table.summarise`.
        ImportError: If the extra ``report`` is not installed.
    """
    require("matplotlib", extra="report")
    require("jinja2", extra="report")
    rows = summarise(records)
    limits = plots.score_limits(records)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    overview, by_method = _figures(records, rows, limits)
    for image in (*overview, *(image for _, images in by_method for image in images)):
        (directory / image.file).write_bytes(image.light)
    columns = filled_columns(rows)
    page = render(
        "report.html.j2",
        monitor=records[0].monitor,
        tasks=len(records[0].task_names),
        records=records,
        rows=rows,
        columns=columns,
        best={column.key: best(rows, column) for column in columns if not column.unit},
        overview=overview,
        by_method=by_method,
        facts=_facts,
        colors=lambda score: cell_colors(score, limits),
        prompts=_prompts,
        happenings=_happenings,
    )
    path = directory / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _figures(
    records: Sequence[RunRecord], rows: Sequence[MethodRow], limits: tuple[float, float]
) -> tuple[list[Image], list[tuple[MethodRow, list[Image]]]]:
    """Draw the figures that compare the methods, and those of each method."""
    overview, shown = _sweep_figures(rows, limits)
    averages = ", ".join(f"{row.method} {row.values['average_accuracy'].text(3)}" for row in shown)
    compared = [record for record in records if any(record.method == row.method for row in shown)]
    overview.append(
        draw(
            "average_accuracy.png",
            f"Average {plots.quantity(records[0])} after each task, a line for each method. At the end: {averages}.",
            lambda theme: plots.average_figure(compared, limits, theme),
        )
    )
    if any(row.values["forgetting"].n for row in shown):
        lost = ", ".join(f"{row.method} {row.values['forgetting'].text(3)}" for row in shown)
        overview.append(
            draw(
                "forgetting.png",
                f"Forgetting, a bar for each method: {lost}.",
                lambda theme: plots.forgetting_figure(shown, records[0].monitor, theme),
            )
        )
    by_method = []
    for position, row in enumerate(shown, start=1):
        runs = [record for record in records if record.method == row.method]
        stem = f"{position}_{slug(row.method) or 'method'}"
        images = [
            draw(
                f"{stem}_matrix.png",
                f"Heat map: {plots.quantity(runs[0])} matrix of {row.method}. The numbers are in the tables below.",
                lambda theme, runs=runs: plots.matrix_figure(runs, limits, theme),  # type: ignore[misc]
            )
        ]
        if len(runs[0].matrix) > 1 or len(runs[0].within.step) > 1:
            images.append(
                draw(
                    f"{stem}_tasks.png",
                    f"Score of each task over the stream, for {runs[0].title}.",
                    lambda theme, runs=runs: plots.tasks_figure(runs[0], limits, theme),  # type: ignore[misc]
                )
            )
        traced = next((run for run in runs if run.traces), runs[0])
        images += [
            draw(
                f"{stem}_{slug(trace.name)}.png",
                f"{trace.quantity} over the optimizer steps of {traced.title}.{_what_happened(trace)}",
                lambda theme, run=traced, trace=trace: plots.trace_figure(run, trace, theme),  # type: ignore[misc]
            )
            for trace in traced.traces
        ]
        by_method.append((row, images))
    return overview, by_method


def _sweep_figures(rows: Sequence[MethodRow], limits: tuple[float, float]) -> tuple[list[Image], list[MethodRow]]:
    """Draw accuracy and forgetting against each setting that is swept; return the rows for the other figures too.

    These show of a method the largest value only: a line for each would hide the others. All runs have their tables.
    """
    images, hidden = [], []
    for sweep in find_sweeps(rows):
        hidden += [row for points in sweep.methods.values() for row in list(points.values())[:-1]]
        for column in filled_columns(rows):
            if column.key not in ("average_accuracy", "forgetting"):
                continue
            lines = [
                f"{method} "
                + ", ".join(f"{row.values[column.key].text(3)} at {value:g}" for value, row in points.items())
                for method, points in sweep.methods.items()
            ]
            levels = [f"{row.method} {row.values[column.key].text(3)}" for row in sweep.others]
            images.append(
                draw(
                    f"{sweep.setting}_{column.key}.png",
                    f"{column.title} against {sweep.setting}, a line for each method: {'; '.join([*lines, *levels])}.",
                    lambda theme, sweep=sweep, column=column: plots.sweep_figure(sweep, column, limits, theme),  # type: ignore[misc]
                )
            )
    return images, [row for row in rows if not any(row is other for other in hidden)]


def _what_happened(trace: Trace) -> str:
    """Return the marks of a trace for those who do not see them."""
    marks = [f"{kind} at {len(steps)} {'step' if len(steps) == 1 else 'steps'}" for kind, steps in trace.marks.items()]
    return f" {', '.join(marks).capitalize()}." if marks else ""


def _facts(record: RunRecord) -> list[str]:
    """Return the key numbers of a run for its heading, as the table writes them."""
    facts = []
    for column in COLUMNS:
        statistic = Statistic.of([column.value(record)])
        if statistic.n and column.key in ("average_accuracy", "forgetting", "train_seconds"):
            title = column.title if record.better == "higher" else column.title.replace("accuracy", record.monitor)
            facts.append(f"{title.lower()} {statistic.text(column.digits)} {column.unit}".rstrip())
    return facts


def _prompts(record: RunRecord) -> list[str]:
    """Return the prompts that the module of a run continued."""
    return list(dict.fromkeys(prompt for texts in record.samples for prompt in texts))


def _happenings(trace: Trace) -> list[tuple[int, str, str]]:
    """Return step, kind and value of what a trace marks, in order; no value where the curve has none."""
    values = dict(zip(trace.step, trace.value, strict=True))
    marked = sorted((step, kind) for kind, steps in trace.marks.items() for step in steps)
    texts = {step: "not finite" if value is None else f"{value:.4g}" for step, value in values.items()}
    return [(step, kind, texts.get(step, "")) for step, kind in marked]
