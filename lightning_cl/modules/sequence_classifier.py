"""The reference classifier of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from typing_extensions import override

from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.checks import check_choice
from lightning_cl.mixins.masked_head import MaskedHead
from lightning_cl.modules.language_model import LanguageModel
from lightning_cl.modules.pretrained import unwrapped

__all__ = ["SequenceClassifier"]


class SequenceClassifier(MaskedHead, LanguageModel):
    """A Hugging Face model with a classification head: an encoder's, or the last token of a causal language model.

    Batches are dicts with ``input_ids`` [B, T], ``attention_mask`` and labels [B]. The head is trained whatever
    adapters the base has, is never quantized, and belongs to no adapter: all tasks share it. It logs ``train_loss``,
    and ``val_acc``/``val_loss`` or ``test_acc``/``test_loss`` for each loader.

    Args:
        model: Folder or hub name of a model; or a config, whose weights are random: a dict such as
            ``{"model_type": "bert", "hidden_size": 64}``, or a ``PretrainedConfig``.
        num_labels: Classes of the whole stream; at least 2.
        head_mask: Restrict the logits to the classes of the task (``"task"``) or to those seen so far (``"seen"``).
        settings: The further arguments of :class:`~lightning_cl.modules.LanguageModel`.

    Raises:
        ValueError: As for :class:`~lightning_cl.modules.LanguageModel`.
    """

    def __init__(
        self,
        model: Any,
        num_labels: int,
        *,
        head_mask: Literal["none", "task", "seen"] = "none",
        **settings: Any,
    ) -> None:
        if num_labels < 2:
            raise ValueError(f"`num_labels` must be at least 2, got {num_labels}.")
        check_choice("head_mask", head_mask, ("none", "task", "seen"))
        super().__init__(
            model, kind="AutoModelForSequenceClassification", overrides={"num_labels": num_labels}, **settings
        )
        self.masks = head_mask != "none"
        if head_mask != "none":
            self.head_mask = head_mask
        self._adapter = BatchAdapter()
        self.save_hyperparameters({"num_labels": num_labels, "head_mask": head_mask})

    @override
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """Return logits [B, C], restricted to the allowed classes where ``head_mask`` asks for it."""
        classifier = unwrapped(self.network)
        if hasattr(classifier, "score"):
            # transformers looks for the last token by the id of the padding, which a text may hold or a config lack
            hidden = classifier.base_model(input_ids, attention_mask=attention_mask, **inputs).last_hidden_state
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            last = (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(1)
            logits = classifier.score(hidden[torch.arange(len(last), device=last.device), last])
        else:
            logits = self.network(input_ids=input_ids, attention_mask=attention_mask, **inputs).logits
        return self.mask_logits(logits) if self.masks else logits

    def _loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        labels = self._adapter.labels(batch)
        if labels is None:
            raise ValueError(f"`SequenceClassifier` needs dicts with labels, got {sorted(batch)}.")
        logits = self(**self._adapter.inputs(batch))
        return cross_entropy(logits.float(), labels), logits, labels

    @override
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        loss = self._loss(batch)[0]
        self.log("train_loss", loss)
        return loss

    @override
    def _evaluate(self, batch: Mapping[str, Any], stage: str) -> None:
        loss, logits, labels = self._loss(batch)
        accuracy, size = (logits.argmax(-1) == labels).float().mean(), len(labels)
        self.log(f"{stage}_acc", accuracy, batch_size=size, sync_dist=True, prog_bar=stage == "val")
        self.log(f"{stage}_loss", loss, batch_size=size, sync_dist=True)

    @override
    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self.forward(**self._adapter.inputs(batch)).argmax(-1)
