"""Evaluating a stream: steps that know no loader index, and evaluation at any moment of a fit."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_cl.core.rng import isolated_rng

__all__ = ["accept_dataloader_idx", "restore_steps", "run_validation"]

_MARK = "_lightning_cl_evaluation"


def accept_dataloader_idx(pl_module: LightningModule) -> None:
    """Let ``validation_step`` and ``test_step`` of a module for one loader serve one loader per task.

    Lightning passes ``dataloader_idx`` as soon as there are several loaders; a step without it is wrapped.
    """
    for name in ("validation_step", "test_step"):
        step = getattr(pl_module, name)
        if is_overridden(name, pl_module) and not is_param_in_hook_signature(step, "dataloader_idx"):
            setattr(pl_module, name, _without_loader(step))


def restore_steps(pl_module: LightningModule) -> None:
    """Give the module its own evaluation steps back."""
    for name in ("validation_step", "test_step"):
        if hasattr(pl_module.__dict__.get(name), _MARK):
            del pl_module.__dict__[name]


def _without_loader(step: Callable[..., Any]) -> Callable[..., Any]:
    takes_index = is_param_in_hook_signature(step, "batch_idx", min_args=2)

    # `self` stands for what Lightning skips when it reads the parameter names
    def read_by_lightning(self: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any: ...

    @functools.wraps(read_by_lightning)
    def evaluation_step(batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        return step(batch, batch_idx) if takes_index else step(batch)

    setattr(evaluation_step, _MARK, True)
    return evaluation_step


def run_validation(trainer: Trainer) -> None:
    """Run the validation loop now, inside training, without moving the random generators.

    Lightning's own schedule knows only fixed intervals that are blind to tasks.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    connector = trainer._logger_connector
    first_iteration = connector._first_loop_iter
    loop._last_val_dl_reload_epoch = float("-inf")
    trainer.validating = True
    try:
        with isolated_rng():
            loop.run()
    finally:
        trainer.training = True
        connector._first_loop_iter = first_iteration
        # the loaders of this moment must not serve as those of the epoch's end
        loop._last_val_dl_reload_epoch = float("-inf")
