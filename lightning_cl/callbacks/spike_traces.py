"""What the report draws of the spikes that a monitor saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning_cl.metrics.record import Trace

__all__ = ["spike_traces"]

_MARKS = {"log": "spikes", "skip": "steps skipped", "rollback": "rolled back"}


def spike_traces(
    ratios: Sequence[tuple[float, float, float]],
    curve: Sequence[tuple[float, float, float]],
    events: Sequence[dict[str, Any]],
    threshold: float,
) -> list[Trace]:
    """Return the largest ratios, and the loss of each optimizer, each with its spikes.

    Args:
        ratios: Step, largest ratio and number of spikes of each measurement.
        curve: Step, loss and number of the optimizer.
        events: Loss spikes, each with its ``"step"`` and ``"action"``.
        threshold: From which on a ratio is a spike.
    """
    traces = []
    if ratios:
        steps, values, counts = zip(*ratios, strict=True)
        spiky = [int(step) for step, count in zip(steps, counts, strict=True) if count]
        marks = {"steps with spikes": spiky} if spiky else {}
        quantity = "Largest g² / second moment"
        traces.append(Trace("gradient spikes", quantity, _whole(steps), list(values), marks, threshold, scale="log"))
    numbers = sorted({number for _, _, number in curve})
    for number in numbers:
        name = "loss spikes" if len(numbers) == 1 else f"loss spikes, optimizer {int(number)}"
        traces.append(_loss_trace(name, [row[:2] for row in curve if row[2] == number], events))
    return traces


def _loss_trace(name: str, curve: Sequence[tuple[float, float]], events: Sequence[dict[str, Any]]) -> Trace:
    steps, losses = zip(*curve, strict=True)
    marks: dict[str, list[int]] = {}
    for event in events:
        if event["step"] in steps:
            marks.setdefault(_MARKS[event["action"]], []).append(event["step"])
    scale: Literal["linear", "log"] = "linear" if any(loss <= 0 for loss in losses) else "log"
    return Trace(name, "Training loss", _whole(steps), list(losses), marks, scale=scale)


def _whole(steps: Sequence[float]) -> list[int]:
    return [int(step) for step in steps]
