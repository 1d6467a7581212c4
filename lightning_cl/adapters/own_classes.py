"""Class scores among the classes of one task in training, and of those chosen for each sample in evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.distributed import gather_rows
from lightning_cl.core.head import masks_other_tasks
from lightning_cl.core.outputs import OutputChange, find_scores
from lightning_cl.core.task import Task
from lightning_cl.core.task_data import task_batches
from lightning_cl.functional.asymmetric_cross_entropy import keep_classes
from lightning_cl.functional.routing import scores_of_tasks

__all__ = ["OwnClasses"]


class OwnClasses:
    """Knows the classes of each task, and leaves the others out of the class scores of a module.

    Args:
        user: The callback, for errors.
        adapter: Reads batches.

    Attributes:
        name: The submodule that returns the scores.
        answered: Whether it was called since :meth:`joining`.
    """

    def __init__(self, user: str, adapter: BatchAdapter) -> None:
        self._user = user
        self._adapter = adapter
        self.name: str | None = None
        self.answered = False
        self._classes: list[list[int]] = []

    def find(self, pl_module: LightningModule, logits: str | None, head: str | None, batch: Any) -> None:
        """Find the submodule that returns the scores.

        Args:
            pl_module: The user's module.
            logits: Its name, if the user gave it.
            head: The last linear layer of the base, if there is one.
            batch: A batch of the task.

        Raises:
            ValueError: If there is none whose scores the loss depends on, if there are no labels, or if the module
                masks classes itself.
        """
        if self._adapter.class_labels(batch) is None:
            raise ValueError(
                f"`{self._user}(mask_classes=True)` needs one class label for each sample, and found none in the batch."
                " Name them by `batch_adapter=BatchAdapter(labels=...)`, or use `mask_classes=False`."
            )
        if masks_other_tasks(pl_module, batch, 0):
            raise ValueError(
                f"`{type(pl_module).__name__}` masks the classes of all tasks but the present one, in evaluation too,"
                f" before `{self._user}` can choose among tasks. Leave its `head_mask` out: `mask_classes=True` does"
                " as much."
            )
        if logits is None and head is not None:
            # the head and not the module, whose `forward` a step may call past all hooks; with what PEFT puts around it
            logits = head.removesuffix(".base_layer").removesuffix(".original_module")
        self.name = find_scores(pl_module, logits, batch, self._adapter.size(batch), self._user)

    def begin_task(self, trainer: Trainer, pl_module: LightningModule, task: Task, index: int) -> None:
        """Take the classes of a task as the stream tells them, or else as the labels of all ranks show them."""
        self._classes[index:] = [list(task.classes) or self._seen(trainer, pl_module)]

    def _seen(self, trainer: Trainer, pl_module: LightningModule) -> list[int]:
        seen: set[int] = set()
        for batch, _ in task_batches(trainer, pl_module, self._adapter):
            labels = self._adapter.class_labels(batch)
            assert labels is not None
            seen.update(labels.tolist())
        mine = torch.tensor(sorted(seen), dtype=torch.int64, device=pl_module.device)
        return sorted({label for label in gather_rows(mine)[0].tolist() if label >= 0})

    @contextmanager
    def training(self, pl_module: LightningModule, index: int) -> Iterator[None]:
        """Leave all classes but those of a task out of the loss of the module's step."""
        kept = torch.tensor(self._classes[index], device=pl_module.device)

        def change(module: nn.Module, inputs: tuple[Any, ...], scores: Tensor) -> Tensor:
            return keep_classes(scores, kept)

        assert self.name is not None
        with OutputChange(pl_module, self.name, change) as masked, masked.active():
            yield

    def joining(self, pl_module: LightningModule, tasks: Tensor, others: list[Tensor]) -> OutputChange:
        """Return what gives each sample the classes of its tasks, once it is active.

        Args:
            pl_module: The user's module.
            tasks: The tasks of each sample, int64 [B, k].
            others: The scores for the tasks but the first, filled in until then.
        """
        assert self.name is not None
        self.answered = False
        return OutputChange(pl_module, self.name, partial(self._joined, tasks, others), seen=True)

    def _joined(
        self, tasks: Tensor, others: list[Tensor], module: nn.Module, inputs: tuple[Any, ...], scores: Tensor
    ) -> Tensor:
        self.answered = True
        classes = torch.zeros(len(self._classes), scores.shape[-1], dtype=torch.bool)
        for row, own in zip(classes, self._classes, strict=True):
            row[own] = True
        return scores_of_tasks([scores, *others], tasks, classes.to(scores.device))

    def state_dict(self) -> dict[str, Any]:
        """Return the name, and the classes of each task."""
        return {"name": self.name, "classes": [list(classes) for classes in self._classes]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` returned."""
        self.name, self._classes = state["name"], [list(classes) for classes in state["classes"]]
