"""Refusal of memories and teachers that would train what is the present task's alone."""

from __future__ import annotations

from lightning.pytorch import Trainer

from lightning_cl.callbacks.distillation import Distillation
from lightning_cl.callbacks.memory import ReplayMemory

__all__ = ["refuse_joint_replay", "refuse_teachers"]


def refuse_joint_replay(trainer: Trainer, owner: str, has: str, instead: str) -> None:
    """Refuse memories that take the module's own loss on samples of several tasks at once.

    Args:
        trainer: The running Trainer.
        owner: The callback, for the error.
        has: What it has for each task.
        instead: The callback to use beside a memory.

    Raises:
        ValueError: If the Trainer has such a memory.
    """
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(other, ReplayMemory) and other.mixes_tasks:
            raise ValueError(
                f"`{type(other).__name__}` trains on samples of earlier tasks, and `{owner}` has {has} for each task,"
                f" which forgets nothing: leave the memory out, or use `{instead}`."
            )


def refuse_teachers(trainer: Trainer, owner: str) -> None:
    """Refuse teachers of the task before, in which no adapter of that task acts.

    Raises:
        ValueError: If the Trainer has one.
    """
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(other, Distillation) and other.teacher == "previous":
            raise ValueError(
                f"`{type(other).__name__}(teacher='previous')` teaches with the weights that the task before ended"
                f" with, and while `{owner}` trains, no adapter of a finished task acts: it would teach what the bare"
                " base says. Leave it out, because an adapter for each task forgets nothing, take `teacher='base'` if"
                " the base is meant, or use `AdapterSlots`."
            )
