"""Task events on top of Lightning's hooks.

:class:`TaskEvents` is the one hidden callback that calls the hooks of every
:class:`~lightning_cl.core.callback.ContinualCallback`: it is put behind the user's callbacks (and before the
checkpoints) by the first one that needs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_cl.core.callback import ContinualCallback, continual_callbacks
from lightning_cl.core.checks import check_launcher, check_replicas, check_version, refuse_checkpoint
from lightning_cl.core.configure import leave_configure_model
from lightning_cl.core.distributed import rank
from lightning_cl.core.evaluation import (
    accept_dataloader_idx,
    adjust_monitors,
    average_over_loaders,
    count_exactly,
    restore_steps,
    reveal_task,
    run_validation,
)
from lightning_cl.core.head import check_head
from lightning_cl.core.progress import evaluation_follows, finished_epoch, leave_finished_batches_behind
from lightning_cl.core.rng import derived_seed, isolated_rng, rng_state, set_rng_state
from lightning_cl.core.shards import PerRank, Uncopied, gathered, of_all_ranks
from lightning_cl.core.step import StepPipeline
from lightning_cl.core.stream import CountedStream, TaskStream, tasks_that_run
from lightning_cl.core.task import Task
from lightning_cl.core.task_layer import task_layers
from lightning_cl.core.update import UpdatePipeline

__all__ = ["TaskEvents"]

_CHECKPOINT_KEY, _VERSION = "lightning_cl", 2


class TaskEvents(Callback):
    """Derives task events from Lightning's hooks and keeps what a resume needs: the open task and every rank's RNG."""

    def __init__(self) -> None:
        self.task: Task | None = None
        self.running = False
        self._ended: Counter[str] = Counter()
        self._rng: dict[str, Any] | None = None
        self._restored = False
        self._trained = False
        self._stream: TaskStream | None = None
        self._task_before: Any = None
        # while a task starts: the task before it
        self._starting_after: tuple[Task | None] | None = None
        # while a task ends: the stateful callbacks that have heard of it
        self._heard_end: list[str] = []
        self._evaluated_at = -1
        self._updates: UpdatePipeline | None = None

    @staticmethod
    def attach(trainer: Trainer) -> TaskEvents:
        """Return the Trainer's events, adding them behind its callbacks on the first call."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if isinstance(callback, TaskEvents):
                return callback
        events = TaskEvents()
        last = next((i for i, callback in enumerate(callbacks) if isinstance(callback, Checkpoint)), len(callbacks))
        callbacks.insert(last, events)
        return events

    # ------------------------------------------------------------------ set-up

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_launcher(trainer)
        check_replicas(trainer)
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        self._stream = datamodule if isinstance(datamodule, TaskStream) else None
        self._restored = self._trained = False
        accept_dataloader_idx(pl_module)
        if stage != "fit":
            return
        if self._hidden:
            for callback in continual_callbacks(trainer):
                if callback.boundaries == "required":
                    raise ValueError(
                        f"`{type(callback).__name__}` needs to know where a task ends, but the stream's scenario hides"
                        " task boundaries. Use a method that needs none (such as `ExperienceReplay` with"
                        " `policy='reservoir'`), or a scenario that shows them."
                    )
        if self._stream is not None:
            adjust_monitors(trainer, self._stream.task_of_epoch(0).num_tasks or 1)
        StepPipeline.attach(trainer, pl_module, continual_callbacks(trainer))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        StepPipeline.detach(pl_module)
        leave_configure_model(pl_module)
        if self._updates is not None:
            self._updates.detach()
            self._updates = None
        restore_steps(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning calls no teardown then, and the module may be fitted again, by a Trainer without callbacks of ours
        self.teardown(trainer, pl_module, "fit")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained = True
        self._updates = UpdatePipeline(trainer, pl_module, continual_callbacks(trainer))
        if trainer.ckpt_path and not self._restored:
            refuse_checkpoint(trainer, [c for c in continual_callbacks(trainer) if c.needs_state])
        if not self._restored:
            for callback in continual_callbacks(trainer):
                self._ended |= Counter(callback.ended_tasks)
        if self._rng is not None:
            set_rng_state(self._rng)
            if self._stream is None:
                # a plain loader drew its seed before the generators were restored: let it draw again
                iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
            self._rng = None
        stream, epoch = self._stream, trainer.current_epoch
        # hooks of callbacks come before that of this one, which opens the task
        self._rest(trainer, self._plain_task(trainer) if stream is None else stream.task_of_epoch(epoch))
        if self._restored and stream is not None:
            self._make_up(trainer, pl_module, stream)
        check_head(trainer, pl_module)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._updates is not None:
            self._updates.before(optimizer)

    # ------------------------------------------------------------------ events

    @override
    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._stream is not None:
            # the loaders of the check must not serve as those of the first epoch
            trainer.fit_loop.epoch_loop.val_loop._last_val_dl_reload_epoch = float("-inf")

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open_task(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._updates is not None:
            self._updates.begin_batch()
        # Lightning leaves `on_train_epoch_start` out when it resumes inside an epoch or at its last batch
        if not self.running or batch_idx == 0:
            self._open_task(trainer, pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_last_batch:
            if self._stream is None and trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps:
                self._close_task(trainer, pl_module)
            return
        if self._stream is not None:
            ended = self._stream.ends_task(trainer.current_epoch)
        else:
            ended = trainer.current_epoch + 1 == trainer.max_epochs or (
                trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
            )
        if ended:
            self._close_task(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # what skips the rest of an epoch, in a module or in a callback of a request, skips its last batch too
        ended = trainer.is_last_batch or any(c.skips_steps and not c.resting for c in continual_callbacks(trainer))
        if ended and self.running and self._stream is not None and self._stream.ends_task(trainer.current_epoch):
            self._close_task(trainer, pl_module)
        if self._stream is not None and ended:
            # `val_check_interval` may leave the end of an epoch out
            self._evaluate(trainer, self._stream, trainer.current_epoch)
            self._rest(trainer, self._stream.task_of_epoch(trainer.current_epoch + 1))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # early stopping: without a stream, the end of the fit is the end of its task
        if self._stream is None and self.running:
            self._close_task(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._trained and (self._stream is None or not trainer.ckpt_path):
            rank_zero_warn(
                f"`Trainer.fit` trained nothing: `max_epochs={trainer.max_epochs}` was reached before. To learn another"
                " task, fit with a fresh Trainer, or with a higher `max_epochs` when a checkpoint is given."
            )

    def _open_task(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._stream is None:
            task = self.task if self.running and self.task is not None else self._plain_task(trainer)
        else:
            task = self._stream.task_of_epoch(trainer.current_epoch)
        resumed = self.running and self.task is not None and self.task.index == task.index
        if not resumed:
            self._starting_after = (self.task,)
        self.task, self.running = task, True
        self._rest(trainer, task)
        pl_module.current_task = None if self._hidden else task  # type: ignore[assignment]
        if not resumed:
            self._tell("before_task_start", trainer, pl_module, task)
            self._tell("on_task_start", trainer, pl_module, task)
            self._starting_after = None

    @staticmethod
    def _rest(trainer: Trainer, task: Task) -> None:
        for callback in continual_callbacks(trainer):
            callback.resting = task.kind not in callback.acts_on

    def _close_task(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.task is not None
        self._tell("on_task_end", trainer, pl_module, self.task)
        self.running, self._heard_end = False, []
        if self.task.kind == "forget":
            # an edit of the weights without a step
            self._evaluated_at = -1
        self._count_ended(trainer, self._ended + Counter([self.task.kind]))

    def _count_ended(self, trainer: Trainer, ended: Mapping[str, int]) -> None:
        self._ended = Counter(ended)
        for callback in continual_callbacks(trainer):
            callback.ended_tasks = dict(ended)

    def _make_up(self, trainer: Trainer, pl_module: LightningModule, stream: TaskStream) -> None:
        """Do what the saved run had still to do for the epoch that its checkpoint was written in."""
        leave_finished_batches_behind(trainer)
        finished = finished_epoch(trainer)
        ended = finished is not None and stream.ends_task(finished)
        if self.running and not ended:
            # only the task's index was in the checkpoint
            self._open_task(trainer, pl_module)
        if finished is not None:
            self.task = stream.task_of_epoch(finished)
            self._rest(trainer, self.task)
            pl_module.current_task = None if self._hidden else self.task  # type: ignore[assignment]
            if self.running and ended:
                self._close_task(trainer, pl_module)
            self._evaluate(trainer, stream, finished)
            self._rest(trainer, stream.task_of_epoch(finished + 1))
        elif evaluation_follows(trainer):
            self._evaluate(trainer, stream, trainer.current_epoch)

    def _evaluate(self, trainer: Trainer, stream: TaskStream, epoch: int) -> None:
        """Run the evaluation that belongs to ``epoch`` if Lightning has not."""
        if stream.evaluates_after(epoch) and self._evaluated_at != trainer.global_step and trainer.enable_validation:
            run_validation(trainer, self.task)

    @property
    def completed_tasks(self) -> int:
        """Tasks and requests that ended so far, over all fits."""
        return sum(self._ended.values())

    @property
    def _hidden(self) -> bool:
        return self._stream is not None and self._stream.hides_boundaries

    def _plain_task(self, trainer: Trainer) -> Task:
        index = self.completed_tasks
        forgets = any(callback.acts_on == ("forget",) for callback in continual_callbacks(trainer))
        return Task(index=index, name=f"fit {index + 1}", kind="forget" if forgets else "learn")

    def _tell(self, hook: str, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        hidden = self._hidden
        if hook == "on_task_start" and not hidden and task.kind == "learn":
            # before the callbacks, some of which run the module on the data of the task
            for layer in task_layers(pl_module):
                layer.start_task(trainer, task)
        for callback in continual_callbacks(trainer):
            # a request is no boundary between tasks to learn
            told = callback.boundaries == "evaluation" or not hidden or task.kind == "forget"
            if told and not callback.resting and callback.state_key not in self._heard_end:
                getattr(callback, hook)(trainer, pl_module, task)
                if hook == "on_task_end" and type(callback).state_dict is not Callback.state_dict:
                    self._heard_end.append(callback.state_key)
        if not hidden and hook != "before_task_start":
            for owner in (pl_module, trainer.datamodule):  # type: ignore[attr-defined]
                if callable(method := getattr(owner, hook, None)):
                    method(task)

    def tasks_to_end(self, callback: ContinualCallback, *, requests: bool = False) -> int | None:
        """Return how many tasks of the kinds that a callback acts in have not ended for it, or of requests as well.

        ``None`` where that cannot be known.
        """
        if not isinstance(self._stream, CountedStream):
            return None
        coming = tasks_that_run(self._stream, {*callback.acts_on, *(("forget",) if requests else ())})
        if self.task is None:
            return sum(coming)
        # a checkpoint may be written while callbacks hear of an end
        ended = not self.running or callback.state_key in self._heard_end
        return sum(coming[self.task.index + ended :])

    # ------------------------------------------------------------------ the task of an evaluation batch

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._task_before = getattr(pl_module, "current_task", None)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._task_before = getattr(pl_module, "current_task", None)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        reveal_task(trainer, pl_module, dataloader_idx)

    @override
    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        reveal_task(trainer, pl_module, dataloader_idx)

    @override
    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._stream is not None:
            count_exactly(trainer)

    @override
    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._stream is not None:
            count_exactly(trainer)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._stream is not None:
            average_over_loaders(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.current_task = self._task_before
        if not trainer.sanity_checking:
            self._evaluated_at = trainer.global_step

    @override
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.current_task = self._task_before

    # ------------------------------------------------------------------ checkpoints

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # a task whose start is not told to the end has not started
        task, running = (*self._starting_after, False) if self._starting_after else (self.task, self.running)
        checkpoint[_CHECKPOINT_KEY] = {
            "version": _VERSION,
            "task": None if task is None else task.index,
            "kind": "learn" if task is None else task.kind,
            "running": running,
            "heard_end": list(self._heard_end),
            "evaluated_at": self._evaluated_at,
            "ended_tasks": dict(self._ended),
            "rng": PerRank(rng_state()),
        }
        if not getattr(trainer.strategy, "saves_shards", False):
            for key in ("callbacks", _CHECKPOINT_KEY):
                checkpoint[key] = gathered(checkpoint[key])

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved, callbacks = checkpoint.get("callbacks", {}), continual_callbacks(trainer)
        missing = [c for c in callbacks if c.needs_state and c.state_key not in saved]
        if missing or (_CHECKPOINT_KEY not in checkpoint and trainer.state.fn == "fit"):
            refuse_checkpoint(trainer, missing)
        self._restored = True
        if trainer.state.fn != "fit":
            return
        saved.update({c.state_key: Uncopied(saved[c.state_key]) for c in callbacks if c.state_key in saved})
        state = checkpoint[_CHECKPOINT_KEY]
        check_version(trainer, state["version"], _VERSION)
        self.running = state["running"]
        self._heard_end, self._evaluated_at = state["heard_end"], state["evaluated_at"]
        self._count_ended(trainer, state["ended_tasks"])
        if state["task"] is not None:
            self.task = Task(index=state["task"], name=f"fit {state['task'] + 1}", kind=state["kind"])
        ranks = of_all_ranks(state["rng"])
        self._rng = ranks[rank() % len(ranks)]
        if rank() >= len(ranks):
            # a rank that the saved run did not have gets generators of its own, the same ones at every resume
            with isolated_rng(derived_seed("rank", rank(), int(ranks[0]["torch"].sum()))):
                self._rng = rng_state()
