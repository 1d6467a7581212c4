"""Curves that callbacks keep, from the record to the page."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_cl.metrics.record import Trace
from lightning_cl.report import read_records, write_record, write_report
from lightning_cl.report.style import DARK, LIGHT, png

pytest.importorskip("matplotlib", reason="needs the extra `report`")

from lightning_cl.report import plots

SPIKES = Trace(
    "loss spikes",
    "Training loss",
    step=[0, 10, 20, 25, 30],
    value=[2.0, 1.5, 30.0, math.nan, 1.0],
    marks={"steps skipped": [20, 25], "rolled back": [30]},
    level=5.0,
    scale="log",
)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_a_curve_has_its_marks(make_record: Any, make_within: Any, theme: Any) -> None:
    """The curve breaks where it is not finite, and the mark stands at the upper edge; tasks end where they ended."""
    run = make_record(within=make_within(3), traces=[SPIKES])
    figure = plots.trace_figure(run, SPIKES, theme)
    (axes,) = figure.axes
    ends, (curve, alone, level), marks = axes.lines[:2], axes.lines[2:5], axes.lines[5:]
    assert [line.get_xdata()[0] for line in ends] == [40, 80]
    assert list(curve.get_xdata()) == [0, 10, 20, 25, 30]
    assert list(curve.get_ydata()) == pytest.approx([2.0, 1.5, 30.0, math.nan, 1.0], nan_ok=True)
    # no line leads there
    assert (list(alone.get_xdata()), list(alone.get_ydata()), alone.get_marker()) == ([30], [1.0], ".")
    assert level.get_ydata() == [5.0, 5.0]
    drawn = [(mark.get_marker(), list(mark.get_xdata()), list(mark.get_ydata())) for mark in marks]
    assert [mark for mark in drawn if mark[1]] == [("o", [20], [30.0]), ("^", [25], [1.0]), ("o", [30], [1.0])]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["steps skipped (2)", "rolled back (1)"]
    assert (axes.get_yscale(), axes.get_xlim()) == ("log", (0.0, 30.0))
    for tick in (axes.yaxis.get_major_ticks()[0], axes.yaxis.get_minor_ticks()[0]):
        assert (tick.label1.get_color(), tick.label1.get_fontsize()) == (theme.muted, 9.0)
    assert png(figure).startswith(b"\x89PNG")


def test_marks_beside_the_curve(make_record: Any) -> None:
    """At the lower edge stands what happened where the curve has no value, or none that a logarithmic axis shows."""
    trace = Trace("a", "Ratio", [0, 4, 2], [1.0, 0.0, math.nan], {"here": [0, 2, 3, 4, 9]}, scale="log")
    (axes,) = plots.trace_figure(make_record(traces=[trace]), trace).axes
    marks = {line.get_marker(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines[-3:]}
    assert marks == {"o": ([0], [1.0]), "^": ([2], [1.0]), "|": ([3, 4, 9], [0.0] * 3)}
    assert axes.get_xlim() == (0.0, 9.0)


def test_a_logarithmic_axis_leaves_zeros_out(make_record: Any) -> None:
    """A curve without marks has no legend; one without values is empty, not an error."""
    trace = Trace("ratios", "Ratio", step=[0, 1, 2], value=[0.0, 3.0, 4.0], scale="log")
    (axes,) = plots.trace_figure(make_record(traces=[trace]), trace).axes
    assert list(axes.lines[0].get_ydata()) == pytest.approx([math.nan, 3.0, 4.0], nan_ok=True)
    assert axes.get_legend() is None
    empty = Trace("ratios", "Ratio", step=[], value=[])
    assert png(plots.trace_figure(make_record(), empty)).startswith(b"\x89PNG")


def test_the_page_draws_and_lists_them(make_record: Any, tmp_path: Path) -> None:
    """Of the first run of a method that has any; what happened is listed for every run."""
    spikes = replace(SPIKES, marks=SPIKES.marks | {"rolled back": [30, 27]})
    runs = [make_record(seed=0), make_record(seed=1, traces=[spikes]), make_record("finetune", seed=0)]
    for number, run in enumerate(runs):
        write_record(tmp_path / str(number), run)
    records = read_records([tmp_path / str(number) for number in range(3)])
    assert records[1].traces == [spikes]
    page = write_report(records, tmp_path / "report").read_text("utf-8")
    assert sorted(path.name for path in (tmp_path / "report").glob("*spikes*")) == ["1_ewc_loss-spikes.png"]
    assert "Training loss over the optimizer steps of ewc, seed 1. Steps skipped at 2 steps, rolled back" in page
    assert page.count("Loss spikes: what happened at 4 steps") == 1
    assert '<th scope="row">20</th><td>steps skipped</td><td>30</td>' in page
    assert '<th scope="row">25</th><td>steps skipped</td><td>not finite</td>' in page
    assert '<th scope="row">27</th><td>rolled back</td><td></td>' in page


def test_long_lists_are_cut(make_record: Any, tmp_path: Path) -> None:
    """At 200 lines."""
    steps = list(range(250))
    trace = Trace("loss spikes", "Loss", step=steps, value=[1.0] * 250, marks={"spikes": steps})
    page = write_report([make_record(traces=[trace])], tmp_path).read_text("utf-8")
    assert page.count("<td>spikes</td>") == 200
    assert "and 50 more" in page


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"value": [1.0]}, "'loss spikes' differ in length"),
        ({"value": "12345"}, "a list of numbers"),
        ({"value": [1.0, 2.0, 3.0, 4.0, "5"]}, "a list of numbers"),
        ({"step": [0, 1, 2, 3, None]}, "lists of whole numbers"),
        ({"step": [0, 1, 2, 3, 4.5]}, "lists of whole numbers"),
        ({"step": [0, 1, 2, 3, True]}, "lists of whole numbers"),
        ({"marks": {"spikes": [None, "x"]}}, "lists of whole numbers"),
        ({"marks": {"spikes": 3}}, "lists of whole numbers"),
        ({"marks": [1]}, "must map what happened"),
        ({"marks": None}, "must map what happened"),
        ({"level": "abc"}, "a number or null, got 'abc'"),
        ({"name": 3}, "must be text"),
        ({"scale": "square"}, "'linear' or 'log'"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_broken_curves_are_refused(changes: dict[str, Any], named: str, make_record: Any, tmp_path: Path) -> None:
    """When they are read, not in the middle of a report."""
    path = write_record(tmp_path, make_record(traces=[SPIKES]))
    content = json.loads(path.read_text())
    content["traces"][0] |= changes
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"is not a valid record: .*{named}"):
        read_records([tmp_path])


def test_a_level_is_finite() -> None:
    """As values are: JSON knows no other."""
    assert [Trace("a", "b", [], [], level=level).level for level in (2, math.inf, math.nan)] == [2.0, None, None]
