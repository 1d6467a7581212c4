"""Learning rates that warm up and decay in every task anew."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightning_cl.core.checks import check_choice
from lightning_cl.core.stream import CountedStream, TaskStream
from lightning_cl.core.task import Task

__all__ = ["Schedule", "TaskScheduler", "set_rates", "steps_of_task", "task_scheduler"]


@dataclass(frozen=True)
class Schedule:
    r"""The learning rate of a step as a fraction of its peak, a pure function of the task and the step in it.

    With :math:`w` steps of warm-up among the :math:`n` of a task, step :math:`s` (from 0) has

    .. math::
        a + (1 - a) \frac{s + 1}{w + 1} \;\; (s < w), \qquad
        f + (1 - f) \, d\!\left(\frac{s - w}{n - 1 - w}\right) \;\; (s \ge w)

    with the decay :math:`d(p) = (1 + \cos \pi p) / 2`, :math:`1 - p` or 1, and the floor :math:`f`. The first task
    warms up from :math:`a = 0`, the others from the floor where the task before them ended: the re-warming and
    re-decaying of Gupta et al. 2023, arXiv:2308.04014, and Ibrahim et al. 2024, arXiv:2403.08763.

    Args:
        shape: The decay: ``"cosine"``, ``"linear"`` or ``"constant"`` (none).
        warmup: Steps of warm-up, or as a ``float`` below 1 their fraction of the task.
        floor: Fraction of the peak at the end, 0 to 1.
        rewarm: Start anew with every task; otherwise the whole stream has one warm-up and one decay.

    Example:
        >>> schedule = Schedule("linear", warmup=1, floor=0.1)
        >>> [round(schedule.factor(0, step, steps=4), 2) for step in range(4)]
        [0.5, 1.0, 0.55, 0.1]
        >>> [round(schedule.factor(1, step, steps=4), 2) for step in range(4)]
        [0.55, 1.0, 0.55, 0.1]
    """

    shape: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: int | float = 0.01
    floor: float = 0.1
    rewarm: bool = True

    def __post_init__(self) -> None:
        """Check the settings."""
        check_choice("schedule", self.shape, ("cosine", "linear", "constant"))
        if self.warmup < 0 or (isinstance(self.warmup, float) and self.warmup >= 1):
            raise ValueError(
                f"`warmup` must be a number of steps, or a fraction of them from 0.0 to below 1.0, got {self.warmup!r}."
            )
        if not 0 <= self.floor <= 1:
            raise ValueError(f"`floor` is a fraction of the learning rate from 0 to 1, got {self.floor!r}.")

    def factor(self, task: int, step: int, steps: int) -> float:
        """Return the fraction of the peak in ``step`` of the ``steps`` of a task."""
        wanted = math.ceil(self.warmup * steps) if isinstance(self.warmup, float) else self.warmup
        warmup = min(wanted, steps - 1)
        if step < warmup:
            start = self.floor if task > 0 else 0.0
            return start + (1 - start) * (step + 1) / (warmup + 1)
        if self.shape == "constant":
            return 1.0
        progress = (step - warmup) / max(steps - 1 - warmup, 1)
        decay = (1 + math.cos(math.pi * progress)) / 2 if self.shape == "cosine" else 1 - progress
        return self.floor + (1 - self.floor) * decay


class TaskScheduler(LRScheduler):
    """Applies a :class:`Schedule` to an optimizer, one step of it for every optimizer step.

    Its checkpoint holds the steps of every task, so that a run goes on in the same place of its task where the tasks
    have other numbers of steps, as on another number of ranks.

    Args:
        optimizer: Its groups' learning rates are the peaks.
        schedule: The schedule.
        steps: Optimizer steps of every task, at least 1 in the last.
        done: Optimizer steps of the stream made before: where the scheduler is made anew at a boundary, it goes on.
        left: Where every ``fit`` is a task: says, with the progress of a checkpoint restored, how many steps are left
            of this one. A checkpoint of a finished run is then followed by a further task.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedule,
        steps: Sequence[int],
        *,
        done: int = 0,
        left: Callable[[], int] | None = None,
    ) -> None:
        self.schedule = schedule
        self.steps = list(steps)
        self.left = left
        self._offset = done
        super().__init__(optimizer)

    @override
    def get_lr(self) -> list[float | Tensor]:
        task, step = _locate(self.steps, self._offset + self.last_epoch)
        factor = self.schedule.factor(task, step, self.steps[task])
        # a group that was added since is that of whoever added it
        added = [group["lr"] for group in self.optimizer.param_groups[len(self.base_lrs) :]]
        return [peak * factor for peak in self.base_lrs] + added

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"done": self._offset + self.last_epoch, "steps": list(self.steps), "peaks": list(self.base_lrs)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        done, saved = state_dict["done"], state_dict["steps"]
        if self.left is not None:
            remaining = self.left()
            if remaining <= 0:
                self.steps = saved
            elif done >= sum(saved):
                self.steps = [done, remaining]
            elif saved != self.steps:
                self.steps = [*saved[:-1], done - sum(saved[:-1]) + remaining]
        elif saved != self.steps and done < sum(saved):
            task, step = _locate(saved, done)
            done = sum(self.steps[:task]) + round(step * self.steps[task] / saved[task])
        self.base_lrs = list(state_dict["peaks"])
        self._offset = done - self.last_epoch
        self._last_lr = self.get_lr()
        set_rates(self.optimizer, self._last_lr)


def set_rates(optimizer: Optimizer, rates: Sequence[float | Tensor]) -> None:
    """Give every parameter group its learning rate; one that is a tensor stays that tensor, as captured steps need.

    Groups beyond them, added since the rates were read, keep theirs.
    """
    for group, rate in zip(optimizer.param_groups, rates, strict=False):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def task_scheduler(
    optimizer: Optimizer, schedule: Schedule, pl_module: LightningModule, *, completed_tasks: int = 0
) -> TaskScheduler:
    """Return the scheduler of a module's optimizer, for the tasks of its Trainer's stream.

    Without a stream, and where the stream hides its boundaries, the fit is one task.

    Args:
        optimizer: Its groups' learning rates are the peaks.
        schedule: The schedule.
        pl_module: The module, attached to its Trainer.
        completed_tasks: Without a stream: tasks learned in fits before, so that this one re-warms.

    Raises:
        ValueError: If the number of steps is unknown, because neither a stream nor the Trainer limits them.
    """
    trainer: Trainer = pl_module.trainer
    stream = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(stream, TaskStream) or not isinstance(stream, CountedStream):
        total = trainer.estimated_stepping_batches
        if total == math.inf:
            if schedule.shape == "constant" and isinstance(schedule.warmup, int):
                return TaskScheduler(optimizer, schedule, [schedule.warmup + 1])
            raise ValueError(
                "The learning-rate schedule needs to know how many steps the fit has: set `max_epochs` or `max_steps`"
                " of the Trainer, or `schedule='constant'` with `warmup` as a number of steps."
            )
        left = functools.partial(_steps_left, trainer)
        # a Trainer whose limit was raised has made steps before; those of a checkpoint come with it
        done = 0 if trainer.ckpt_path else trainer.global_step
        remaining = int(total) if trainer.ckpt_path else max(left(), 1)
        steps = [done, remaining] if done or completed_tasks else [remaining]
        return TaskScheduler(optimizer, schedule, steps, done=done, left=left)
    steps = [
        epochs * math.ceil(_limited(batches, trainer.limit_train_batches) / trainer.accumulate_grad_batches)
        for epochs, batches in stream.epochs_and_batches()
    ]
    done = sum(steps[: stream.task_of_epoch(trainer.current_epoch).index])
    apart = schedule.rewarm and not stream.hides_boundaries
    return TaskScheduler(optimizer, schedule, steps if apart else [sum(steps)], done=done)


def steps_of_task(trainer: Trainer, task: Task, user: object) -> int:
    """Return the optimizer steps of a task that starts.

    Args:
        trainer: The running Trainer; without a stream its fit is the task.
        task: The task.
        user: The callback, for errors.

    Raises:
        ValueError: If the number of steps is unknown, because neither a stream nor the Trainer limits them.
    """
    stream = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(stream, TaskStream) and isinstance(stream, CountedStream):
        epochs, batches = stream.epochs_and_batches()[task.index]
        return epochs * math.ceil(_limited(batches, trainer.limit_train_batches) / trainer.accumulate_grad_batches)
    if trainer.estimated_stepping_batches == math.inf:
        raise ValueError(
            f"`{type(user).__name__}` needs to know how many steps the task has: set `max_epochs` or `max_steps` of the"
            " Trainer, or give the data as a `TaskStreamDataModule`."
        )
    return max(_steps_left(trainer), 1)


def _steps_left(trainer: Trainer) -> int:
    """Return the steps that a fit without a stream has left; loaders of its earlier epochs may have been others."""
    done, accumulated = trainer.global_step, trainer.accumulate_grad_batches
    total = trainer.estimated_stepping_batches
    if trainer.max_epochs is None or trainer.max_epochs < 0 or trainer.num_training_batches == math.inf:
        return int(total) - done
    per_epoch = math.ceil(trainer.num_training_batches / accumulated)
    left = (trainer.max_epochs - trainer.current_epoch) * per_epoch
    if trainer.fit_loop.epoch_progress.current.ready > trainer.current_epoch:
        # in the middle of an epoch
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        seen: int = progress.current.processed
        if seen >= trainer.num_training_batches:
            left -= per_epoch
        else:
            # where the loader grew, Lightning holds the epoch for over, and its batches for those of the next one
            left -= seen // accumulated + (per_epoch if progress.is_last_batch else 0)
    return left if trainer.max_steps < 0 else min(left, trainer.max_steps - done)


def _limited(batches: int, limit: int | float | None) -> int:
    if limit is None:
        return batches
    return int(batches * limit) if isinstance(limit, float) else min(batches, limit)


def _locate(steps: Sequence[int], done: int) -> tuple[int, int]:
    """Return the task and the step in it that follow ``done`` steps; the last step after the end."""
    for task, count in enumerate(steps):
        if done < count:
            return task, done
        done -= count
    return len(steps) - 1, steps[-1] - 1
