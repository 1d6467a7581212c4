"""The step pipeline: how callbacks act inside a ``training_step`` that they do not know.

One small object per module replaces ``training_step`` by a function that runs, in the order of ``trainer.callbacks``,
the batch transforms, then the user's own ``training_step``, unchanged and enclosed, then what takes the place of its
loss, then the loss terms. It runs inside the strategy's forward, so DDP and FSDP synchronise as usual. It is attached
only when a callback needs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_cl.core.batches import own_mapping
from lightning_cl.core.hooks import overriding

if TYPE_CHECKING:
    from lightning_cl.core.callback import ContinualCallback

__all__ = ["StepPipeline", "run_in_forward", "user_training_step"]

_MARK = "_lightning_cl_original"


class StepPipeline:
    """Attaches callbacks to the training step of a module, and detaches them again."""

    @staticmethod
    def attach(trainer: Trainer, pl_module: LightningModule, callbacks: Sequence[ContinualCallback]) -> None:
        """Wrap ``pl_module.training_step`` if one of ``callbacks`` acts in it.

        Raises:
            ValueError: If several callbacks replace the loss, or one does and another takes the module's own.
        """
        transforms = overriding(callbacks, "transform_batch")
        enclosing = overriding(callbacks, "around_step")
        replacing = overriding(callbacks, "replace_loss")
        terms = overriding(callbacks, "loss_term")
        StepPipeline.detach(pl_module)
        _attach_skipping(pl_module, callbacks)
        for kind in ("learn", "forget"):
            _check_replacing([c for c in callbacks if kind in c.acts_on])
        if not transforms and not enclosing and not replacing and not terms:
            return
        original: Callable[..., Any] = pl_module.training_step

        def training_step(batch: Any, *rest: Any) -> Any:
            if not trainer.training:
                # a `validation_step` that calls its `training_step`
                return original(batch, *rest)
            batch_idx = trainer.fit_loop.batch_idx
            for callback in _awake(transforms):
                batch = callback.transform_batch(trainer, pl_module, batch, batch_idx)
            with ExitStack() as stack:
                for callback in _awake(enclosing):
                    stack.enter_context(callback.around_step(trainer, pl_module, batch, batch_idx))
                outputs = original(own_mapping(batch), *rest)
            for callback in _awake(replacing):
                if outputs is not None:
                    outputs = _with_loss(
                        outputs, callback.replace_loss(trainer, pl_module, batch, batch_idx, outputs), pl_module
                    )
            for callback in _awake(terms):
                extra = callback.loss_term(trainer, pl_module, batch, batch_idx, outputs)
                if extra is not None and outputs is not None:
                    outputs = _with_loss(outputs, _own_loss(outputs, pl_module) + extra, pl_module)
            return outputs

        functools.update_wrapper(training_step, original)
        # Lightning reads the parameter names of the innermost function
        training_step.__wrapped__ = getattr(original, "__wrapped__", original)  # type: ignore[attr-defined]
        setattr(training_step, _MARK, original)
        pl_module.training_step = training_step  # type: ignore[method-assign]

    @staticmethod
    def detach(pl_module: LightningModule) -> None:
        """Give the module its own ``training_step`` and ``on_train_batch_start`` back."""
        for name in ("training_step", "on_train_batch_start"):
            original = getattr(pl_module.__dict__.get(name), _MARK, None)
            if original is None:
                continue
            del pl_module.__dict__[name]
            if getattr(pl_module, name) != original:
                # the module carried an instance attribute of its own, as a compiled module does
                setattr(pl_module, name, original)


def user_training_step(pl_module: LightningModule) -> Callable[..., Any]:
    """Return the module's own ``training_step``, without what callbacks put around it."""
    step: Callable[..., Any] = pl_module.training_step
    return getattr(step, _MARK, step)


def run_in_forward(pl_module: LightningModule, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function of the module's weights as the strategy calls a step: sharded weights must be gathered for it."""
    # a module may be edited before it ever had a Trainer
    strategy = None if pl_module._trainer is None else pl_module.trainer.strategy
    redirected = getattr(strategy, "run_in_forward", None)
    return function(*args) if redirected is None else redirected(function, *args)


def _attach_skipping(pl_module: LightningModule, callbacks: Sequence[ContinualCallback]) -> None:
    """Let callbacks that serve requests leave steps out: of the module alone Lightning asks whether to."""
    serving = [callback for callback in callbacks if callback.acts_on == ("forget",)]
    original: Callable[..., Any] = pl_module.on_train_batch_start
    if not serving:
        return

    @functools.wraps(original)
    def on_train_batch_start(*arguments: Any, **named: Any) -> Any:
        if not any(callback.skips_steps for callback in _awake(serving)):
            return original(*arguments, **named)
        # Lightning counts a batch left out as read and processed only, and does not know on resume where a run stood
        progress = pl_module.trainer.fit_loop.epoch_loop.batch_progress
        progress.increment_started()
        progress.increment_completed()
        return -1

    setattr(on_train_batch_start, _MARK, original)
    pl_module.on_train_batch_start = on_train_batch_start  # type: ignore[method-assign]


def _awake(callbacks: Sequence[ContinualCallback]) -> Iterator[ContinualCallback]:
    return (callback for callback in callbacks if not callback.resting)


def _check_replacing(callbacks: Sequence[ContinualCallback]) -> None:
    """Refuse more than one loss in the place of the module's own."""
    replacing = overriding(callbacks, "replace_loss")
    if len(replacing) > 1:
        names = " and ".join(f"`{type(c).__name__}`" for c in replacing)
        raise ValueError(f"{names} each put a loss in the place of the module's own: use one of them.")
    if replacing and (others := [c for c in callbacks if c.takes_own_loss]):
        raise ValueError(
            f"`{type(replacing[0]).__name__}` puts another loss in the place of the module's own, which"
            f" `{type(others[0]).__name__}` takes: use one of them."
        )


def _own_loss(outputs: Any, pl_module: LightningModule) -> Tensor:
    loss = loss_of(outputs)
    if loss is None:
        raise ValueError(
            f"`{type(pl_module).__name__}.training_step` returned {type(outputs).__name__}; its loss can be changed"
            " only where it is a tensor or a dict with the key 'loss'."
        )
    return loss


def _with_loss(outputs: Any, loss: Tensor, pl_module: LightningModule) -> Any:
    """Return ``outputs`` of a training step with another loss."""
    _own_loss(outputs, pl_module)
    return {**outputs, "loss": loss} if isinstance(outputs, Mapping) else loss


def loss_of(outputs: Any) -> Tensor | None:
    """Return the loss tensor in what a ``training_step`` returned, ``None`` if there is none."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss if isinstance(loss, torch.Tensor) else None
