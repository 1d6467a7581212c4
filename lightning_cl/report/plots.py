"""The figures of the report. All take a :class:`~lightning_cl.report.style.Theme`; they need the extra ``report``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_cl.metrics.record import RunRecord, Trace
from lightning_cl.report.style import (
    LIGHT,
    WIDTH,
    Color,
    Theme,
    cell_colors,
    direct_labels,
    method_styles,
    new_figure,
    positions,
    set_ranges,
    short,
    task_colors,
)
from lightning_cl.report.sweep import Sweep
from lightning_cl.report.table import Column, MethodRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

__all__ = [
    "average_figure",
    "forgetting_figure",
    "matrix_figure",
    "quantity",
    "score_limits",
    "sweep_figure",
    "tasks_figure",
    "trace_figure",
]

MANY = 12  # more tasks than this are shown by position and colour, without names and numbers


def score_limits(records: Sequence[RunRecord]) -> tuple[float, float]:
    """Return the scale that all runs share: 0 to 1 where it holds all scores of the matrices, else their range."""
    scores = [score for record in records for row in record.matrix for score in row if score is not None]
    if not scores:
        return 0.0, 1.0
    low, high = min(scores), max(scores)
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def matrix_figure(runs: Sequence[RunRecord], limits: tuple[float, float], theme: Theme = LIGHT) -> Figure:
    """Draw the accuracy matrix of one method as a heat map, the mean over its runs.

    Args:
        runs: Runs of one method; a run that lacks an entry is left out of its mean. Where the runs name their tasks
            differently, tasks go by their position.
        limits: Scores at the ends of the colour scale.
        theme: Colours.
    """
    longest = max(runs, key=lambda run: len(run.matrix))
    if any(run.task_names != longest.task_names for run in runs):  # the seed drew the order of the classes
        longest = replace(longest, task_names=[f"task {i + 1}" for i in range(len(longest.task_names))])
    rows, tasks = len(longest.matrix), len(longest.task_names)
    scores = _mean_and_std(torch.stack([_padded(run.R, rows) for run in runs]))[0]
    flat, many = rows / tasks < 0.4, tasks > MANY
    cell = min((WIDTH - 2.1) / tasks, 0.85)
    mean = f", mean of {len(runs)} runs" if len(runs) > 1 else ""
    figure, axes = new_figure(
        height=1.25 + rows * cell + (0.5 if flat else 0.0),
        width=max(tasks * cell + 2.1, 4.2),
        title=f"{short(longest.method, 24)}: {'accuracy' if longest.better == 'higher' else 'score'} matrix{mean}",
        theme=theme,
    )
    mesh = axes.imshow(scores.numpy(), cmap="viridis", vmin=limits[0], vmax=limits[1], aspect="equal")
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    if many:
        axes.set_xticks([i - 1 for i in positions(tasks)], [str(i) for i in positions(tasks)])
        axes.set_xlabel("Task evaluated (position in the stream)")
    else:
        for row, column in (~scores.isnan()).nonzero().tolist():
            value = float(scores[row, column])
            color = cell_colors(value, limits)[1]
            size = 10 if tasks <= 8 else 7.5
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=size, color=color)
        names = [short(name, 14) for name in longest.task_names]
        slanted = max(map(len, names)) * 0.068 > cell
        axes.set_xticks(
            range(tasks),
            names,
            rotation=40 if slanted else 0,
            ha="right" if slanted else "center",
            rotation_mode="anchor" if slanted else "default",
        )
        axes.set_xlabel("Task evaluated")
    if rows == 1:
        axes.set_yticks([0], [f"after {short(longest.row_name(0), 14)}"])
    elif many:
        axes.set_yticks([i - 1 for i in positions(rows)], [str(i) for i in positions(rows)])
        axes.set_ylabel("After learning (position)")
    else:
        axes.set_yticks(range(rows), [short(longest.row_name(row), 14) for row in range(rows)])
        axes.set_ylabel("After learning")
    _color_bar(axes, mesh, _score_label(longest), theme, below=flat)
    return figure


def tasks_figure(run: RunRecord, limits: tuple[float, float], theme: Theme = LIGHT) -> Figure:
    """Draw the score of each task over the stream, with the evaluations within tasks where the run made them.

    Up to 12 tasks are lines with their names; more are the rows of a heat map over the same axis.
    """
    title = f"{short(run.title, 28)}: each task over the stream"
    figure, axes = new_figure(height=4.0, title=title, theme=theme)
    if run.within.step:
        x, rows, learned = run.within.step, run.within.scores, run.within.task
        axes.set_xlabel("Optimizer steps")
    else:
        x, rows, learned = list(range(1, len(run.matrix) + 1)), run.matrix, list(range(len(run.matrix)))
        axes.set_xlabel("Tasks learned")
        axes.set_xticks(positions(len(rows)))
    # the last evaluation of each row of the stream lies at its end
    ends = [i for i in range(len(x)) if i + 1 == len(x) or learned[i + 1] != learned[i]]
    scores = torch.tensor([[math.nan if score is None else score for score in row] for row in rows])
    if len(run.task_names) > MANY:
        axes.grid(visible=False)
        # a score holds for the time since the evaluation before it
        edges = [min(x[0] - 1, 0) if run.within.step else 0.5, *(x if run.within.step else [i + 0.5 for i in x])]
        bounds = [task + 0.5 for task in range(len(run.task_names) + 1)]
        mesh = axes.pcolormesh(edges, bounds, scores.T.numpy(), cmap="viridis", vmin=limits[0], vmax=limits[1])
        axes.set_yticks(positions(len(run.task_names)))
        axes.invert_yaxis()
        axes.set_ylabel("Task (position in the stream)")
        _color_bar(axes, mesh, _score_label(run), theme)
        return figure
    if run.within.step:
        axes.grid(visible=False, axis="x")
        for end in ends[:-1]:
            axes.axvline(x[end], color=theme.grid, linewidth=1, zorder=0)
    labels: list[tuple[float, str, Color]] = []
    for task, color in enumerate(task_colors(len(run.task_names), theme)):
        seen = [i for i in range(len(x)) if not scores[i, task].isnan()]
        if not seen:
            continue
        axes.plot([x[i] for i in seen], scores[seen, task].tolist(), color=color, linewidth=1.5)
        marked = [i for i in ends if i in seen]
        axes.plot([x[i] for i in marked], scores[marked, task].tolist(), "o", color=color, ms=3.2, clip_on=False)
        labels.append((float(scores[seen[-1], task]), short(run.task_names[task], 16), color))
    set_ranges(axes, x, limits)
    direct_labels(axes, labels)
    axes.set_ylabel(_score_label(run))
    return figure


def average_figure(records: Sequence[RunRecord], limits: tuple[float, float], theme: Theme = LIGHT) -> Figure:
    """Draw the average accuracy after each task: a line for each method, with a band of one standard deviation.

    A run with one row beside runs with several (the joint bound) is a level line.
    """
    figure, axes = new_figure(height=3.5, title=f"Average {quantity(records[0])} over the tasks seen", theme=theme)
    longest = max(len(record.matrix) for record in records)
    labels: list[tuple[float, str, Color]] = []
    styles = method_styles(list(dict.fromkeys(record.method for record in records)), theme)
    for method, (color, line) in styles.items():
        runs = [record for record in records if record.method == method]
        rows = max(len(run.matrix) for run in runs)
        mean, std = _mean_and_std(torch.stack([_averages(run, rows) for run in runs]))
        x = list(range(1, rows + 1))
        if rows == 1 and longest > 1:
            x, mean, std = [1, longest], mean.expand(2), std.expand(2)
        marker = "" if line in ("--", ":") and longest > 1 else "o"
        axes.plot(x, mean.tolist(), color=color, linestyle=line, linewidth=1.8, marker=marker, ms=4, clip_on=False)
        # NaN, from one run, draws no band
        axes.fill_between(x, (mean - std).tolist(), (mean + std).tolist(), color=color, alpha=0.18, linewidth=0)
        known = mean[~mean.isnan()]
        if len(known):
            labels.append((float(known[-1]), short(method, 20), color))
    axes.set_xticks(positions(longest))
    set_ranges(axes, range(1, longest + 1), limits)
    direct_labels(axes, labels)
    axes.set_xlabel("Tasks learned")
    axes.set_ylabel(f"Average {_score_label(records[0])}")
    return figure


def forgetting_figure(rows: Sequence[MethodRow], monitor: str, theme: Theme = LIGHT) -> Figure | None:
    """Draw the forgetting of each method as a bar with one standard deviation; ``None`` if it is defined for none."""
    shown = [row for row in rows if row.values["forgetting"].n]
    if not shown:
        return None
    figure, axes = new_figure(height=1.3 + 0.42 * len(shown), title="Forgetting", theme=theme)
    styles = method_styles([row.method for row in rows], theme)
    for position, row in enumerate(shown):
        statistic = row.values["forgetting"]
        std = None if math.isnan(statistic.std) else statistic.std
        bar = {"elinewidth": 1.2, "capsize": 3}
        axes.barh(
            position, statistic.mean, height=0.62, color=styles[row.method][0], xerr=std, ecolor=theme.ink, error_kw=bar
        )
        outward = math.copysign(1.0, statistic.mean)
        axes.annotate(
            statistic.text(3),
            (statistic.mean + outward * (std or 0.0), position),
            xytext=(6 * outward, 0),
            textcoords="offset points",
            ha="left" if outward > 0 else "right",
            va="center",
            fontsize=9,
            color=theme.ink,
        )
    axes.axvline(0, color=theme.muted, linewidth=1)
    axes.margins(x=0.28)
    if all(row.values["forgetting"].mean >= 0 for row in shown):
        axes.set_xlim(left=0)
    axes.set_yticks(range(len(shown)), [short(row.method, 20) for row in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    change = "Loss" if rows[0].better == "higher" else "Rise"
    axes.set_xlabel(f"{change} of {short(monitor, 24)} since its best, mean over tasks (lower is better)")
    return figure


def sweep_figure(sweep: Sweep, column: Column, limits: tuple[float, float], theme: Theme = LIGHT) -> Figure:
    """Draw a column of the table against a setting: means over runs, with bands of their 95 % interval (Student's t).

    Methods without the setting are level lines; one that is so far off that it would flatten the others is named at the
    edge, with its mean. Values that span a decade or more stand on a logarithmic axis.

    Args:
        sweep: The rows to draw.
        column: Average accuracy or forgetting.
        limits: Range of the scores, which bands may leave, but not the axis.
        theme: Colours.
    """
    setting = short(sweep.setting.replace("_", " "), 24)
    figure, axes = new_figure(height=3.8, title=f"{column.title} against {setting}", theme=theme)
    curves = {**sweep.methods, **{row.method: dict.fromkeys(sweep.values, row) for row in sweep.others}}
    labels: list[tuple[float, str, Color]] = []
    outside: list[tuple[float, str, Color]] = []
    swept = [row.values[column.key] for points in sweep.methods.values() for row in points.values()]
    means = [statistic.mean for statistic in swept if statistic.n] or [math.nan]
    reach = 2 * (max(means) - min(means)) or math.inf
    for method, (color, line) in method_styles(list(curves), theme).items():
        points = {value: row.values[column.key] for value, row in curves[method].items() if row.values[column.key].n}
        if not points:
            continue
        x, mean = list(points), [statistic.mean for statistic in points.values()]
        if not min(means) - reach <= mean[-1] <= max(means) + reach:
            outside.append((mean[-1], f"{short(method, 20)} {mean[-1]:.{column.digits}f}", color))
            continue
        half = [statistic.interval() for statistic in points.values()]
        marker = "o" if method in sweep.methods else ""
        axes.plot(x, mean, color=color, linestyle=line, linewidth=1.8, marker=marker, ms=4, clip_on=False, zorder=3)
        # NaN, from one run, draws no band
        below, above = ([m + sign * h for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, below, above, color=color, alpha=0.12, linewidth=0)
        labels.append((mean[-1], short(method, 20), color))
    first, last = sweep.values[0], sweep.values[-1]
    if sweep.logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(first * (first / last) ** 0.03, last)
    else:
        axes.set_xlim(first - 0.03 * (last - first), last)
    axes.set_xticks(sweep.values, [f"{value:g}" for value in sweep.values])
    axes.set_xticks([], minor=True)
    low, high = axes.get_ylim()
    width = limits[1] - limits[0]
    least, most = (-width, width) if column.key == "forgetting" else limits
    axes.set_ylim(max(low, least - 0.03 * width), min(high, most + 0.03 * width))
    low, high = axes.get_ylim()
    direct_labels(axes, labels + [(min(max(mean, low), high), text, color) for mean, text, color in outside])
    axes.set_xlabel(setting.capitalize() + (" (logarithmic)" if sweep.logarithmic else ""))
    axes.set_ylabel(f"{column.title} ({column.better} is better)")
    return figure


def trace_figure(run: RunRecord, trace: Trace, theme: Theme = LIGHT) -> Figure:
    """Draw a curve that a callback kept over the optimizer steps of a run, with the steps at which something happened.

    The curve is broken where the value is not finite; what happened there stands at the upper edge. What happened where
    the curve has no value stands at the lower edge.
    """
    figure, axes = new_figure(height=3.5, title=f"{short(run.title, 28)}: {short(trace.name, 24)}", theme=theme)
    logarithmic = trace.scale == "log"
    if logarithmic:
        axes.set_yscale("log")
        axes.tick_params(which="minor", length=0, labelcolor=theme.muted, labelsize=9)
    values = dict(zip(trace.step, trace.value, strict=True))
    heights = [math.nan if value is None or (logarithmic and value <= 0) else value for value in values.values()]
    axes.grid(visible=False, axis="x")
    for end in _task_ends(run):
        axes.axvline(end, color=theme.grid, linewidth=1, zorder=0)
    drawn = {step: height for step, height in zip(values, heights, strict=True) if not math.isnan(height)}
    if drawn:
        axes.plot(list(values), heights, color=theme.methods[0], linewidth=1.2)
        # no line leads to a value between two that are not finite
        padded = [math.nan, *heights, math.nan]
        alone = [
            step
            for step, before, after in zip(values, padded, padded[2:], strict=False)
            if step in drawn and math.isnan(before) and math.isnan(after)
        ]
        if alone:
            axes.plot(alone, [drawn[step] for step in alone], ".", color=theme.methods[0], ms=4)
    if trace.level is not None:
        axes.axhline(trace.level, color=theme.muted, linestyle="--", linewidth=1)
        place = axes.get_yaxis_transform()
        axes.text(1.02, trace.level, f"{trace.level:g}", color=theme.muted, fontsize=9, va="center", transform=place)
    edge = axes.get_xaxis_transform()
    for position, (kind, steps) in enumerate(trace.marks.items(), start=1):
        color = theme.methods[position % len(theme.methods)]
        on_curve = [step for step in steps if step in drawn]
        axes.plot(on_curve, [drawn[step] for step in on_curve], "o", color=color, ms=4, label=f"{kind} ({len(steps)})")
        beyond = [step for step in steps if step in values and values[step] is None]
        nowhere = [step for step in steps if step not in drawn and step not in beyond]
        for there, height, marker in ((beyond, 1.0, "^"), (nowhere, 0.0, "|")):
            axes.plot(there, [height] * len(there), marker, color=color, ms=5, transform=edge, clip_on=False)
    if trace.marks:
        # beside the name of the axis where it is short, else below it
        beside = len(trace.marks) < 3 and sum(map(len, trace.marks)) <= 26
        axes.legend(
            loc="upper right",
            bbox_to_anchor=(1.0, -0.09 if beside else -0.18),
            ncols=min(len(trace.marks), 2),
            frameon=False,
            fontsize=9,
            labelcolor=theme.ink,
            borderpad=0.0,
            handletextpad=0.2,
        )
    known = [*trace.step, *(step for steps in trace.marks.values() for step in steps)]
    if known:
        axes.set_xlim(min(known), max(*known, min(known) + 1))
    axes.set_xlabel("Optimizer steps", loc="left")
    axes.set_ylabel(short(trace.quantity, 44))
    return figure


def _task_ends(run: RunRecord) -> list[int]:
    """Return the optimizer steps at which all rows of the stream but the last ended."""
    task, step = run.within.task, run.within.step
    return [step[i] for i in range(len(step) - 1) if task[i + 1] != task[i]]


def quantity(record: RunRecord) -> str:
    """Name what the matrix of a run holds."""
    return "accuracy" if record.better == "higher" else short(record.monitor, 20)


def _score_label(record: RunRecord) -> str:
    return short(record.monitor, 30) + (" (0 to 1)" if score_limits([record]) == (0.0, 1.0) else "")


def _color_bar(axes: Axes, mesh: ScalarMappable, label: str, theme: Theme, *, below: bool = False) -> None:
    figure = axes.get_figure(root=True)
    assert figure is not None
    if below:
        bar = figure.colorbar(mesh, ax=axes, location="bottom", aspect=40, pad=0.04)
    else:
        bar = figure.colorbar(mesh, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label(label, color=theme.muted, fontsize=9.5)
    bar.ax.tick_params(length=0, labelcolor=theme.muted, labelsize=9)
    bar.outline.set_visible(False)


def _averages(record: RunRecord, rows: int) -> Tensor:
    """Return ``Tensor[rows]``, the mean over the tasks seen after each row, ``NaN`` where one was not evaluated."""
    R, averages = record.R, torch.full((rows,), torch.nan, dtype=torch.float64)
    seen: set[int] = set()
    for row in range(len(R)):
        seen.update(record.tasks_of(row))
        averages[row] = R[row, sorted(seen)].mean()
    return averages


def _padded(R: Tensor, rows: int) -> Tensor:
    return torch.cat([R, R.new_full((rows - len(R), R.shape[1]), torch.nan)])


def _mean_and_std(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and sample standard deviation over dimension 0 without the NaNs; NaN where too few are left."""
    count = (~values.isnan()).sum(dim=0)
    mean = values.nanmean(dim=0)
    std = ((values - mean).square().nansum(dim=0) / (count - 1).clamp(min=1)).sqrt()
    return mean, torch.where(count > 1, std, torch.nan)
