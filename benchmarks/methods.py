"""What every method costs, as ratios within one run: ``python benchmarks/methods.py [--quick] [--only NAME]``.

A step of the second task, where all methods act, is compared with a step without the method; of those that by their
nature run the network once more, with a step and that run. Then a stream of a hundred short tasks: its last tasks are
compared with its first, in time and in memory. The first task is left out, because there is nothing to protect in it.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

# before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from measuring import Ratio, be_quiet, ratio, show, take_turns, write
from torch import Tensor
from torch.nn.functional import cross_entropy
from workloads import NUM_TASKS, Cost, Workload, fit

from lightning_cl import ContinualCallback
from lightning_cl.cli.methods import method_classes
from lightning_cl.datamodules import DataIncremental

RESULTS = Path(__file__).parent / "results" / "methods.json"
# tasks whose median stands for the second, and for the last
WINDOW = 5
MEBIBYTE = 2**20


@dataclass(frozen=True)
class Case:
    """How a method is measured.

    Args:
        settings: Its arguments, the same for both workloads.
        bar: The most that a step may be of a step without it and of ``beside``; ``None`` where that is only shown.
        beside: What runs beside the step by the method's nature: nothing, ``"forward"`` (of a teacher), or
            ``"backward"`` (a forward and a backward, for each task before).
        of_workload: More arguments, by workload.
        grows: What grows with the number of tasks by the method's nature; nothing is held against a bar then.
    """

    settings: dict[str, Any]
    bar: float | None = None
    beside: str = ""
    of_workload: dict[str, dict[str, Any]] | None = None
    grows: str = ""

    def make(self, name: str, work: Workload) -> ContinualCallback:
        return method_classes()[name](**self.settings, **(self.of_workload or {}).get(work.name, {}))


# the memories are full when the second task starts, and draw as much as a batch holds
BATCH = {"mlp": 64, "transformer": 32}
DRAW = {name: {"batch_size": size} for name, size in BATCH.items()}
CASES = {
    "agem": Case({"capacity": 192}, beside="backward", of_workload=DRAW),
    "component-clip": Case({"max_norm": 0.1}),
    "er": Case({"capacity": 192}, beside="backward", of_workload=DRAW),
    # what rehearsal costs beyond its passes is measured by `rehearsal.py`
    "der": Case({"capacity": 192}, beside="backward", of_workload=DRAW),
    "derpp": Case({"capacity": 192, "draws": 1}, beside="backward", of_workload=DRAW),
    "er-ace": Case({"capacity": 192}, beside="backward", of_workload=DRAW),
    "ewc": Case({"strength": 1.0}, 1.15),
    # of the bar, 0.05 is the loss itself
    "feature-distillation": Case(
        {"strength": 1.0},
        1.05,
        "forward",
        {"mlp": {"layers": ["network.3"]}, "transformer": {"layers": ["network.blocks.*"]}},
    ),
    "freeze-except": Case(
        {}, 1.05, of_workload={"mlp": {"trainable": ["*.5.*"]}, "transformer": {"trainable": ["*.head.*"]}}
    ),
    "gem": Case({"capacity": 192}, beside="backward", of_workload=DRAW, grows="a backward for each task before"),
    "gradient-mask": Case({"fraction": 0.5}, 1.05),
    "gradient-projection": Case({}, 1.5, grows="bases, up to the width of each layer"),
    "hft": Case({}, 1.05),
    "icarl": Case({"capacity": 192}, beside="backward", of_workload=DRAW),
    "i-lora": Case({"capacity": 192}, beside="backward", of_workload=DRAW),
    "l2": Case({"strength": 1.0}, 1.15),
    "lwf": Case({}, 1.05, "forward"),
    "mas": Case({"strength": 1.0}, 1.15),
    "mer": Case({"capacity": 192, "batches": 1}, of_workload=DRAW),
    "mir": Case({"capacity": 192, "candidates": 128}, beside="backward", of_workload=DRAW),
    "momentum-interpolation": Case({}),
    "pcr": Case({"capacity": 192}, beside="backward", of_workload=DRAW),
    "reptile": Case({"interval": 10, "rate": 0.5}, 1.05),
    "rewarm": Case({"shape": "cosine"}, 1.05),
    "rwalk": Case({"strength": 1.0}, 1.25),
    "salient-layers": Case({}, 1.05),
    "si": Case({"strength": 1.0}, 1.25),
    "singular-subspaces": Case({}, 1.5, grows="protected directions, up to the width of each layer"),
    "soft-mask": Case({}, 1.05),
    # draws as much as a batch holds
    "static-conpet": Case({"capacity": 192}, beside="backward"),
}
# these work on the LoRA adapters of a PEFT model, and `adapter_cost.py` measures steps with slots
ON_ADAPTERS = (
    "codyra",
    "color",
    "curlora",
    "dynamic-conpet",
    "growing-lora",
    "lora-fa",
    "o-lora",
    "periodic-lora",
    "sd-lora",
)
# prompts go in front of tokens, which the workloads have not
PROMPTS = ("coda-prompt", "dual-prompt", "l2p", "progressive-prompts", "s-prompts")
# generates text before a task, or trains blocks of a language model: no step of a classifier; is measured by
# `optimizers.py`, around AdamW
WITHOUT = ("self-rehearsal", "block-expansion", "spike-aware", *ON_ADAPTERS, *PROMPTS)


# ---------------------------------------------------------------------- a step


def beside(work: Workload, kind: str, repetitions: int) -> Cost:
    """Return the median cost of what runs beside a step: a forward without a graph, or a forward and a backward."""
    network = work.network()
    inputs, labels = work.data(1)[: work.batch_size]
    costs = []
    for _ in range(repetitions):
        start = Cost.now()
        if kind == "forward":
            with torch.no_grad():
                network.eval()(inputs)
        elif kind == "backward":
            cross_entropy(network.train()(inputs), labels).backward()
        costs.append(Cost.now() - start)
    return Cost(median(cost.wall for cost in costs), median(cost.cpu for cost in costs))


def step(name: str, case: Case, work: Workload, turns: int) -> Ratio:
    """Compare a step of the second task with one without the method."""
    data = work.data(work.steps)

    def run(*callbacks: Any) -> Cost:
        module = fit(work, work.stream(data), callbacks, max_steps=2 * work.steps)[0]
        return module.step_cost(work.steps, 2 * work.steps - 1)

    pairs = take_turns(turns, lambda: run() + beside(work, case.beside, work.steps), lambda: run(case.make(name, work)))
    return ratio(work.name, f"{name}: a step / without" + (f" + {case.beside}" if case.beside else ""), pairs, case.bar)


# ---------------------------------------------------------------------- a hundred tasks


@dataclass(frozen=True)
class Flatness:
    """The last tasks of a stream against the first after task one.

    Args:
        method: Its name.
        tasks: Tasks of the stream.
        step_ms: Median processor time of a step of the first, in milliseconds.
        step: The last's, as a ratio.
        task_end_ms: Processor time of what the method does at a boundary, in milliseconds.
        task_end: The last's, as a ratio.
        tensors_mib: Live tensors at the end of the second task, before what the method does there, in MiB; without
            the data.
        tensors: The last's, as a ratio.
        process: The memory of the process, as a ratio.
        grows: What grows by the method's nature.
    """

    method: str
    tasks: int
    step_ms: float
    step: float
    task_end_ms: float
    task_end: float
    tensors_mib: float
    tensors: float
    process: float
    grows: str

    @property
    def verdict(self) -> str:
        if self.grows:
            return self.grows
        # what takes less than a tenth of a millisecond cannot be told from noise
        flat = self.step <= 1.1 and self.tensors <= 1.01 and (self.task_end <= 1.25 or self.task_end_ms < 0.1)
        return "flat" if flat else "grows"


class Probe(Callback):
    """Notes memory at the last batch of each task, and the cost of what a method does between tasks.

    Args:
        method: Its hooks are timed.
        steps: Steps in a task.
        tasks: The tasks to note memory in, by index.
        data: Tensors that do not count.
    """

    def __init__(self, method: ContinualCallback, steps: int, tasks: tuple[int, ...], data: Sequence[Tensor]) -> None:
        self.boundaries: Counter[int] = Counter()
        self.tensors: dict[int, int] = {}
        self.process: dict[int, int] = {}
        self._steps, self._tasks, self._data = steps, tasks, data
        for hook in ("on_task_start", "on_task_end"):
            setattr(method, hook, self._timed(getattr(method, hook), after=int(hook == "on_task_end")))

    def _timed(self, hook: Callable[..., None], after: int) -> Callable[..., None]:
        def timed(trainer: Trainer, pl_module: LightningModule, task: Any) -> None:
            start = Cost.now()
            hook(trainer, pl_module, task)
            # of one boundary: the end of a task, and the start of the next
            self.boundaries[task.index + after] += (Cost.now() - start).cpu

        return timed

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        task, at = divmod(trainer.global_step - 1, self._steps)
        if at == self._steps - 1 and task in self._tasks:
            gc.collect()
            self.tensors[task] = live_bytes(pl_module) - sum(tensor.nbytes for tensor in self._data)
            self.process[task] = int(Path("/proc/self/statm").read_text().split()[1])


def live_bytes(pl_module: LightningModule) -> int:
    """Return the bytes of all tensors that Python knows, and of the gradients, which it may not."""
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    found += [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}
    return sum(storages.values())


def flatness(name: str, case: Case, tasks: int, steps: int) -> Flatness:
    """Fit a stream of short tasks."""
    work = Workload("mlp", 16, steps)
    data = work.data(tasks * steps // NUM_TASKS)
    stream = work.stream(data, scenario=DataIncremental(n_tasks=tasks))
    method = case.make(name, work)
    probe = Probe(method, steps, (1, tasks - 1), data.tensors)
    module = fit(work, stream, [probe, method])[0]
    early, late = range(1, 1 + WINDOW), range(tasks - WINDOW, tasks)

    def step_ms(window: range) -> float:
        return 1000 * median(module.step_cost(task * steps, (task + 1) * steps - 1).cpu for task in window)

    def boundary_ms(window: range) -> float:
        return 1000 * median(probe.boundaries[task] for task in window)

    return Flatness(
        method=name,
        tasks=tasks,
        step_ms=step_ms(early),
        step=step_ms(late) / step_ms(early),
        task_end_ms=boundary_ms(early),
        task_end=boundary_ms(late) / boundary_ms(early),
        tensors_mib=probe.tensors[1] / MEBIBYTE,
        tensors=probe.tensors[tasks - 1] / probe.tensors[1],
        process=probe.process[tasks - 1] / probe.process[1],
        grows=case.grows,
    )


def show_flatness(rows: list[Flatness]) -> None:
    head = ("step, ms", "ratio", "end, ms", "ratio", "MiB", "ratio", "RSS")
    print(f"\n{'method':<24}" + "".join(f" {name:>8}" for name in head))
    for row in rows:
        figures = (row.step_ms, row.step, row.task_end_ms, row.task_end, row.tensors_mib, row.tensors, row.process)
        print(f"{row.method:<24}" + "".join(f" {figure:>8.3f}" for figure in figures) + f" {row.verdict}")


# ---------------------------------------------------------------------- all


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the cost of every method, as ratios.")
    parser.add_argument("--quick", action="store_true", help="few and short turns, 20 tasks; prints, writes no file")
    parser.add_argument("--only", default="", help="only the method of this name, such as 'ewc'; no file")
    arguments = parser.parse_args()
    be_quiet()
    names = [arguments.only] if arguments.only else [name for name in method_classes() if name not in WITHOUT]
    if unknown := [name for name in names if name not in CASES or name not in method_classes()]:
        raise SystemExit(f"A line in `CASES`, and a method of that name, are needed for: {', '.join(unknown)}")
    turns, scale = (3, 1) if arguments.quick else (7, 2)
    works = [Workload("mlp", BATCH["mlp"], 40 * scale), Workload("transformer", BATCH["transformer"], 10 * scale)]
    ratios = [step(name, CASES[name], work, turns) for work in works for name in names]
    show(ratios)
    tasks, steps = (20, 12) if arguments.quick else (100, 12)
    rows = [flatness(name, CASES[name], tasks, steps) for name in names]
    show_flatness(rows)
    if not arguments.quick and not arguments.only:
        write(RESULTS, ratios=ratios, flatness=rows)


if __name__ == "__main__":
    main()
