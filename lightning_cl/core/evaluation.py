"""Evaluating a stream: steps that know no loader index, and evaluation at any moment of a fit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_cl.core.rng import isolated_rng
from lightning_cl.core.stream import TaskStream
from lightning_cl.core.task import Task

__all__ = [
    "accept_dataloader_idx",
    "adjust_monitors",
    "average_over_loaders",
    "check_metrics_apart",
    "count_exactly",
    "restore_steps",
    "reveal_task",
    "run_validation",
]

_MARK = "_lightning_cl_evaluation"


def reveal_task(trainer: Trainer, pl_module: LightningModule, dataloader_idx: int) -> None:
    """Tell the module the task of an evaluation batch, on a stream that shows it."""
    stream = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(stream, TaskStream) and stream.reveals_task:
        pl_module.current_task = stream.evaluated_tasks()[dataloader_idx]  # type: ignore[assignment]


def accept_dataloader_idx(pl_module: LightningModule) -> None:
    """Let ``validation_step`` and ``test_step`` of a module for one loader serve one loader per task.

    Lightning passes ``dataloader_idx`` as soon as there are several loaders; a step without it is wrapped.
    """
    for name in ("validation_step", "test_step"):
        step = getattr(pl_module, name)
        if is_overridden(name, pl_module) and not is_param_in_hook_signature(step, "dataloader_idx"):
            setattr(pl_module, name, _without_loader(pl_module, step))


def restore_steps(pl_module: LightningModule) -> None:
    """Give the module its own evaluation steps back."""
    for name in ("validation_step", "test_step"):
        original = getattr(pl_module.__dict__.get(name), _MARK, None)
        if original is not None:
            del pl_module.__dict__[name]
            if getattr(pl_module, name) != original:
                # the module carried an instance attribute of its own, as a compiled module does
                setattr(pl_module, name, original)


def _without_loader(pl_module: LightningModule, step: Callable[..., Any]) -> Callable[..., Any]:
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)

    # `self` stands for what Lightning skips when it reads the parameter names
    def read_by_lightning(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any: ...

    @functools.wraps(read_by_lightning)
    def evaluation_step(batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        if batch_idx == 0 and dataloader_idx > 0:
            # the module logs one metric object for all loaders, which would go on with the counts of the loader before
            for result in pl_module.trainer._results.values():  # type: ignore[union-attr]
                if not result.is_tensor:
                    result.value.reset()
        return step(batch, batch_idx) if takes_index else step(batch)

    setattr(evaluation_step, _MARK, step)
    return evaluation_step


def run_validation(trainer: Trainer, task: Task | None) -> None:
    """Run the validation loop now, inside training, without moving the random generators.

    Lightning's own schedule knows only fixed intervals that are blind to tasks.

    Args:
        trainer: The running Trainer.
        task: A task stream gives the loaders of the end of this task.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    connector = trainer._logger_connector
    first_iteration, has_run = connector._first_loop_iter, loop._has_run
    loop._last_val_dl_reload_epoch = float("-inf")
    # after a resume, this evaluation must not go on where the one before the checkpoint stopped
    loop.restarting = False
    stream = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(stream, TaskStream):
        stream.request_evaluation(task)
    trainer.validating = True
    try:
        with isolated_rng():
            loop.run()
    finally:
        trainer.training = True
        # Lightning would take this evaluation for its own and, after a resume, for the end of the epoch
        connector._first_loop_iter, loop._has_run = first_iteration, has_run
        # the loaders of this moment must not serve as those of the epoch's end
        loop._last_val_dl_reload_epoch = float("-inf")
        if isinstance(stream, TaskStream):
            stream.request_evaluation(None)


def count_exactly(trainer: Trainer) -> None:
    """Keep the mean over ranks exact where they hold unlike numbers of samples.

    Lightning averages the counts of samples over ranks as integers: 3, 3 and 2 correct of as many would be 4/3.
    """
    if trainer.world_size > 1:
        for result in trainer._results.values():  # type: ignore[union-attr]
            if result.is_tensor and result.meta.is_mean_reduction:
                result.cumulated_batch_size = result.cumulated_batch_size.float()


def average_over_loaders(trainer: Trainer) -> None:
    """Give the mean over the loaders under the plain name, so that ``monitor="val_acc"`` finds it after every task.

    Lightning names a value of several loaders ``val_acc/dataloader_idx_0`` and so on.
    """
    logged, separator = trainer.callback_metrics, "/dataloader_idx_"
    loaders = len(trainer.num_val_batches)
    for name in {key.partition(separator)[0] for key in logged if separator in key} if loaders > 1 else ():
        keys = [f"{name}{separator}{loader}" for loader in range(loaders)]
        logged[name] = torch.stack([logged[key].float().mean() for key in keys if key in logged]).mean()


def check_metrics_apart(trainer: Trainer, pl_module: LightningModule, name: str) -> None:
    """Refuse a module that knows its loaders and yet counts them all by one metric object.

    Raises:
        ValueError: If so: the score of a loader would be that of all loaders up to it.
    """
    results = [result for result in trainer._results.values() if not result.has_reset]  # type: ignore[union-attr]
    objects = [id(result.value) for result in results if result.meta.name == name and not result.is_tensor]
    if len(set(objects)) < len(objects) and not hasattr(pl_module.__dict__.get("validation_step"), _MARK):
        raise ValueError(
            f"`{type(pl_module).__name__}.validation_step` logs {name!r} by one torchmetrics object for all loaders,"
            " which adds up what belongs to different tasks. Keep one object for each `dataloader_idx`, or leave that"
            " argument out of `validation_step`: the object is then reset for each loader."
        )


def adjust_monitors(trainer: Trainer, num_tasks: int) -> None:
    """Let checkpoints with a monitor save after evaluations, and refuse what would end the stream after a task."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EarlyStopping) and num_tasks > 1:
            raise ValueError(
                f"`{type(callback).__name__}` would end the whole stream, not the task at hand. Leave it out and set"
                " `epochs_per_task` or `steps_per_task`, or run one `fit` per task with plain loaders."
            )
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback._save_on_train_epoch_end is None:
            # most epochs of a stream end without an evaluation, so with the score of an earlier one or with none
            callback._save_on_train_epoch_end = False
