"""Layers that change with the tasks."""

from __future__ import annotations

from abc import abstractmethod

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_cl.core.task import Task

__all__ = ["TaskLayer", "task_layers"]


class TaskLayer(nn.Module):
    """A layer that hears of tasks, in any depth of any LightningModule, as a head with rows for each task does."""

    @abstractmethod
    def start_task(self, trainer: Trainer, task: Task) -> None:
        """Called before the first batch of a task, before ``on_task_start`` of callbacks and of the module.

        Not called again when a run resumes inside the task, nor on a stream that hides its boundaries.
        """


def task_layers(pl_module: LightningModule) -> list[TaskLayer]:
    """Return the layers of a module that hear of tasks."""
    return [layer for layer in pl_module.modules() if isinstance(layer, TaskLayer)]
