"""The module's head: which layer it is, whether every label has a place in it, and what masks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.capture import OutputCapture, forward_loss, forward_step, move_batch, run_step, undisturbed
from lightning_cl.core.task import Task
from lightning_cl.core.task_layer import task_layers

__all__ = ["LabelledStream", "check_head", "find_head", "masks_other_tasks"]


@runtime_checkable
class LabelledStream(Protocol):
    """A datamodule that knows its labels before training."""

    def largest_label(self) -> tuple[int, Task, Tensor] | None:
        """Return the largest training label, the first task with it and the identity of a sample, int64 [1]."""

    def fetch(self, sample_ids: Tensor) -> Any:
        """Read the samples of identities anew, as one batch."""


def check_head(trainer: Trainer, pl_module: LightningModule) -> None:
    """Run the module once, unseen, on the sample with the largest label, and refuse a head without a place for it.

    Only what is certain is refused: the module's own step fails on that sample, and the class scores in it, [1, C],
    have no more than C = label columns. Modules whose weights are all larger than the label, which step their
    optimizers themselves, or which may grow at a task's start (a hook ``on_task_start``, or on one process a layer that
    hears of tasks) are not run at all.

    Raises:
        ValueError: If the head is too small.
    """
    stream = trainer.datamodule  # type: ignore[attr-defined]
    found = stream.largest_label() if isinstance(stream, LabelledStream) else None
    grows = hasattr(pl_module, "on_task_start") or (trainer.world_size == 1 and task_layers(pl_module))
    if found is None or not pl_module.automatic_optimization or grows:
        return
    label, task, sample_id = found
    if not _has_dimension_up_to(label, pl_module):
        return
    previous = getattr(pl_module, "current_task", None)
    pl_module.current_task = task  # type: ignore[assignment]
    failure, capture = None, OutputCapture(pl_module)
    try:
        with undisturbed(pl_module, seed=0), capture, torch.no_grad():
            run_step(pl_module, move_batch(trainer, pl_module, stream.fetch(sample_id)), BatchAdapter())
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize(pl_module.device)
    except Exception as error:
        # what fails for another reason fails in training too, where it can be seen
        failure = error
    pl_module.current_task = previous  # type: ignore[assignment]
    scores = capture.found
    if failure is not None and scores is not None and scores.ndim == 2 and 1 < scores.shape[1] <= label:
        raise ValueError(
            f"The stream has the label {label} ({task}), but the head of `{type(pl_module).__name__}` has"
            f" {scores.shape[1]} outputs, for labels 0 to {scores.shape[1] - 1}. Give it at least {label + 1}, or"
            " number the classes from 0 without gaps."
        ) from failure


def find_head(pl_module: LightningModule, logits: str | None, batch: Any) -> str | None:
    """Return the name of the linear layer that class scores come from: the last whose output has their shape.

    Args:
        pl_module: The user's module, under automatic optimization.
        logits: Name of the submodule that returns the scores; found by itself in most modules.
        batch: A batch of the step, on the device.

    Returns:
        ``None`` if the step calls no such layer.

    Raises:
        ValueError: If nothing in the step returns class scores.
    """
    shapes: dict[str, torch.Size] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
            shapes.pop(name, None)
            shapes[name] = output.shape

        return record

    linear = {name: module for name, module in pl_module.named_modules() if isinstance(module, nn.Linear)}
    # factors of an adapter may have outputs of that shape
    layers = {name: module for name, module in linear.items() if ".lora_" not in name}
    handles = [layer.register_forward_hook(recorder(name)) for name, layer in layers.items()]
    try:
        with undisturbed(pl_module, seed=0), torch.no_grad(), OutputCapture(pl_module, logits) as capture:
            forward_loss(pl_module, batch)
            wanted = capture.output.shape
    finally:
        for handle in handles:
            handle.remove()
    return next((name for name, shape in reversed(shapes.items()) if shape == wanted), None)


@runtime_checkable
class _MaskingModule(Protocol):
    """A module with the mixin `MaskedHead`, or one that works alike."""

    head_mask: str

    def mask_logits(self, logits: Tensor) -> Tensor: ...


def masks_other_tasks(pl_module: LightningModule, batch: Any, batch_idx: int) -> bool:
    """Return whether the module's training step masks the classes of other tasks; it runs once, unseen."""
    if not isinstance(pl_module, _MaskingModule) or pl_module.head_mask != "task":
        return False
    own, masked = pl_module.mask_logits, []

    def mask_logits(logits: Tensor) -> Tensor:
        allowed = own(logits)
        masked.append(not torch.equal(allowed, logits))
        return allowed

    with undisturbed(pl_module, seed=0):
        object.__setattr__(pl_module, "mask_logits", mask_logits)
        # the mask may be one for evaluation
        pl_module.training = True
        forward_step(pl_module, batch, batch_idx)
    return any(masked)


def _has_dimension_up_to(label: int, pl_module: LightningModule) -> bool:
    """Return whether a weight is small enough to belong to a head without a place for ``label``."""
    shapes = [tuple(parameter.shape) for parameter in pl_module.parameters()]
    # of a convolution only the number of outputs counts, not the size of its kernel
    return any(1 < size <= label for shape in shapes for size in (shape if len(shape) <= 2 else shape[:1]))
