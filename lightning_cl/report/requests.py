"""The report of a ledger: a page for each request to forget, and one over all of them, in plain language."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lightning_cl.core.imports import require
from lightning_cl.metrics.unlearning import revival
from lightning_cl.report.pages import Image, draw, render, slug
from lightning_cl.report.style import LIGHT, Theme, cell_colors, new_figure, short
from lightning_cl.unlearning.ledger import Ledger, RequestRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["request_matrix", "write_request_report"]

SCORES = {"accuracy": "share of right answers", "probability": "probability of the right answer"}
AUC = "forget/membership_auc"
GONE = {
    "forget/accuracy": "Right answers on the forgotten samples",
    "forget/probability": "Probability of the right answer, forgotten samples",
    "holdout/accuracy": "Right answers on samples never learned",
    "holdout/probability": "Probability of the right answer, samples never learned",
    AUC: "Chance that a forgotten sample looks better known than one never learned",
}
COST = {
    "retain/accuracy": "Right answers on the samples that were kept",
    "retain/probability": "Probability of the right answer, samples that were kept",
}


def write_request_report(
    ledger_path: str | Path,
    directory: str | Path,
    *,
    retrained: Mapping[str, Mapping[str, float]] | None = None,
) -> Path:
    """Write ``requests.html``, a page for each request, and the figure of the request matrix into a folder.

    Each page answers what was asked, what was done, whether it is gone, what it cost and what still carries its
    influence. It holds all it needs, in light and dark, and needs no network.

    Args:
        ledger_path: The ledger, a file of JSON Lines that a
            :class:`~lightning_cl.unlearning.request_callback.RequestCallback` wrote.
        directory: Folder to write into; made if missing.
        retrained: For the names of requests, the measurements of a model trained again without their samples, named as
            in the ledger (``{"customer 17": {"forget/membership_auc": 0.52}}``): what to compare with.

    Returns:
        Path of ``requests.html``.

    Raises:
        ValueError: If the ledger is empty, was changed, or lacks a request that ``retrained`` names.
        ImportError: If the extra ``report`` is not installed.
    """
    require("matplotlib", extra="report")
    require("jinja2", extra="report")
    records = Ledger.read(ledger_path).records
    if not records:
        raise ValueError(f"{str(ledger_path)!r} holds no record of a request.")
    if unknown := sorted(set(retrained or {}) - {record.name for record in records}):
        raise ValueError(f"`retrained` names {unknown}, which the ledger has not: {[r.name for r in records]}.")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    matrices = {name: request_matrix(records, name) for name in SCORES}
    views = [
        _View(record, position, (retrained or {}).get(record.name, {}), matrices)
        for position, record in enumerate(records)
    ]
    for view in views:
        page = render("request.html.j2", view=view, total=len(views), gone=GONE, cost=COST, when=_when)
        (directory / view.file).write_text(page, encoding="utf-8")
    image = _matrix_image(records, matrices["probability"])
    if image is not None:
        (directory / image.file).write_bytes(image.light)
    tables = [
        (SCORES[name], matrix, _revived(matrix)) for name, matrix in matrices.items() if _measured(matrix, len(records))
    ]
    index = render(
        "requests.html.j2",
        views=views,
        tables=tables,
        image=image,
        percent=_percent,
        colors=lambda score: cell_colors(score, (0.0, 1.0)),
        last_hash=records[-1].hash,
        when=_when,
    )
    path = directory / "requests.html"
    path.write_text(index, encoding="utf-8")
    return path


def request_matrix(records: Sequence[RequestRecord], score: str) -> list[list[float | None]]:
    """Return ``A[i][j]``, a score on the samples of request ``j`` after request ``i`` was served.

    ``None`` where it was not measured, or was no number, as of a model that is destroyed, and above the diagonal, where
    request ``j`` was not served yet.

    Args:
        records: Of a ledger, in its order.
        score: ``"accuracy"`` or ``"probability"``.
    """
    rows: list[list[float | None]] = []
    for i, record in enumerate(records):
        names = [*(f"request:{other.name}" for other in records[:i]), "forget"]
        found = [_number(record.after.get(f"{name}/{score}")) for name in names]
        rows.append([*found, *[None] * (len(records) - i - 1)])
    return rows


def _measured(matrix: list[list[float | None]], size: int) -> bool:
    return size > 1 and any(value is not None for row in matrix for value in row)


def _revived(matrix: list[list[float | None]]) -> list[float | None]:
    """Return for each request how much of it came back; ``None`` for the last, and where not all was measured."""
    A = torch.tensor([[math.nan if value is None else value for value in row] for row in matrix], dtype=torch.float64)
    found: list[float | None] = []
    for j in range(len(A)):
        later = A[j:, j:]
        known = not bool(later[:, 0].isnan().any())
        # the other columns have no part in this one's
        value = float(revival(torch.where(later.isnan(), 0.0, later))[0]) if known else math.nan
        found.append(None if math.isnan(value) else value)
    return found


@dataclass(frozen=True)
class _Verdict:
    """Whether it is gone: a kind for the colour, a heading, and why."""

    kind: Literal["good", "warn", "none"]
    title: str
    text: str


class _View:
    """A record as its page shows it."""

    def __init__(
        self,
        record: RequestRecord,
        position: int,
        retrained: Mapping[str, float],
        matrices: Mapping[str, list[list[float | None]]],
    ) -> None:
        self.record = record
        self.position = position
        self.retrained = retrained
        self.file = f"request_{position + 1}_{slug(record.name) or 'request'}.html"
        self.later = {name: [row[position] for row in matrix[position:]] for name, matrix in matrices.items()}
        self.revival = {name: _revived(matrix)[position] for name, matrix in matrices.items()}
        self.verdict = _verdict(record, retrained)
        self.remaining = [influence for influence in record.influences if influence.outcome == "remains"]

    @property
    def duration(self) -> str:
        """Time between start and end, in words."""
        passed = datetime.fromisoformat(self.record.ended) - datetime.fromisoformat(self.record.started)
        seconds = int(passed.total_seconds())
        if seconds < 1:
            return "less than a second"
        minutes, rest = divmod(seconds, 60)
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"

    def rows(self, names: Mapping[str, str]) -> list[tuple[str, str, str, str]]:
        """Return label, before, after and the retrained model's of measurements that there are."""
        found = []
        for key, label in names.items():
            if key in self.record.before or key in self.record.after:
                values = (source.get(key) for source in (self.record.before, self.record.after, self.retrained))
                before, after, reference = map(_percent, values)
                found.append((label, before, after, reference))
        return found

    def further(self) -> list[tuple[str, str, str]]:
        """Return name, before and after of measurements that have no label."""
        before, after = self.record.before, self.record.after
        names = sorted({*before, *after} - {*GONE, *COST})
        return [(name, _text(before.get(name)), _text(after.get(name))) for name in names]

    def settings(self) -> list[tuple[str, str]]:
        """Return the settings of the method as text."""
        return [(name, _text(value)) for name, value in self.record.settings.items()]

    def fall(self, key: str) -> float | None:
        """Return how much a measurement fell, ``None`` if it was not made before and after."""
        before, after = _number(self.record.before.get(key)), _number(self.record.after.get(key))
        return None if before is None or after is None else before - after


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _percent(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if math.isfinite(value) else "no number"


def _when(moment: str) -> str:
    """Return a moment of ISO 8601 as people write it."""
    return f"{datetime.fromisoformat(moment):%d %B %Y, %H:%M:%S %Z}"


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else "no number"
    return ", ".join(f"{k}: {_text(v)}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)


def _verdict(record: RequestRecord, retrained: Mapping[str, float]) -> _Verdict:
    """Hold the attacker's chance against the retrained model's, or against one half, allowing for few samples."""
    if not record.before and not record.after:
        return _Verdict(
            "none",
            "Not measured",
            "Nothing was measured. What this record shows is what was removed: see below what became of everything that"
            " was kept of the samples.",
        )
    before, after = _number(record.before.get(AUC)), _number(record.after.get(AUC))
    if before is None or after is None:
        return _Verdict(
            "none",
            "Not measured",
            "The run gave no forgotten samples beside samples that were never learned, so that nothing can be said.",
        )
    forgotten = record.after.get("forget/samples", record.num_ids)
    unseen = record.after.get("holdout/samples", forgotten)
    # two standard errors of the AUC of so many against so many scores where there is no difference
    noise = 2 * math.sqrt((forgotten + unseen + 1) / (12 * forgotten * unseen)) if forgotten and unseen else 1.0
    reference = retrained.get(AUC)
    yardstick = 0.5 if reference is None else reference
    name = "where the two look alike" if reference is None else "for a model trained again without them"
    chance = (
        "The chance that a forgotten sample looks better known to the model than one never learned is"
        f" {100 * after:.0f} % (before: {100 * before:.0f} %); {name} it is {100 * yardstick:.0f} %, give or take"
        f" {100 * noise:.0f} for so few samples."
    )
    if after > yardstick + noise:
        return _Verdict("warn", "Still recognised", f"{chance} The model still treats these samples as known.")
    if after < yardstick - noise:
        more = "They are less known than samples that it never saw: an outsider could tell that they were removed."
        return _Verdict("warn", "Conspicuously unknown", f"{chance} {more}")
    if abs(before - yardstick) <= noise:
        more = "The test did not recognise them before the request either, so that it proves nothing here."
        return _Verdict("none", "No evidence from this test", f"{chance} {more}")
    return _Verdict("good", "Not told apart any more", f"{chance} This test recognises them no longer.")


def _matrix_image(records: Sequence[RequestRecord], matrix: list[list[float | None]]) -> Image | None:
    if not _measured(matrix, len(records)):
        return None
    return draw(
        "request_matrix.png",
        "Heat map: probability of the right answer on the samples of each request, after each request. The numbers are"
        " in the tables.",
        lambda theme: _matrix_figure([record.name for record in records], matrix, theme),
    )


def _matrix_figure(names: Sequence[str], matrix: list[list[float | None]], theme: Theme = LIGHT) -> Figure:
    """Draw the request matrix, which is empty above its diagonal."""
    size, cell = len(names), min(3.4 / len(names), 0.85)
    figure, axes = new_figure(
        height=1.6 + size * cell,
        width=2.4 + size * max(cell, 0.5),
        title="Known after each request",
        theme=theme,
    )
    values = [[math.nan if value is None else value for value in row] for row in matrix]
    axes.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            if value is not None and size <= 12:
                color = cell_colors(value, (0.0, 1.0))[1]
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9, color=color)
    labels = [short(name, 14) for name in names]
    axes.set_xticks(range(size), labels, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(size), labels)
    axes.set_xlabel("Samples of request")
    axes.set_ylabel("After request")
    return figure
