"""What distillation methods share: a teacher, what it and the student return, and when both run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.callback import ContinualCallback
from lightning_cl.core.checks import check_automatic_optimization, check_positive
from lightning_cl.core.events import TaskEvents
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.requests import Influence
from lightning_cl.core.step import loss_of
from lightning_cl.core.task import Task
from lightning_cl.core.teacher import Teacher, TeacherKind
from lightning_cl.core.update import OptimizerStep

__all__ = ["Distillation"]


class Distillation(ContinualCallback):
    """Adds to the loss what the student lacks of its teacher.

    A subclass watches submodules from :meth:`on_train_start` on, and says in :meth:`distance` what their outputs cost.

    Args:
        strength: Factor of the term; above 0.
        teacher: Kind of the teacher.
        decay: Of ``teacher="ema"``.
        batch_adapter: Reads batches of an uncommon structure.

    Attributes:
        teaching: The teacher, which callbacks of one Trainer with the same kind of teacher share.
    """

    def __init__(
        self, strength: float, teacher: TeacherKind, decay: float | None, batch_adapter: BatchAdapter | None
    ) -> None:
        check_positive("strength", strength)
        self.teaching = Teacher(teacher, owner=type(self).__name__, decay=decay)
        self.strength = strength
        self.teacher = teacher
        self.decay = decay
        self.compares_weights = teacher in ("pretrained", "ema")
        self.adapter = batch_adapter or BatchAdapter()
        self._keeps = True
        self._checked = False

    def distance(self, batch: Any) -> Tensor | None:
        """Return the term of a step without its strength, a scalar; ``None`` where there is nothing to compare."""
        raise NotImplementedError

    def check(self, pl_module: LightningModule, batch: Any) -> None:
        """Refuse, before the first step, what the module does not return or the batch does not have."""
        raise NotImplementedError

    # ------------------------------------------------------------------ set-up

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            way_out = (
                "Return the loss from `training_step` and let Lightning step the optimizer, or use a penalty (`EWC`)."
            )
            check_automatic_optimization(pl_module, self, f"strength={self.strength}", way_out)
        # Lightning calls this in the order of the list, so those in front have settled who keeps what
        for other in takewhile(lambda callback: callback is not self, trainer.callbacks):  # type: ignore[attr-defined]
            if isinstance(other, Distillation) and other._teaches(self):
                self.teaching, self._keeps = other.teaching, False
                return
        self._keeps = True

    def _teaches(self, other: Distillation) -> bool:
        # who joins later has no teacher in its first task
        alike = self.completed_tasks == other.completed_tasks
        return self.teaching is other.teaching or (alike and self.teaching.replaces(other.teaching))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._checked = False
        if self._keeps:
            self.teaching.start_fit(pl_module, inside_task=TaskEvents.attach(trainer).running)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._checked:
            # what would fail in the second task fails before the first step
            self.check(pl_module, batch)
            self._checked = True

    @override
    def before_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        # not at the end of the task before: other callbacks may still change its weights there
        if self._keeps:
            self.teaching.start_task(pl_module, first=self.completed_tasks == 0)

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if self._keeps:
            self.teaching.warn_of_thawed(pl_module)

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        outcome = self.teaching.renew(pl_module) if self._keeps else None
        return [] if outcome is None else [Influence(type(self).__name__, "the weights of the teacher", outcome)]

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.teaching.end_fit()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning calls no teardown then
        self.teaching.end_fit()

    # ------------------------------------------------------------------ a step

    @contextmanager
    @override
    def around_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> Iterator[None]:
        with self.teaching.around_step(pl_module, batch, batch_idx):
            yield

    @override
    def loss_term(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, outputs: Any
    ) -> Tensor | None:
        # a step without a loss is one that Lightning skips
        term = self.distance(batch) if loss_of(outputs) is not None else None
        return None if term is None else self.strength * term

    @override
    def observe_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        if self._keeps:
            self.teaching.follow(pl_module, step.parameters)

    # ------------------------------------------------------------------ memory and checkpoints

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        return Footprint(device=self.teaching.num_bytes(pl_module) if self._keeps else 0)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self.teaching.state_dict() if self._keeps else None}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict["teacher"]
        if (saved is None) == self._keeps:
            raise ValueError(
                f"The checkpoint's `{type(self).__name__}` {'shared' if saved is None else 'kept'} its teacher, as the"
                " callbacks of that run were listed. Go on with the same callbacks in the same order."
            )
        if saved is not None:
            self.teaching.load_state_dict(saved)
