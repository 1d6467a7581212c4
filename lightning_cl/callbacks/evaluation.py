"""Evaluation within a task: what happens between two boundaries."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_cl.core.callback import ContinualCallback
from lightning_cl.core.checks import check_positive
from lightning_cl.core.evaluation import run_validation
from lightning_cl.core.events import TaskEvents
from lightning_cl.core.stream import TaskStream

__all__ = ["ContinualEvaluation"]


class ContinualEvaluation(ContinualCallback):
    """Run the validation loop every ``every_n_steps`` optimizer steps, over the tasks that a task's end would evaluate.

    It shows the *stability gap*: old tasks drop right after a boundary and recover before the next, which evaluation at
    task ends cannot see (De Lange et al. 2023, arXiv:2205.13452, with an evaluation after every step). Put
    :class:`~lightning_cl.callbacks.ContinualMetrics` beside it to have the curves kept and summarised. The random
    generators are left as they were, so the weights are those of the run without it.

    Args:
        every_n_steps: Optimizer steps between two evaluations; at least 1. Costs one pass over the validation data
            each.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.
    """

    acts_on: ClassVar[tuple[Literal["learn", "forget"], ...]] = ("learn", "forget")
    boundaries: ClassVar[Literal["required", "unused", "evaluation"]] = "evaluation"
    needs_state: ClassVar[bool] = False

    def __init__(self, every_n_steps: int) -> None:
        check_positive("every_n_steps", every_n_steps)
        self.every_n_steps = every_n_steps
        self._last_step = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # evaluated before the checkpoint that this run resumes from
        self._last_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # the same step comes several times under accumulation
        due = step % self.every_n_steps == 0 and step != self._last_step
        self._last_step = step
        if due and not (trainer.is_last_batch and self._evaluated_anyway(trainer)):
            run_validation(trainer, TaskEvents.attach(trainer).task)

    @staticmethod
    def _evaluated_anyway(trainer: Trainer) -> bool:
        """Return whether an evaluation follows at the end of this epoch, after what a task's end does."""
        stream = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(stream, TaskStream):
            return stream.evaluates_after(trainer.current_epoch)
        return trainer.fit_loop.epoch_loop._should_check_val_epoch()
