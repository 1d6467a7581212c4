"""Gradient spikes and loss spikes: counted, logged, and on demand acted on."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_cl.callbacks.gradient_spikes import GradientSpikes, add_by_layer, measure_gradient_spikes
from lightning_cl.callbacks.snapshots import Snapshot
from lightning_cl.callbacks.spike_aware import SpikeAware
from lightning_cl.callbacks.spike_traces import spike_traces
from lightning_cl.core.callback import ContinualCallback
from lightning_cl.core.checks import check_automatic_optimization, check_choice, check_count, check_positive
from lightning_cl.core.distributed import copy_of_rank_zero_, rank, sum_over_ranks_, world_size
from lightning_cl.core.events import TaskEvents
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.requests import Influence
from lightning_cl.core.shards import PerRank, of_all_ranks
from lightning_cl.core.stream import TaskStream
from lightning_cl.core.task import Task
from lightning_cl.core.update import OptimizerStep
from lightning_cl.functional.loss_spikes import loss_deviation
from lightning_cl.metrics.record import Trace
from lightning_cl.optim.states import has_second_moment

__all__ = ["SpikeMonitor"]

Action = Literal["log", "skip", "rollback"]


class _Unread(NamedTuple):
    """The loss of an optimizer step that waits to be read from the device."""

    step: int
    optimizer: int
    task: int
    drawn: bool
    loss: Tensor


class SpikeMonitor(ContinualCallback):
    r"""Watch a run for spikes: of gradients against their second moments, and of the training loss.

    A **gradient spike** is an element with :math:`g^2 > \theta v > 0`, where :math:`g` is the gradient of the loss
    before any callback changes it and :math:`v` the optimizer's second moment of the steps before, as in SPAM (Huang et
    al. 2025, arXiv:2501.06842), or one that is not finite. A **loss spike** is an optimizer step whose loss, the mean
    over micro-batches and ranks, is not finite or lies :math:`z` robust standard deviations above the median of the
    losses before it in its task (:func:`~lightning_cl.functional.loss_deviation`).

    With ``on_loss_spike="log"`` it changes nothing. ``"skip"`` leaves the optimizer's step out: neither weights nor the
    optimizer's state move, by weight decay neither. ``"rollback"`` moreover returns weights, buffers and the
    optimizer's state to the last snapshot: every ``snapshot_every`` steps those are kept with which the loss was no
    spike. The stream of samples, random numbers and learning rates go on in all cases. Every spike is reported and kept
    in ``events``.

    Args:
        threshold: :math:`\theta`; above 0. 5000 in the paper.
        delay: Gradients that a second moment must have seen for a spike against it to count; 20 in SPAM's code.
        every_n_steps: Optimizer steps between two measurements of the gradients, and between two lines in the loggers.
        deviations: :math:`z`; above 0.
        window: Losses of the task that a loss is compared with.
        grace: Losses at the start of a task that are not judged, unless they are not finite; at most ``window``.
        on_loss_spike: What to do: ``"log"``, ``"skip"`` or ``"rollback"``.
        max_actions: Steps of a task that may be skipped or rolled back; the next one is an error.
        snapshot_every: Optimizer steps between two snapshots, from each task's start.

    Attributes:
        events: Loss spikes as dicts: ``step``, counted as ``trainer.global_step`` is, ``task``, ``loss``,
            ``deviation``, ``action``, and ``length``: the steps that one went on for which nothing was done about. Of a
            rollback ``snapshot`` too: the step that it returned to the beginning of.
        counts: Gradient spikes so far in the steps that were measured, by layer: the module that holds the parameter.
        clipped: What :class:`~lightning_cl.SpikeAware` or :class:`~lightning_cl.optim.SPAM` clipped in these, by layer.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for an action under manual optimization.
        RuntimeError: For a loss spike after ``max_actions`` of a task.
    """

    # it measures; what it does about a loss spike learns of no boundary that a stream hides
    boundaries: ClassVar[Literal["required", "unused", "evaluation"]] = "evaluation"
    # a run may want to be watched from its first spike on
    needs_state: ClassVar[bool] = False

    def __init__(
        self,
        *,
        threshold: float = 5000.0,
        delay: int = 20,
        every_n_steps: int = 10,
        deviations: float = 7.0,
        window: int = 100,
        grace: int = 20,
        on_loss_spike: Action = "log",
        max_actions: int = 10,
        snapshot_every: int = 100,
    ) -> None:
        check_positive("threshold", threshold)
        check_positive("deviations", deviations)
        counts = {"delay": delay, "every_n_steps": every_n_steps, "window": window, "grace": grace}
        for name, value in (counts | {"max_actions": max_actions, "snapshot_every": snapshot_every}).items():
            check_count(name, value)
        if grace > window:
            raise ValueError(f"`grace={grace}` must be at most `window={window}`: no loss would ever be judged.")
        check_choice("on_loss_spike", on_loss_spike, ("log", "skip", "rollback"))
        self.threshold = threshold
        self.delay = delay
        self.every_n_steps = every_n_steps
        self.deviations = deviations
        self.window = window
        self.grace = grace
        self.on_loss_spike = on_loss_spike
        self.max_actions = max_actions
        self.snapshot_every = snapshot_every
        self.events: list[dict[str, Any]] = []
        self.counts: dict[str, int] = {}
        self.clipped: dict[str, int] = {}
        # steps of the fit before it was there
        self._first = 0
        # by the optimizer's place in `trainer.optimizers`: steps, and the losses to compare with
        self._steps: dict[int, int] = {}
        self._windows: dict[int, list[float]] = {}
        self._actions = 0
        # of the optimizer step to come, a loss for each micro-batch
        self._losses: list[Tensor] = []
        self._unread: list[_Unread] = []
        # what is drawn: step, largest ratio, number of spikes; step, loss, optimizer
        self._ratios: list[tuple[float, float, float]] = []
        self._curve: list[tuple[float, float, float]] = []
        self._snapshot = Snapshot(type(self).__name__)
        self._measured: GradientSpikes | None = None
        self._action: Action = "log"

    # ------------------------------------------------------------------ set-up

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.on_loss_spike != "log":
            setting = f"on_loss_spike={self.on_loss_spike!r}"
            way_out = "With `on_loss_spike='log'` it reports what it sees."
            check_automatic_optimization(pl_module, self, setting, way_out)
        for optimizer in trainer.optimizers:
            if has_second_moment(optimizer) is False:
                rank_zero_warn(
                    f"`SpikeMonitor` compares gradients with the running average of their squares, which"
                    f" `{type(optimizer).__name__}` does not keep: it reports spikes of the loss only."
                )
        if self.on_loss_spike == "rollback":
            self._snapshot.place(pl_module, trainer.optimizers[0])
        else:
            self._snapshot.clear()
        if not self._steps:
            self._first = trainer.global_step
        self._losses = []
        self._unread = [unread._replace(loss=unread.loss.to(pl_module.device)) for unread in self._unread]

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if self._ignores_boundaries(trainer):
            return
        self._judge(trainer)
        self._windows = {}
        self._actions = 0
        self._snapshot.clear()

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if not self._ignores_boundaries(trainer):
            self._judge(trainer)
            # the next fit may train other parameters
            self._snapshot.clear()

    @override
    def on_weights_rewritten(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # it holds trainable weights, and what was folded into frozen ones would count twice
        self._snapshot.clear()

    def _ignores_boundaries(self, trainer: Trainer) -> bool:
        stream = trainer.datamodule  # type: ignore[attr-defined]
        return self.on_loss_spike != "log" and isinstance(stream, TaskStream) and stream.hides_boundaries

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._judge(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for callback in _clippers(trainer):
            callback.count_clipped = False

    # ------------------------------------------------------------------ steps

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        loss = loss.detach().float()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            loss = loss / scaler.scale(torch.ones_like(loss))
        # Lightning has divided it by the number of micro-batches
        self._losses.append(loss * trainer.accumulate_grad_batches)

    @override
    def observe_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        now, number = self._next_step, trainer.optimizers.index(step.optimizer)
        measures = self._steps.get(number, 0) % self.every_n_steps == 0
        self._steps[number] = self._steps.get(number, 0) + 1
        if self._losses:
            task = TaskEvents.attach(trainer).task
            loss = torch.stack(self._losses).mean()
            self._unread.append(_Unread(now, number, 0 if task is None else task.index, measures, loss))
            self._losses = []
        self._action = "log"
        if measures or self.on_loss_spike != "log":
            self._judge(trainer, now)
        if measures or self._action != "log":
            actions = sum(event["action"] != "log" for event in self.events)
            self._log(trainer, {"loss": len(self.events), "actions": actions})
        self._measured = measure_gradient_spikes(step, self.threshold, self.delay) if measures else None
        for callback in _clippers(trainer):
            callback.count_clipped = measures
        if self.on_loss_spike == "rollback" and self._action == "log":
            taken = self._snapshot.step
            if taken is None or now - taken >= self.snapshot_every:
                # with these weights the loss is known to be normal
                self._snapshot.take(pl_module, step.optimizer, now)

    @override
    def hold_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        if self._action == "log":
            return
        for group in step.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @override
    def observe_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        if self._measured is None:
            return
        found, self._measured = self._measured, None
        now = self._next_step - 1
        if self._action != "log":
            found.clipped = {}
        for callback in _clippers(trainer):
            add_by_layer(found.clipped, callback.clipped.items())
        for totals, new in ((self.counts, found.counts), (self.clipped, found.clipped)):
            for layer, count in new.items():
                totals[layer] = totals.get(layer, 0) + count
        spikes = sum(found.counts.values())
        self._ratios.append((now, found.largest, spikes))
        values = {"largest_ratio": found.largest, "gradient": spikes, "clipped": sum(found.clipped.values())}
        self._log(trainer, values | {f"gradient/{layer}": count for layer, count in found.counts.items()})

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # after all that other callbacks do to the weights around a step
        if self._action == "rollback" and self._snapshot.step is not None:
            self._snapshot.restore(pl_module, trainer.optimizers[0])
        self._action = "log"

    @property
    def _next_step(self) -> int:
        """Number of the optimizer step to come, from 0."""
        return self._first + sum(self._steps.values())

    # ------------------------------------------------------------------ the loss

    def _judge(self, trainer: Trainer, now: int | None = None) -> None:
        """Compare the losses that wait with those before them; act on that of step ``now``. All ranks must call it."""
        if not self._unread:
            return
        waiting, self._unread = self._unread, []
        means = sum_over_ranks_(torch.stack([unread.loss for unread in waiting])) / world_size()
        for (step, number, task, drawn, _), loss in zip(waiting, copy_of_rank_zero_(means).tolist(), strict=True):
            window = self._windows.setdefault(number, [])
            judged = len(window) >= self.grace or not math.isfinite(loss)
            deviation = loss_deviation(loss, window) if judged else 0.0
            if math.isfinite(loss):
                # spikes as well: what stays high is soon the new normal
                window.append(loss)
                del window[: -self.window]
            begins = deviation > self.deviations
            if begins and self._goes_on(step):
                self.events[-1]["length"] += 1
                begins = False
            if begins or drawn:
                self._curve.append((step, loss, number))
            if begins:
                self._report({"step": step, "task": task, "loss": loss, "deviation": deviation}, acts=step == now)

    def _goes_on(self, step: int) -> bool:
        """Return whether the last loss spike, which nothing was done about, came up to a step."""
        if not self.events or self.on_loss_spike != "log":
            return False
        last = self.events[-1]
        return bool(last["action"] == "log" and last["step"] + last["length"] == step)

    def _report(self, found: dict[str, Any], *, acts: bool) -> None:
        event = found | {"action": "log", "length": 1}
        step, loss, deviation = found["step"], found["loss"], found["deviation"]
        text = f"`SpikeMonitor`: the loss of optimizer step {step} is {loss}"
        if math.isfinite(loss):
            text = f"`SpikeMonitor`: the loss of optimizer step {step} is {loss:.4g}, {deviation:.1f} robust standard"
            text += " deviations above those before it"
        if self.on_loss_spike == "log" or not acts:
            self.events.append(event)
            rank_zero_info(f"{text}.")
            return
        if self._actions == self.max_actions:
            raise RuntimeError(
                f"{text}, after {self._actions} such steps of this task that were left out (`max_actions`). Look at"
                " the data and the learning rate; a checkpoint from before the first of them may be gone on with."
            )
        self._actions += 1
        # before the first normal loss of a task there is nothing to return to
        self._action = self.on_loss_spike if self._snapshot.step is not None else "skip"
        event["action"] = self._action
        done = "the step is skipped"
        if self._action == "rollback":
            event["snapshot"] = self._snapshot.step
            done += f" and the fit returns to its snapshot of step {self._snapshot.step}"
        self.events.append(event)
        rank_zero_warn(f"{text}: {done} ({self._actions} of at most {self.max_actions} times in this task).")

    def _log(self, trainer: Trainer, values: dict[str, float]) -> None:
        # loggers take no NaN
        finite = {f"spikes/{name}": value for name, value in values.items() if math.isfinite(value)}
        for logger in trainer.loggers:
            logger.log_metrics(finite, step=trainer.global_step)

    # ------------------------------------------------------------------ what it saw

    def traces(self) -> list[Trace]:
        """Return what the report draws: the largest ratios, and the loss, each with its spikes."""
        return spike_traces(self._ratios, self._curve, self.events, self.threshold)

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        return Footprint(host=self._snapshot.num_bytes(pl_module) if self.on_loss_spike == "rollback" else 0)

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        if self._snapshot.step is None:
            return []
        # to return to it would bring back what was forgotten
        self._snapshot.clear()
        return [Influence(type(self).__name__, "a snapshot of weights and optimizer", "removed")]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "events": [dict(event) for event in self.events],
            "counts": dict(self.counts),
            "clipped": dict(self.clipped),
            "first": self._first,
            "steps": dict(self._steps),
            "windows": {number: list(window) for number, window in self._windows.items()},
            "actions": self._actions,
            "unread": PerRank([(*unread[:-1], float(unread.loss)) for unread in self._unread]),
            "ratios": torch.tensor(self._ratios, dtype=torch.float64),
            "curve": torch.tensor(self._curve, dtype=torch.float64),
            "snapshot": self._snapshot.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.events = [dict(event) for event in state_dict["events"]]
        self.counts, self.clipped = dict(state_dict["counts"]), dict(state_dict["clipped"])
        self._first, self._steps = state_dict["first"], dict(state_dict["steps"])
        self._actions = state_dict["actions"]
        self._windows = {number: list(window) for number, window in state_dict["windows"].items()}
        unread = of_all_ranks(state_dict["unread"])
        # a loss that waits is the mean of those of all ranks, of which there may be others now
        waiting = unread[rank() % len(unread)]
        self._unread = [
            _Unread(step, number, task, drawn, torch.tensor(loss)) for step, number, task, drawn, loss in waiting
        ]
        self._ratios = [tuple(row) for row in state_dict["ratios"].tolist()]
        self._curve = [tuple(row) for row in state_dict["curve"].tolist()]
        self._snapshot.load_state_dict(state_dict["snapshot"])


def _clippers(trainer: Trainer) -> list[SpikeAware]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, SpikeAware)]
