"""A progress bar that says which task of how many is being learned."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from typing_extensions import override

from lightning_cl.core.events import TaskStream

__all__ = ["TaskProgressBar"]


class TaskProgressBar(TQDMProgressBar):
    """Lightning's progress bar with the task in front: ``Task 2/5 (classes 2-3), epoch 4``."""

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(datamodule, TaskStream):
            task = datamodule.task_of_epoch(trainer.current_epoch)
            where = f"Task {task.index + 1}/{task.num_tasks} ({task.name})"
            self.train_progress_bar.set_description(f"{where}, epoch {trainer.current_epoch + 1}")
