"""Optimizers under planted gradient spikes: ``python benchmarks/spikes.py``.

A small Llama with random weights reads three domains one after the other: Python's standard library, the documentation
of the language (reStructuredText) and the C++ headers of torch, which stand on every machine that runs this. Some runs
have gradient spikes planted: in a few steps, the gradients of some tensors are multiplied by 10 to 1000, before
anything clips them. A seed sets the weights, the order of the samples and the spikes, so that all optimizers meet the
same.

AdamW, with and without clipping, and SPAM take the learning rate of three that is best for them without spikes on seed
0; the others take that of SPAM. Results are written after each run, and runs that the file already holds are not
repeated: an interrupted benchmark goes on. All runs take about half an hour of one idle core.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

# before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

from matplotlib.figure import Figure
from measuring import be_quiet
from spike_runs import BATCH, BLOCK, DOMAINS, EVERY, LLAMA, Run, Settings, arms, train, write_texts

from lightning_cl.report.style import LIGHT, direct_labels, method_styles, new_figure, png
from lightning_cl.report.table import Statistic

ROOT = Path(__file__).parents[1]
RESULTS, TABLE = ROOT / "benchmarks" / "results" / "spikes.json", ROOT / "benchmarks" / "results" / "spikes.md"
FIGURES = {
    spikes: ROOT / "docs" / "assets" / f"spikes-{name}.png" for spikes, name in ((False, "none"), (True, "planted"))
}
LIMITS = (1.95, 3.35)  # of the loss in figures
QUICK = Settings(
    steps=20, seeds=1, learning_rates=(2e-3,), reset_interval=25, warmup_steps=4, spike_rate=0.2, val_blocks=4
)


# ---------------------------------------------------------------------- results


class Results:
    """Runs in a file, which is written anew with each of them."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self.settings = settings
        self.runs: list[Run] = []
        if path.is_file():
            kept = json.loads(path.read_text("utf-8"))
            if kept["settings"] != json.loads(json.dumps(asdict(settings))):
                raise ValueError(f"{path} has runs with other settings: remove it, or give another --output.")
            self.runs = [Run(**run) for run in kept["runs"]]

    def add(self, run: Run) -> None:
        self.runs.append(run)
        record = {
            "versions": {name: version(name) for name in ("torch", "lightning", "transformers", "lightning-cl")},
            "python": platform.python_version(),
            "processor": platform.machine(),
            "model": LLAMA,
            "batch": [BATCH, BLOCK],
            "settings": asdict(self.settings),
        }
        # a line for each run
        lines = ",\n".join(f"    {json.dumps(asdict(run))}" for run in sorted(self.runs, key=lambda run: run.key))
        text = json.dumps(record, indent=2).removesuffix("\n}") + f',\n  "runs": [\n{lines}\n  ]\n}}\n'
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # a run that is interrupted here leaves the whole file
        partial_file = self.path.with_suffix(".part")
        partial_file.write_text(text, "utf-8")
        partial_file.replace(self.path)

    def of(self, arm: str, spikes: bool, learning_rate: float | None) -> list[Run]:
        """Return the runs of an arm with its learning rate, by seed."""
        found = [run for run in self.runs if (run.arm, run.spikes, run.learning_rate) == (arm, spikes, learning_rate)]
        return sorted(found, key=lambda run: run.seed)

    def rate(self, name: str) -> float | None:
        """Return the learning rate that an arm learns best with, without spikes on seed 0; ``None`` if none ran."""
        chosen = arms(self.settings)[name].rates_of or name
        tried = [run for run in self.runs if (run.arm, run.spikes, run.seed) == (chosen, False, 0)]
        return min(tried, key=lambda run: run.learned).learning_rate if tried else None


def wanted(name: str, results: Results) -> list[tuple[bool, int, float]]:
    """Return spikes, seed and learning rate of what is still to run of an arm; its rates come first."""
    settings, done = results.settings, {run.key for run in results.runs}
    if arms(settings)[name].rates_of is None:
        tried = [(False, 0, rate) for rate in settings.learning_rates if (name, False, 0, rate) not in done]
        if tried:
            return tried
    rate = results.rate(name)
    assert rate is not None  # the arm that it is taken from has run
    return [
        (spikes, seed, rate)
        for seed in range(settings.seeds)
        for spikes in (False, True)
        if (name, spikes, seed, rate) not in done
    ]


# ---------------------------------------------------------------------- what the documentation shows


def table(results: Results) -> str:
    """Return the tables, in Markdown: means over the seeds, with half the width of their 95 % interval."""
    known = {name: arm.label for name, arm in arms(results.settings).items() if results.rate(name) is not None}
    found = {(name, spikes): results.of(name, spikes, results.rate(name)) for name in known for spikes in (False, True)}
    rate = results.rate("adamw")
    against = {
        (run.spikes, run.seed): run.learned for spikes in (False, True) for run in results.of("adamw", spikes, rate)
    }

    def learned(name: str) -> list[str]:
        cells, without = [f"{results.rate(name):g}"], {run.seed: run.learned for run in found[name, False]}
        for spikes in (False, True):
            runs = found[name, spikes]
            paired = [run.learned - against[spikes, run.seed] for run in runs if (spikes, run.seed) in against]
            cells += [_mean(run.learned for run in runs), _mean(paired, sign="+") if name != "adamw" else ""]
        cost = [run.learned - without[run.seed] for run in found[name, True] if run.seed in without]
        return [*cells, _mean(cost, sign="+")]

    def domains(name: str, spikes: bool) -> list[str]:
        runs, tasks = found[name, spikes], range(len(DOMAINS))
        cells = [_mean(run.val_loss[task][domain] for run in runs) for domain in tasks for task in tasks[domain:]]
        return ["planted" if spikes else "none", *cells, _mean((run.forgotten for run in runs), sign="+")]

    def clipped(name: str) -> list[str]:
        planted, free = found[name, True], found[name, False]
        if not planted or not free:
            return ["", "", ""]
        return [
            f"{statistics.fmean(run.median_remaining for run in planted):.1f}",
            f"{statistics.fmean(run.unclipped for run in planted):.0%}",
            f"{statistics.fmean(run.lowered for run in free):.2%}",
        ]

    after = [f"{domain} after {later}" for at, domain in enumerate(DOMAINS) for later in list(DOMAINS)[at:]]
    parts = [
        _markdown(
            ["", "rate", "loss, no spikes", "against AdamW", "loss, spikes", "against AdamW", "cost of spikes"],
            [[label, *learned(name)] for name, label in known.items()],
        ),
        _markdown(
            ["", "spikes", *after, "rise of the first"],
            [[label, *domains(name, spikes)] for name, label in known.items() for spikes in (False, True)],
        ),
        _markdown(
            ["", "left of a spike", "spikes not clipped", "clipped without spikes"],
            [[label, *clipped(name)] for name, label in known.items()],
        ),
    ]
    named = zip(("learned", "domains", "clipped"), parts, strict=True)
    return "\n".join(f"<!-- --8<-- [start:{name}] -->\n{part}\n<!-- --8<-- [end:{name}] -->\n" for name, part in named)


def _mean(values: Iterable[float], sign: str = "") -> str:
    statistic = Statistic.of(values)
    if not statistic.n:
        return "–"
    mean = f"{statistic.mean:{sign}.2f}"
    return f"{mean} ± {statistic.interval():.2f}" if statistic.n > 1 else mean


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def figure(results: Results, spikes: bool) -> Figure:
    """Draw the training loss of all arms, the mean over seeds; ``spikes`` chooses the runs."""
    known = {name: arm.label for name, arm in arms(results.settings).items()}
    title = "Training loss, " + ("with planted spikes" if spikes else "without spikes")
    drawn, axes = new_figure(height=4.0, width=8.0, title=title, theme=LIGHT)
    styles = method_styles(list(known.values()), LIGHT)
    points = results.settings.steps // EVERY
    labels = []
    for name, label in known.items():
        curves = [run.curve for run in results.of(name, spikes, results.rate(name))]
        mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
        # not over the boundaries, where the loss jumps
        mean = [value for i in range(0, len(mean), points) for value in smooth(mean[i : i + points])]
        color, line = styles[label]
        axes.plot([EVERY * (i + 0.5) for i in range(len(mean))], mean, color=color, linestyle=line, linewidth=1.6)
        labels.append((mean[-1], label, color))
    total = results.settings.steps * len(DOMAINS)
    axes.set_xlim(0, total)
    axes.set_ylim(*LIMITS)
    for task, domain in enumerate(DOMAINS):
        start = task * results.settings.steps
        if task:
            axes.axvline(start, color=LIGHT.muted, linewidth=0.8, linestyle=":")
        middle = start + results.settings.steps / 2
        axes.text(middle, LIMITS[1] - 0.02, domain, color=LIGHT.muted, fontsize=9, va="top", ha="center")
    direct_labels(axes, labels)
    axes.set_xlabel("Optimizer steps")
    axes.set_ylabel("Loss in nats a byte (lower is better)")
    return drawn


def smooth(values: Sequence[float], reach: int = 2) -> list[float]:
    """Return the mean of each value with those of up to ``reach`` places before and after it."""
    return [statistics.fmean(values[max(i - reach, 0) : i + reach + 1]) for i in range(len(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare optimizers with and without planted gradient spikes.")
    parser.add_argument("--only", choices=arms(Settings()), help="run this arm only")
    parser.add_argument("--quick", action="store_true", help="few steps, one seed and rate; prints, keeps no result")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of the runs")
    given = parser.parse_args()
    be_quiet()
    settings = QUICK if given.quick else Settings()
    with tempfile.TemporaryDirectory() as folder:
        results = Results(Path(folder) / "quick.json" if given.quick else given.output, settings)
        texts = write_texts(Path(folder), settings)
        known = arms(settings)
        for name in filter(None, (known[given.only].rates_of, given.only)) if given.only else known:
            while left := wanted(name, results):
                run = train(name, *left[0], settings, texts)
                results.add(run)
                spikes = f"{run.planted} spikes" if run.spikes else "no spikes"
                print(f"{name}, seed {run.seed}, rate {run.learning_rate:g}, {spikes}: {run.learned:.3f}", flush=True)
    tables = table(results)
    print(tables)
    if given.output == RESULTS and not given.quick and not given.only:
        TABLE.write_text(tables, "utf-8")
        for spikes, path in FIGURES.items():
            path.write_bytes(png(figure(results, spikes)))


if __name__ == "__main__":
    main()
