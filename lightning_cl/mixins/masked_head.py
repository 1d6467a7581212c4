"""A head that answers only with the classes that may be right."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_cl.core.task import Task
from lightning_cl.functional.masked_scores import mask_scores

__all__ = ["MaskedHead"]


class MaskedHead:
    """Mixin for a LightningModule: restrict logits to the classes of the task at hand, or to those seen so far.

    The task is ``self.current_task``, which the task events set: in training the task being learned; in evaluation,
    under :class:`~lightning_cl.datamodules.TaskIncremental`, the task of the loader, otherwise the latest one.

    Attributes:
        head_mask: ``"task"`` for the task's own classes (task-incremental), ``"seen"`` for all classes so far
            (class-incremental). With replayed samples of other tasks in a batch, use ``"seen"``.

    Example:
        >>> class Head(MaskedHead):
        ...     current_task = Task(index=1, name="b", classes=(2, 3), seen_classes=(0, 1, 2, 3))
        >>> Head().mask_logits(torch.zeros(1, 4)).softmax(-1)
        tensor([[0.0000, 0.0000, 0.5000, 0.5000]])
    """

    head_mask: Literal["task", "seen"] = "task"
    current_task: Task | None = None

    def mask_logits(self, logits: Tensor) -> Tensor:
        """Return ``logits`` [..., C] with a very negative value at classes that are masked, but none that is infinite.

        Raises:
            ValueError: If the task has a class outside the head, or ``head_mask`` is unknown.
        """
        if self.head_mask not in ("task", "seen"):
            raise ValueError(f"`head_mask` must be 'task' or 'seen', got {self.head_mask!r}.")
        task = self.current_task
        if task is None or not task.classes:
            return logits
        classes = task.classes if self.head_mask == "task" else task.seen_classes
        if max(classes) >= logits.shape[-1]:
            raise ValueError(f"{task} has class {max(classes)}, but the head has {logits.shape[-1]} outputs.")
        allowed = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        allowed[list(classes)] = True
        return mask_scores(logits, allowed)
