"""What ``adapters.py`` trains and measures in every run: a classifier of intents, and what a method keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_cl.adapters.slot import PAST, SlotFactor
from lightning_cl.core.callback import ContinualCallback
from lightning_cl.core.task import Task
from lightning_cl.modules import SequenceClassifier


class IntentClassifier(SequenceClassifier):
    """Reads as many tokens of a batch as its longest text has.

    Args:
        model: Folder of the encoder.
        num_labels: Classes of the stream.
        own_classes: Train the scores of the task's classes only; not with samples of other tasks in a batch. Answers
            are of the task's classes in any case.
        settings: Of ``SequenceClassifier``.
    """

    def __init__(self, model: Any, num_labels: int, *, own_classes: bool = False, **settings: Any) -> None:
        super().__init__(model, num_labels, **settings)
        self.own_classes, self.head_mask = own_classes, "task"

    @override
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        if attention_mask is not None:
            longest = int(attention_mask.sum(1).max())
            input_ids, attention_mask = input_ids[:, :longest], attention_mask[:, :longest]
        self.masks = self.own_classes or not self.training
        return super().forward(input_ids, attention_mask, **inputs)


class Sizes(ContinualCallback):
    """Notes what trains, and what is kept beside the frozen base, at the start of every task and at the end.

    The run's folder gets ``sizes.json`` with the lists ``trained`` (parameters) and ``stored`` (bytes).
    """

    def __init__(self) -> None:
        self.trained: list[int] = []
        self.stored: list[int] = []

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._note(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(trainer, pl_module)
        (Path(trainer.default_root_dir) / "sizes.json").write_text(
            json.dumps({"trained": self.trained, "stored": self.stored})
        )

    def _note(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trained = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        states = [each.state_dict() for each in trainer.callbacks]  # type: ignore[attr-defined]
        self.trained.append(sum(parameter.numel() for parameter in trained))
        self.stored.append(sum(p.nbytes for p in trained) + past_bytes(pl_module) + sum(map(tensor_bytes, states)))


def past_bytes(module: torch.nn.Module) -> int:
    """Return the bytes of the ranks in use in the slots for finished tasks."""
    total = 0
    for layer in module.modules():
        past = layer.lora_A[PAST] if hasattr(layer, "lora_A") and PAST in layer.lora_A else None  # type: ignore[operator, index]
        if isinstance(past, SlotFactor):
            up: Tensor = layer.lora_B[PAST].weight  # type: ignore[index, union-attr]
            used = int(up.ne(0).any(0).sum())
            total += used * (past.in_features + up.shape[0]) * up.element_size()
    return total


def tensor_bytes(state: Any) -> int:
    """Return the bytes of all tensors in a state."""
    if isinstance(state, Tensor):
        return state.nbytes
    if isinstance(state, Mapping):
        return sum(map(tensor_bytes, state.values()))
    if is_dataclass(state) and not isinstance(state, type):
        return sum(tensor_bytes(getattr(state, each.name)) for each in fields(state))
    return sum(map(tensor_bytes, state)) if isinstance(state, list | tuple) else 0
