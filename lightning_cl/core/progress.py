"""Where a fit stands, in Lightning's own counters."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import Trainer

__all__ = ["batches_trained", "evaluation_follows", "finished_epoch", "leave_finished_batches_behind"]


def batches_trained(trainer: Trainer) -> int:
    """Return the batches of the open epoch whose steps are made; 0 before the epoch starts.

    Counted by steps, not by batches read, because a signal may write a checkpoint between the two.
    """
    # before an epoch starts, Lightning still counts the batches of the one before
    return int(_batches(trainer).processed) if _inside_epoch(trainer) else 0


def finished_epoch(trainer: Trainer) -> int | None:
    """Return the epoch whose steps were all made when the run was saved, ``None`` if it was saved inside an epoch."""
    batches, current = _batches(trainer), trainer.current_epoch
    if not _inside_epoch(trainer):
        return current - 1 if current else None
    trained = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch and batches.ready == batches.processed
    return current if trained else None


def evaluation_follows(trainer: Trainer) -> bool:
    """Return whether Lightning's schedule evaluates between the last batch of a saved run and the next."""
    batches, fetcher = _batches(trainer), trainer.fit_loop._data_fetcher
    if fetcher is None or not _inside_epoch(trainer) or not batches.ready == batches.processed > 0:
        return False
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def leave_finished_batches_behind(trainer: Trainer) -> None:
    """Let a run that was saved at the start of an epoch, or at the end of the one before, begin it.

    Lightning takes the batches of the epoch before for those of this one, and leaves them out; in the second case if
    this one has more of them, as the first epoch of a longer task.
    """
    loop = trainer.fit_loop.epoch_loop
    if trainer.fit_loop.restarted_on_epoch_start:
        loop.restarting = False
    if loop.restarted_on_train_batch_end and loop.batch_progress.is_last_batch:
        # no fewer than any epoch has, by which Lightning knows that they are of a finished one
        loop.batch_progress.current.completed = sys.maxsize


def _batches(trainer: Trainer) -> Any:
    return trainer.fit_loop.epoch_loop.batch_progress.current


def _inside_epoch(trainer: Trainer) -> bool:
    epochs: Any = trainer.fit_loop.epoch_progress.current
    return bool(epochs.started > epochs.processed)
