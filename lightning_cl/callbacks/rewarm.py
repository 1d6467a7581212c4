"""Re-warming and re-decaying the learning rate with every task (Gupta et al. 2023, Ibrahim et al. 2024)."""

from __future__ import annotations

import math
from itertools import chain, repeat
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightning_cl.callbacks.restarted import RestartedScheduler
from lightning_cl.core.callback import ContinualCallback
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_automatic_optimization, check_choice
from lightning_cl.core.requests import Influence
from lightning_cl.core.schedules import Schedule, TaskScheduler, task_scheduler
from lightning_cl.core.stream import TaskStream
from lightning_cl.core.task import Task
from lightning_cl.core.update import OptimizerStep
from lightning_cl.functional.reset_state import reset_state

__all__ = ["Rewarm"]


class Rewarm(ContinualCallback):
    r"""Warm the learning rate up and let it decay again with every task.

    A schedule that has decayed by the end of a task leaves the next one a learning rate too low to learn with. Without
    ``shape``, the module's own schedulers begin anew with every task: the schedule written for one training is what
    every task gets. The first task trains as without ``Rewarm``. In a later one, step :math:`s` (from 0) of the first
    :math:`w` = ``warmup`` has

    .. math:: \eta = \eta_{\text{ended}} + (\eta_s - \eta_{\text{ended}}) \frac{s + 1}{w + 1}

    where :math:`\eta_s` is what the schedule says and :math:`\eta_{\text{ended}}` what the schedule had
    set for the step after the last of the task before.

    With ``shape``, the optimizer's own learning rate is the peak :math:`\eta` of a schedule over the steps of every
    task: among its :math:`n` steps, with the floor :math:`f` and the decay :math:`d(p) = (1 + \cos \pi p) / 2`,
    :math:`1 - p` or 1, step :math:`s` has

    .. math::
        \eta \left(a + (1 - a) \frac{s + 1}{w + 1}\right) \;\; (s < w), \qquad
        \eta \left(f + (1 - f) \, d\!\left(\frac{s - w}{n - 1 - w}\right)\right) \;\; (s \ge w)

    with :math:`a = 0` in the first task and :math:`a = f` in the others.

    See Gupta et al. 2023, arXiv:2308.04014, and Ibrahim et al. 2024, arXiv:2403.08763.

    Args:
        shape: ``"cosine"``, ``"linear"`` or ``"constant"``, for an optimizer without a schedule; ``None`` restarts the
            schedules that ``configure_optimizers`` returns.
        warmup: Optimizer steps of warm-up; with ``shape`` also a ``float`` below 1, their fraction of the task, and
            0.01 if ``None``, as in the papers. Without ``shape``, ``None`` is 0: a schedule may warm up by itself.
        floor: With ``shape``, the fraction of the peak at the end of a task, 0 to 1; 0.1 if ``None``, as in the papers.
        reset_at_task: Let every optimizer begin anew too, at every task's start but the first: momenta are forgotten.

    Raises:
        ValueError: For a setting out of range; at the start of a fit if the module and ``shape`` bring a schedule both
            or neither, for a schedule that knows tasks itself or cannot be restarted, and if ``shape`` has no number of
            steps to go by.

    Example:
        >>> Rewarm("linear", warmup=1).schedule
        Schedule(shape='linear', warmup=1, floor=0.1, rewarm=True)
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="rewarm",
        family="optimization",
        paper="Ibrahim et al. 2024, arXiv:2403.08763",
        needs="task boundaries",
        state="nothing",
    )

    def __init__(
        self,
        shape: Literal["cosine", "linear", "constant"] | None = None,
        *,
        warmup: int | float | None = None,
        floor: float | None = None,
        reset_at_task: bool = False,
    ) -> None:
        self.schedule: Schedule | None = None
        self.warmup: int | float
        if shape is not None:
            check_choice("shape", shape, ("cosine", "linear", "constant"))
            self.warmup = 0.01 if warmup is None else warmup
            self.schedule = Schedule(shape, self.warmup, 0.1 if floor is None else floor)
        else:
            self.warmup = 0 if warmup is None else warmup
            if not isinstance(self.warmup, int) or self.warmup < 0:
                raise ValueError(
                    f"`warmup` must be a number of steps without `shape`, where the length of a task is not used, got"
                    f" {warmup!r}."
                )
            if floor is not None:
                raise ValueError(f"`floor={floor}` belongs to a `shape`: give one, or leave the end to your schedule.")
        self.reset_at_task = reset_at_task
        self._ended: list[list[float]] = []
        # learning-rate schedules that are this callback's
        self._scheduled = 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # before Lightning restores optimizers and schedulers
        if getattr(trainer.datamodule, "optimizer_policy", None) == "rebuild":  # type: ignore[attr-defined]
            raise ValueError(
                "`optimizer_policy='rebuild'` makes optimizers and schedules anew with every task, without `Rewarm`."
                " Leave it at 'keep'; `Rewarm(reset_at_task=True)` lets the optimizers begin anew."
            )
        if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                "`StochasticWeightAveraging` puts a schedule of its own in the place of the one that `Rewarm` sets, for"
                " all tasks to come: leave one of them out."
            )
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, TaskScheduler):
                raise ValueError(
                    f"`{type(pl_module).__name__}` has a schedule that knows tasks itself: leave `Rewarm` out, and set"
                    " the module's `schedule`, `warmup`, `floor` and `rewarm`."
                )
        if self.schedule is None:
            self._wrap(trainer, pl_module)
        else:
            self._add(trainer, pl_module, self.schedule)
        self._scheduled = len(_own(trainer))

    def _wrap(self, trainer: Trainer, pl_module: LightningModule) -> None:
        configs = trainer.lr_scheduler_configs
        if not configs and (self.warmup or not self.reset_at_task):
            raise ValueError(
                f"`configure_optimizers` of `{type(pl_module).__name__}` returns no learning-rate schedule to restart:"
                " give `Rewarm` a `shape`, such as 'cosine'."
            )
        if self.warmup and len({config.scheduler.optimizer for config in configs}) < len(configs):
            raise ValueError(
                f"`warmup={self.warmup}` needs one schedule for each optimizer: join them by torch's"
                " `ChainedScheduler` or `SequentialLR`."
            )
        later = self.completed_tasks > 0
        for config, ended in zip(configs, chain(self._ended, repeat([])), strict=False):
            if not isinstance(config.scheduler, LRScheduler):
                raise ValueError(
                    f"`Rewarm` restarts the schedulers of torch, and `{type(config.scheduler).__name__}` is none: give"
                    " `shape` in its place."
                )
            every = 1
            if pl_module.automatic_optimization and config.interval == "epoch":
                # Lightning would count from the first epoch of all tasks
                every, config.frequency = config.frequency, 1
            config.scheduler = RestartedScheduler(
                config.scheduler, warmup=int(self.warmup), every=every, ended=ended if later else None
            )

    def _add(self, trainer: Trainer, pl_module: LightningModule, schedule: Schedule) -> None:
        way_out = "Return schedules from `configure_optimizers`, and `Rewarm()` restarts them."
        check_automatic_optimization(pl_module, self, f"shape={schedule.shape!r}", way_out)
        if trainer.lr_scheduler_configs:
            found = type(trainer.lr_scheduler_configs[0].scheduler).__name__
            raise ValueError(
                f"`Rewarm(shape={schedule.shape!r})` sets the learning rate, and so does the `{found}` that"
                f" `configure_optimizers` of `{type(pl_module).__name__}` returns: leave one of them out."
                " `Rewarm()` without `shape` restarts the module's."
            )
        counted = isinstance(trainer.datamodule, TaskStream)  # type: ignore[attr-defined]
        if not counted and trainer.estimated_stepping_batches == math.inf:
            raise ValueError(
                f"`Rewarm(shape={schedule.shape!r})` needs to know how many steps the fit has: set `max_epochs` or"
                " `max_steps` of the Trainer."
            )
        for optimizer in trainer.optimizers:
            scheduler = task_scheduler(optimizer, schedule, pl_module, completed_tasks=self.completed_tasks)
            trainer.lr_scheduler_configs.append(LRSchedulerConfig(scheduler, interval="step"))

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if self.reset_at_task and task.index > 0:
            for optimizer in trainer.optimizers:
                reset_state(optimizer)

    @override
    def observe_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        for scheduler in _restarted(trainer):
            if scheduler.optimizer is step.optimizer:
                scheduler.count_step()

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        # not where the next task starts: whoever logs its first learning rate may be called earlier
        if len(_own(trainer)) < self._scheduled:
            found = ", ".join(f"`{type(config.scheduler).__name__}`" for config in trainer.lr_scheduler_configs)
            raise ValueError(
                f"`trainer.lr_scheduler_configs` holds {found or 'nothing'} in the place of what `Rewarm` put there: a"
                " callback replaced it during the fit. Leave that callback out, or `Rewarm`."
            )
        schedulers = _restarted(trainer)
        self._ended = [[float(group["lr"]) for group in s.optimizer.param_groups] for s in schedulers]
        for scheduler in schedulers:
            scheduler.restart()

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        # nothing of samples is kept
        return []

    @override
    def state_dict(self) -> dict[str, Any]:
        # the rest is in the states of the schedulers
        return {"shape": None if self.schedule is None else self.schedule.shape}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (state_dict["shape"] is None) != (self.schedule is None):
            raise ValueError(
                f"The checkpoint was written with `Rewarm(shape={state_dict['shape']!r})`, whose schedule this run does"
                " not have: go on with that setting."
            )


def _own(trainer: Trainer) -> list[LRScheduler]:
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    return [scheduler for scheduler in schedulers if isinstance(scheduler, (RestartedScheduler, TaskScheduler))]


def _restarted(trainer: Trainer) -> list[RestartedScheduler]:
    return [scheduler for scheduler in _own(trainer) if isinstance(scheduler, RestartedScheduler)]
