"""What a module makes of a batch: class scores, labels, activations, read while its own step runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import pad

from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.capture import OutputCapture
from lightning_cl.core.distributed import rank
from lightning_cl.core.step import loss_of
from lightning_cl.core.targets import predicts_next
from lightning_cl.unlearning.forget_loss import Outputs

__all__ = ["OutputReader", "ids_of_step", "split_alternate"]

_ALTERNATE = "alternate_"


def split_alternate(batch: Any) -> tuple[Any, dict[str, Any] | None]:
    """Return a batch without the ``alternate_...`` entries of a mapping, and the batch of preferred answers in them."""
    if not isinstance(batch, Mapping):
        return batch, None
    found = {key: value for key, value in batch.items() if str(key).startswith(_ALTERNATE)}
    if not found:
        return batch, None
    rest = {key: value for key, value in batch.items() if key not in found}
    return rest, {key.removeprefix(_ALTERNATE): value for key, value in found.items()}


def ids_of_step(trainer: Trainer, batch_idx: int) -> Tensor | None:
    """Return the identities of this rank's samples in a step, int64 [n]; ``None`` without a stream."""
    stream = trainer.datamodule  # type: ignore[attr-defined]
    if not hasattr(stream, "batch_sample_ids"):
        return None
    ids, owners = stream.batch_sample_ids(batch_idx)
    reader = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    mine: Tensor = ids[owners == int(reader.get("rank", rank()))]
    return mine


class OutputReader:
    """Records what submodules return while steps of a module run, and makes :class:`Outputs` of it.

    Args:
        pl_module: The user's module.
        owner: The callback, for errors.
        adapter: Reads labels and padding.
        logits: Name of the submodule that returns the class scores; found by itself in most modules.
        layer: Name of the submodule whose output is read as activations, if any is.
    """

    def __init__(
        self, pl_module: LightningModule, owner: str, adapter: BatchAdapter, logits: str | None, layer: str | None
    ) -> None:
        self._owner = owner
        self._adapter = adapter
        self._scores = OutputCapture(pl_module, logits)
        self._layer = None if layer is None else OutputCapture(pl_module, layer, _activations)
        # whether the module's loss takes the labels of the next position, once it is known
        self._shifts: bool | None = None

    def __enter__(self) -> OutputReader:
        self._scores.__enter__()
        if self._layer is not None:
            self._layer.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._scores.__exit__()
        if self._layer is not None:
            self._layer.__exit__()

    def clear(self) -> None:
        """Forget what was recorded."""
        self._scores.clear()
        if self._layer is not None:
            self._layer.clear()

    def take(self, batch: Any, step_output: Any, ids: Tensor | None = None) -> Outputs:
        """Return what the step that just ran on a batch made of it, and forget it: it holds the step's graph.

        Args:
            batch: The batch.
            step_output: What the module's ``training_step`` returned; ``None`` if it did not end.
            ids: Identities of the samples.

        Raises:
            ValueError: If no class scores were seen, or they do not fit the labels.
        """
        activations = None if self._layer is None else self._layer.output
        logits = None
        if step_output is not None:
            # a loss of activations needs no scores
            logits = self._scores.output if self._layer is None else self._scores.found
        self.clear()
        mask = self._adapter.padding_mask(batch)
        labels = self._adapter.labels(batch)
        if labels is None and isinstance(batch, Mapping) and isinstance(tokens := batch.get("input_ids"), Tensor):
            # as a language model that makes labels of its inputs
            labels = tokens if mask is None else tokens.masked_fill(~mask, -100)
        if logits is None or labels is None:
            return Outputs(logits, labels, mask, activations, ids)
        if labels.is_floating_point() or labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"`{self._owner}` needs a class label for each row of the class scores, whose shape is"
                f" {list(logits.shape)}; the labels of the batch are {labels.dtype} of shape {list(labels.shape)}."
                " Name the submodule that returns the scores by `logits`, or the labels by"
                " `batch_adapter=BatchAdapter(labels=...)`."
            )
        if labels.ndim > 1:
            if self._shifts is None:
                self._shifts = predicts_next(logits.detach(), labels, loss_of(step_output))
            if self._shifts is False:
                # scores that are held against the label of their own position: as Hugging Face would have them
                # the position more that scores then have counts for none of them
                mask = pad(torch.ones_like(labels, dtype=torch.bool) if mask is None else mask, (0, 1), value=False)
                labels, logits = pad(labels, (1, 0), value=-100), pad(logits, (0, 0, 0, 1))
        return Outputs(logits, labels, mask, activations, ids)


def _activations(output: Any) -> Tensor | None:
    value = output[0] if isinstance(output, (tuple, list)) and output else output
    return value if isinstance(value, Tensor) and torch.is_floating_point(value) else None
