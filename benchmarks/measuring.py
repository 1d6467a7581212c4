"""What benchmarks of callbacks share: runs that take turns, ratios of their costs, and how these are shown and kept."""

from __future__ import annotations

import json
import logging
import platform
import statistics
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from workloads import Cost


@dataclass(frozen=True)
class Ratio:
    """A measured ratio.

    Args:
        workload: What was trained.
        what: The run, and what it is compared with.
        cpu: Median of the ratios of processor time.
        wall: Median of the ratios of the clock.
        base_ms: Median processor time of what it is compared with, in milliseconds.
        bar: The most that ``cpu`` may be; ``None`` where the ratio is only shown.
    """

    workload: str
    what: str
    cpu: float
    wall: float
    base_ms: float
    bar: float | None

    @property
    def verdict(self) -> str:
        if self.bar is None:
            return ""
        return "pass" if self.cpu <= self.bar else "miss"


def be_quiet() -> None:
    """Let Lightning tell nothing, and use one thread."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)


def take_turns(turns: int, *runs: Callable[[], Any]) -> list[tuple[Any, ...]]:
    """Call the runs one after another, ``turns`` times, after one turn that is not counted."""
    return [tuple(run() for run in runs) for _ in range(turns + 1)][1:]


def ratio(workload: str, what: str, pairs: list[tuple[Cost, Cost]], bar: float | None) -> Ratio:
    """Make a ratio of pairs (base, run)."""
    return Ratio(
        workload,
        what,
        cpu=statistics.median(run.cpu / base.cpu for base, run in pairs),
        wall=statistics.median(run.wall / base.wall for base, run in pairs),
        base_ms=statistics.median(base.cpu for base, _ in pairs) * 1000,
        bar=bar,
    )


def show(ratios: list[Ratio]) -> None:
    width = max((len(r.what) for r in ratios), default=0)
    print(f"{'workload':<12} {'what':<{width}} {'base, ms':>9} {'cpu':>6} {'clock':>6} {'bar':>5}")
    for r in ratios:
        bar = "" if r.bar is None else f"{r.bar:.2f}"
        print(f"{r.workload:<12} {r.what:<{width}} {r.base_ms:>9.2f} {r.cpu:>6.3f} {r.wall:>6.3f} {bar:>5} {r.verdict}")


def with_verdicts(rows: list[Any]) -> list[dict[str, Any]]:
    """Return the fields of dataclasses that have a verdict, and it."""
    return [asdict(row) | {"verdict": row.verdict} for row in rows]


def conditions(*packages: str) -> dict[str, Any]:
    """Return when and with what something is measured, with the versions of further packages."""
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("torch", "lightning", "lightning-cl", *packages)},
        "python": platform.python_version(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def write(path: Path, *packages: str, **tables: list[Any]) -> None:
    """Keep tables of dataclasses with a verdict, and the conditions that they were measured in."""
    record = conditions(*packages) | {name: with_verdicts(rows) for name, rows in tables.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
