"""The reference classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typing_extensions import override

from lightning_cl.adapters.attach import add_adapters
from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.checks import check_choice, check_positive
from lightning_cl.mixins.masked_head import MaskedHead
from lightning_cl.modules.optimizers import OptimizerFactory

__all__ = ["Classifier"]


class Classifier(MaskedHead, LightningModule):
    """Any network trained by cross-entropy: an ordinary LightningModule that knows nothing of tasks.

    It logs ``train_loss``, and ``val_acc``/``val_loss`` or ``test_acc``/``test_loss`` for each loader.

    Args:
        network: Maps the inputs of a batch to logits [B, C].
        learning_rate: Step size; above 0.
        optimizer: ``"adam"``, ``"adamw"``, ``"sgd"`` (momentum 0.9), or what makes another of parameter groups, such as
            :class:`~lightning_cl.optim.SPAM`, in a config its ``class_path`` and ``init_args``. Learning rate and
            weight decay are those given here.
        weight_decay: Weight decay of the optimizer.
        adapter: Config of any PEFT method, as a dict such as ``{"peft_type": "LORA", "r": 8, "target_modules":
            "all-linear"}`` or as an object. All else in the network is then frozen, except ``modules_to_save``.
        head_mask: Restrict the logits to the classes of the task (``"task"``) or to those seen so far (``"seen"``).
    """

    def __init__(
        self,
        network: nn.Module,
        learning_rate: float = 1e-3,
        optimizer: Literal["adam", "adamw", "sgd"] | OptimizerFactory = "adam",
        weight_decay: float = 0.0,
        adapter: Any = None,
        head_mask: Literal["none", "task", "seen"] = "none",
    ) -> None:
        super().__init__()
        check_positive("learning_rate", learning_rate)
        check_positive("weight_decay", weight_decay, zero_allowed=True)
        check_choice("head_mask", head_mask, ("none", "task", "seen"))
        if not callable(optimizer):
            check_choice("optimizer", optimizer, ("adam", "adamw", "sgd"))
        self.network = network if adapter is None else add_adapters(network, adapter)
        self.learning_rate = learning_rate
        self.optimizer = optimizer
        self.weight_decay = weight_decay
        self.masks = head_mask != "none"
        if head_mask != "none":
            self.head_mask = head_mask
        self._adapter = BatchAdapter()

    @override
    def forward(self, inputs: Any) -> Tensor:
        """Return logits [B, C], restricted to the allowed classes where ``head_mask`` asks for it."""
        logits = self.network(**inputs) if isinstance(inputs, Mapping) else self.network(inputs)
        return self.mask_logits(logits) if self.masks else logits

    def _loss(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        labels = self._adapter.labels(batch)
        if labels is None:
            raise ValueError("`Classifier` needs batches `(inputs, labels)` or mappings with labels.")
        logits = self(self._adapter.inputs(batch))
        return cross_entropy(logits, labels), logits, labels

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self._loss(batch)[0]
        self.log("train_loss", loss)
        return loss

    def _evaluate(self, batch: Any, stage: str) -> None:
        loss, logits, labels = self._loss(batch)
        accuracy = (logits.argmax(-1) == labels).float().mean()
        size = len(labels)
        self.log(f"{stage}_acc", accuracy, batch_size=size, sync_dist=True, prog_bar=stage == "val")
        self.log(f"{stage}_loss", loss, batch_size=size, sync_dist=True)

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.forward(self._adapter.inputs(batch)).argmax(-1)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if callable(self.optimizer):
            return self.optimizer([{"params": parameters, "lr": self.learning_rate, "weight_decay": self.weight_decay}])
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=self.learning_rate, momentum=0.9, weight_decay=self.weight_decay)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
