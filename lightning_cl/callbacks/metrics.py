"""The accuracy matrix of a stream, read from what the user's own ``validation_step`` logs."""

from __future__ import annotations

import resource
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from torch import Tensor
from typing_extensions import override

from lightning_cl.core.callback import ContinualCallback, continual_callbacks
from lightning_cl.core.checks import check_choice
from lightning_cl.core.evaluation import check_metrics_apart, run_validation
from lightning_cl.core.events import TaskEvents
from lightning_cl.core.generation import GeneratesSamples
from lightning_cl.core.requests import Influence
from lightning_cl.core.stream import TaskStream
from lightning_cl.core.task import Task
from lightning_cl.metrics.record import RecordsTraces, RunRecord, WithinTask, write_record
from lightning_cl.metrics.summary import summarise_matrix

__all__ = ["ContinualMetrics"]


class ContinualMetrics(ContinualCallback):
    r"""Fill the matrix :math:`R_{t,i}`, the score on task *i* after learning task *t*, and summarise it.

    Scores are the values that the module logs as ``monitor`` in its ``validation_step``, one for each task's loader; a
    ``validation_step`` without ``dataloader_idx`` serves as it is. After every task the summary goes to all loggers as
    ``continual/<name>``. The matrix, with the texts of a module that generates samples, is kept in the checkpoint and,
    at the end of the fit, written to ``record.json`` and ``matrix.csv``. Without a task stream, validation loader *i*
    stands for task *i*, and a single loader for the task being learned.

    Args:
        monitor: The logged name of the score.
        mode: ``"max"`` if a higher score is better, ``"min"`` for a loss or a perplexity, whose forgetting is its rise.
        further: More logged values of each task to keep beside the matrix, such as ``["val_acc"]``.
        directory: Where the record is written; the logger's directory if ``None``.
        name: Name of the method in the report; made of the callbacks in use if ``None``.
        baseline: Evaluate all tasks before the first step, for the forward transfer; needs
            ``TaskStreamDataModule(evaluate="all")``.
        joint: Scores of a run on all tasks at once, one per task, for the intransigence.

    Raises:
        ValueError: At the start of the fit if there is no validation data, and at the first evaluation if ``monitor``
            was not logged.
    """

    acts_on: ClassVar[tuple[Literal["learn", "forget"], ...]] = ("learn", "forget")
    boundaries: ClassVar[Literal["required", "unused", "evaluation"]] = "evaluation"

    def __init__(
        self,
        monitor: str = "val_acc",
        *,
        mode: Literal["max", "min"] = "max",
        further: list[str] | None = None,
        directory: str | Path | None = None,
        name: str | None = None,
        baseline: bool = False,
        joint: list[float] | None = None,
    ) -> None:
        check_choice("mode", mode, ("max", "min"))
        self.monitor = monitor
        self.mode = mode
        self.further = further or []
        self.directory = directory
        self.name = name
        self.baseline = baseline
        self.joint = joint
        self._task_names: list[str] = []
        self._rows: dict[int, list[float]] = {}
        self._trained: dict[int, list[int]] = {}
        self._further: dict[str, dict[int, list[float]]] = {name: {} for name in self.further}
        self._samples: dict[int, dict[str, str]] = {}
        self._baseline_scores: list[float] = []
        self._steps: list[int] = []
        self._step_tasks: list[int] = []
        self._step_scores: list[list[float]] = []
        # each fit may count its steps from 0
        self._steps_before = 0
        self._steps_so_far = 0
        self._seconds = 0.0
        self._started = 0.0

    # ------------------------------------------------------------------ results

    @property
    def matrix(self) -> Tensor:
        """The scores R [tasks trained, tasks], NaN where not evaluated."""
        return _stack([self._rows.get(task, []) for task in range(max(self._rows, default=-1) + 1)])

    def compute(self) -> dict[str, float]:
        """Return the summary of the matrix by the names of :mod:`lightning_cl.metrics.functional`; NaN where undefined.

        ``forward_transfer`` is there with ``baseline=True``, ``intransigence`` with ``joint``, and the stability-gap
        family when old tasks were evaluated within tasks.

        Raises:
            ValueError: If no task has been evaluated yet.
        """
        matrix = self.matrix
        if not len(matrix):
            raise ValueError("`ContinualMetrics` has no score yet: no task has ended.")
        within = len(self._steps) > len(matrix)
        return summarise_matrix(
            matrix,
            self._columns(),
            baseline=_stack([self._baseline_scores])[0] if self._baseline_scores else None,
            joint=None if self.joint is None else torch.tensor(self.joint, dtype=torch.float64),
            curves=_stack(self._step_scores) if within else None,
            task_of_evaluation=torch.tensor(self._step_tasks, dtype=torch.int64),
            lower_is_better=self.mode == "min",
        )

    def _columns(self) -> list[list[int]]:
        return [self._trained.get(task, [task]) for task in range(max(self._rows, default=-1) + 1)]

    # ------------------------------------------------------------------ hooks

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        stream, last_epoch = trainer.datamodule, trainer.fit_loop.max_epochs or 0  # type: ignore[attr-defined]
        unevaluated = isinstance(stream, TaskStream) and not stream.evaluates_after(last_epoch - 1)
        if unevaluated or not trainer.enable_validation:
            raise ValueError(
                "`ContinualMetrics` needs validation data and a `validation_step`: pass `val=` to the task stream (or"
                " validation loaders to `fit`), and do not set `limit_val_batches=0`."
            )
        self._started = time.monotonic()
        if trainer.global_step == 0:
            self._steps_before = self._steps_so_far
        if self.baseline and not self._rows and trainer.global_step == 0:
            if getattr(stream, "evaluate", "all") != "all":
                raise ValueError(
                    "`ContinualMetrics(baseline=True)` evaluates all tasks before the first step: set"
                    " `TaskStreamDataModule(evaluate='all')`."
                )
            run_validation(trainer, stream.task_of_epoch(0) if isinstance(stream, TaskStream) else None)
            self._baseline_scores = self._read(trainer, self.monitor)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        events = TaskEvents.attach(trainer)
        if trainer.sanity_checking or trainer.state.fn != "fit" or events.task is None:
            return
        check_metrics_apart(trainer, pl_module, self.monitor)
        scores, task = self._read(trainer, self.monitor), events.task
        step = self._steps_before + trainer.global_step
        if self._steps and (self._steps[-1], self._step_tasks[-1]) == (step, task.index):
            # the same weights again: evaluated within the task just before its end, or made up for after a resume
            self._steps.pop(), self._step_tasks.pop(), self._step_scores.pop()
        self._steps.append(step)
        self._step_tasks.append(task.index)
        self._step_scores.append(scores)
        if events.running:
            return
        self._rows[task.index] = scores
        for name in self.further:
            self._further[name][task.index] = self._read(trainer, name)
        if isinstance(pl_module, GeneratesSamples):
            self._samples[task.index] = pl_module.generate_samples()
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(datamodule, TaskStream):
            self._trained[task.index] = datamodule.trained_by(task)
        for logger in trainer.loggers:
            # loggers take no NaN: what is undefined after one task is left out
            defined = {f"continual/{name}": value for name, value in self.compute().items() if value == value}
            logger.log_metrics(defined, step=trainer.global_step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps_so_far = self._steps_before + trainer.global_step

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seconds += self._running_seconds()
        self._started = 0.0
        # asked of the Trainer by all ranks, because they share it
        directory = self.directory or trainer.log_dir or trainer.default_root_dir
        if trainer.is_global_zero and self._rows and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            write_record(Path(directory), self.record(trainer))

    def record(self, trainer: Trainer) -> RunRecord:
        """Return all that a report needs of this run."""
        methods = [c for c in continual_callbacks(trainer) if c.boundaries != "evaluation"]
        return RunRecord(
            method=self.name or "+".join(type(c).__name__ for c in methods) or "finetune",
            seed=getattr(trainer.datamodule, "seed", None),  # type: ignore[attr-defined]
            monitor=self.monitor,
            task_names=self._task_names,
            matrix=_stack(self.matrix.tolist(), len(self._task_names)).tolist(),
            trained=[list(columns) for columns in self._columns()],
            within=WithinTask(self._steps, self._step_tasks, _stack(self._step_scores, len(self._task_names)).tolist()),
            summary=dict(self.compute()),
            config=_config(trainer),
            train_seconds=self._seconds,
            peak_memory_mib=_peak_memory(),
            versions={name: version(name) for name in ("torch", "lightning", "torchmetrics")},
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            better="higher" if self.mode == "max" else "lower",
            further={
                name: _stack([rows.get(row, []) for row in range(len(self.matrix))], len(self._task_names)).tolist()
                for name, rows in self._further.items()
            },
            samples=[self._samples.get(row, {}) for row in range(len(self.matrix))]
            if any(self._samples.values())
            else [],
            traces=[
                trace for c in continual_callbacks(trainer) if isinstance(c, RecordsTraces) for trace in c.traces()
            ],
        )

    def _read(self, trainer: Trainer, name: str) -> list[float]:
        """Return the value ``name`` of every task at the last evaluation, NaN for tasks without a loader."""
        datamodule, events = trainer.datamodule, TaskEvents.attach(trainer)  # type: ignore[attr-defined]
        logged = trainer.callback_metrics
        loaders = len(trainer.num_val_batches)
        if isinstance(datamodule, TaskStream):
            tasks = datamodule.evaluated_tasks()
        else:
            first = events.task.index if events.task is not None and loaders == 1 else 0
            tasks = [Task(index=first + i, name=f"fit {first + i + 1}") for i in range(loaders)]
        scores: dict[int, float] = {}
        for position, task in enumerate(tasks):
            key = name if loaders == 1 else f"{name}/dataloader_idx_{position}"
            if key not in logged:
                setting = f"monitor={name!r}" if name == self.monitor else f"further=[{name!r}]"
                raise ValueError(
                    f"`ContinualMetrics({setting})` found no such value for {task}: log it in"
                    f" `validation_step`. Logged were {sorted(logged)}."
                )
            scores[task.index] = float(logged[key])
            while len(self._task_names) <= task.index:
                self._task_names.append("")
            self._task_names[task.index] = task.name
        return [scores.get(index, float("nan")) for index in range(max(scores, default=-1) + 1)]

    def _running_seconds(self) -> float:
        return time.monotonic() - self._started if self._started else 0.0

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        # nothing of training samples is kept
        return []

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "task_names": list(self._task_names),
            "trained": {str(task): list(columns) for task, columns in self._trained.items()},
            "rows": {str(task): list(row) for task, row in self._rows.items()},
            "further": {name: {str(t): list(row) for t, row in rows.items()} for name, rows in self._further.items()},
            "samples": {str(task): dict(texts) for task, texts in self._samples.items()},
            "baseline": list(self._baseline_scores),
            "steps_before": [self._steps_before, self._steps_so_far],
            "steps": list(self._steps),
            "step_tasks": list(self._step_tasks),
            "step_scores": [list(scores) for scores in self._step_scores],
            "seconds": self._seconds + self._running_seconds(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._task_names = state_dict["task_names"]
        self._rows = {int(task): row for task, row in state_dict["rows"].items()}
        self._trained = {int(task): columns for task, columns in state_dict["trained"].items()}
        for name, rows in state_dict["further"].items():
            self._further[name] = {int(task): row for task, row in rows.items()}
        self._samples = {int(task): texts for task, texts in state_dict["samples"].items()}
        self._baseline_scores = state_dict["baseline"]
        self._steps_before, self._steps_so_far = state_dict["steps_before"]
        self._steps, self._step_tasks = state_dict["steps"], state_dict["step_tasks"]
        self._step_scores = state_dict["step_scores"]
        self._seconds = state_dict["seconds"]


def _stack(rows: list[list[float]], width: int = 0) -> Tensor:
    """Return rows of at least ``width`` scores, NaN where a row has none."""
    width = max([width, *(len(row) for row in rows)])
    return torch.tensor([[*row, *[float("nan")] * (width - len(row))] for row in rows], dtype=torch.float64)


def _config(trainer: Trainer) -> str:
    """Return the run's config as Lightning's command line saved it, empty in a script."""
    saver = next((c for c in trainer.callbacks if isinstance(c, SaveConfigCallback)), None)  # type: ignore[attr-defined]
    if saver is None:
        return ""
    text: str = saver.parser.dump(saver.config, skip_none=True)
    return text


def _peak_memory() -> float:
    """Return the most memory used so far in MiB: of the device where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
