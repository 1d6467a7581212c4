"""Acting around each batch of an evaluation, whichever step of the module serves it."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_cl.core.evaluation import reveal_task

__all__ = ["EvaluatedBatches"]


class EvaluatedBatches(Callback):
    """Hears of each batch of validation, testing and prediction by two hooks."""

    @abstractmethod
    def before_batch(
        self, trainer: Trainer, pl_module: LightningModule, step: str, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        """Called before the module's own step on a batch, which is on the device.

        Args:
            trainer: The running Trainer.
            pl_module: The user's module.
            step: ``"validation_step"``, ``"test_step"`` or ``"predict_step"``.
            batch: The batch.
            batch_idx: Its index.
            dataloader_idx: The index of its loader.
        """

    @abstractmethod
    def after_batch(self) -> None:
        """Called after the step; a step that fails ends in ``teardown``."""

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        # it is told behind the callbacks, and this one runs the module before
        reveal_task(trainer, pl_module, dataloader_idx)
        self.before_batch(trainer, pl_module, "validation_step", batch, batch_idx, dataloader_idx)

    @override
    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        reveal_task(trainer, pl_module, dataloader_idx)
        self.before_batch(trainer, pl_module, "test_step", batch, batch_idx, dataloader_idx)

    @override
    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.before_batch(trainer, pl_module, "predict_step", batch, batch_idx, dataloader_idx)

    @override
    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.after_batch()

    @override
    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.after_batch()

    @override
    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.after_batch()
