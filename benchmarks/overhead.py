"""The overhead of each callback as ratios within one run: ``python benchmarks/overhead.py [--quick]``.

Every ratio compares two runs that take turns (A B A B ...), by the processor time and by the clock; the median over the
turns is shown. The bar is held against the processor time, which other processes on the machine move less. They do move
it, through the caches they share: on a busy machine a callback's few instructions weigh more.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

from lightning.pytorch import LightningModule, Trainer
from measuring import Ratio, be_quiet, ratio, show, take_turns, write
from torch.utils.data import DataLoader
from workloads import Cost, WithoutEvents, Workload, fit, quiet_trainer, read, torch_loop

from lightning_cl import EWC, ContinualCallback, ContinualMetrics, ExperienceReplay, Task
from lightning_cl.datamodules import ClassIncremental, TaskStreamDataModule

RESULTS = Path(__file__).parent / "results" / "overhead.json"


class Identity(ContinualCallback):
    """Attaches the step pipeline and changes nothing."""

    def transform_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> Any:
        return batch


class TimedEWC(EWC):
    """Notes the cost of each consolidation."""

    def __init__(self, strength: float) -> None:
        super().__init__(strength)
        self.consolidations: list[Cost] = []

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        start = Cost.now()
        super().on_task_end(trainer, pl_module, task)
        self.consolidations.append(Cost.now() - start)


def lightning_and_stream(work: Workload, turns: int) -> list[Ratio]:
    """Compare Lightning with a torch loop, and the stream's loader with a DataLoader."""
    data = work.data(work.steps)

    def loader() -> DataLoader[Any]:
        return DataLoader(data, batch_size=work.batch_size, shuffle=True)

    def one_task() -> TaskStreamDataModule:
        # all five tasks as one, so that only the loader differs
        return work.stream(data, scenario=ClassIncremental(n_tasks=1))

    stream = one_task()
    stream.trainer = quiet_trainer()
    stream.setup("fit")
    costs = take_turns(
        turns,
        lambda: read(loader()),
        lambda: read(stream.train_dataloader()),
        lambda: torch_loop(work, loader()),
        lambda: fit(work, loader(), max_epochs=1)[1],
        lambda: fit(work, one_task(), [WithoutEvents()])[1],
    )
    return [
        ratio(work.name, "reading: stream's loader / DataLoader", [(a, b) for a, b, _, _, _ in costs], None),
        ratio(work.name, "training: Lightning / torch loop", [(a, b) for _, _, a, b, _ in costs], None),
        ratio(work.name, "training: stream's loader / DataLoader", [(a, b) for _, _, _, a, b in costs], None),
    ]


def events_pipeline_metrics(work: Workload, turns: int) -> list[Ratio]:
    """Compare whole fits over five tasks, validation included, with and without all that hears of tasks."""
    data, val = work.data(work.steps), work.data(2)

    def run(*callbacks: Any) -> Cost:
        return fit(work, work.stream(data, val), callbacks)[1]

    pairs = take_turns(turns, lambda: run(WithoutEvents()), lambda: run(Identity(), ContinualMetrics()))
    return [ratio(work.name, "events + pipeline + metrics / without", pairs, 1.05)]


def ewc(work: Workload, turns: int) -> list[Ratio]:
    """Compare a step of the second task, where the penalty acts, and the consolidation with an epoch of the task."""
    data = work.data(work.steps)
    second = (work.steps, 2 * work.steps - 1)

    def run(*callbacks: Any) -> Cost:
        return fit(work, work.stream(data), callbacks, max_steps=2 * work.steps)[0].step_cost(*second)

    def protected() -> tuple[Cost, Cost]:
        callback = TimedEWC(1.0)
        step = run(callback)
        return step, callback.consolidations[0]

    costs = take_turns(turns, run, protected)
    steps = [(plain, step) for plain, (step, _) in costs]
    epochs = [(plain * work.steps, consolidation) for plain, (_, consolidation) in costs]
    return [
        ratio(work.name, "EWC: a step of the second task / without", steps, 1.15),
        ratio(work.name, "EWC: consolidation / an epoch of the task", epochs, 1.0),
    ]


def replay(work: Workload, turns: int) -> list[Ratio]:
    """Compare batches of which half is replayed with plain batches as large, in the second task."""
    data, steps = work.data(work.steps), work.steps
    first, later = (steps * 2, steps * 3 - 1), (steps * 3, steps * 4 - 1)

    def run(*callbacks: Any, **settings: Any) -> tuple[Cost, Cost]:
        stream = work.stream(data, **settings)
        module = fit(work, stream, callbacks, max_steps=4 * steps)[0]
        return module.step_cost(*first), module.step_cost(*later)

    costs = take_turns(
        turns,
        # the same number of steps, for which it reads each task twice as often
        lambda: run(batch_size=2 * work.batch_size, epochs_per_task=4),
        lambda: run(ExperienceReplay(20 * work.batch_size), epochs_per_task=2),
    )
    return [
        ratio(work.name, "replay: first epoch of a task / as large batches", [(a[0], b[0]) for a, b in costs], 1.10),
        ratio(work.name, "replay: later epochs / as large batches", [(a[1], b[1]) for a, b in costs], 1.10),
    ]


def import_time(turns: int) -> list[Ratio]:
    """Compare `import lightning_cl` with `import lightning.pytorch`, each in a new interpreter."""

    def run(package: str) -> Cost:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", f"import {package}"], check=True)
        wall, now = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        return Cost(wall, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime)

    pairs = take_turns(turns, lambda: run("lightning.pytorch"), lambda: run("lightning_cl"))
    return [ratio("import", "lightning_cl / lightning.pytorch", pairs, 1.10)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the overhead of each callback, as ratios.")
    parser.add_argument("--quick", action="store_true", help="few and short turns; prints, and writes no file")
    parser.add_argument("--only", default="", help="measure only what has this in its name, such as 'ewc'; no file")
    arguments = parser.parse_args()
    be_quiet()
    turns = 3 if arguments.quick else 7
    scale = 1 if arguments.quick else 2
    ratios: list[Ratio] = []
    for work in (Workload("mlp", 64, 40 * scale), Workload("transformer", 32, 10 * scale)):
        for measure in (lightning_and_stream, events_pipeline_metrics, ewc, replay):
            if arguments.only in measure.__name__:
                ratios += measure(work, turns)
    if arguments.only in "import_time":
        ratios += import_time(turns)
    show(ratios)
    if not arguments.quick and not arguments.only:
        write(RESULTS, ratios=ratios)


if __name__ == "__main__":
    main()
