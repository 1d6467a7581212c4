"""A progress bar that says which task of how many is being learned."""

from __future__ import annotations

from itertools import count

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from typing_extensions import override

from lightning_cl.core.stream import TaskStream

__all__ = ["TaskProgressBar"]


class TaskProgressBar(TQDMProgressBar):
    """Lightning's progress bar with the task in front: ``Task 2/5 (classes 2-3), epoch 1/4``."""

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        stream, epoch = trainer.datamodule, trainer.current_epoch  # type: ignore[attr-defined]
        if isinstance(stream, TaskStream):
            task = stream.task_of_epoch(epoch)
            first = next(first for first in range(epoch, -1, -1) if first == 0 or stream.ends_task(first - 1))
            last = next(last for last in count(epoch) if stream.ends_task(last))
            where = f"Task {task.index + 1}/{task.num_tasks} ({task.name})"
            self.train_progress_bar.set_description(f"{where}, epoch {epoch - first + 1}/{last - first + 1}")
