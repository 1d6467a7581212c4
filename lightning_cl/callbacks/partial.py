"""What all methods share that let only some weights move: masks, half fine-tuning, salient layers, freezing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter
from typing_extensions import override

from lightning_cl.callbacks.selection import SelectsParameters
from lightning_cl.core.requests import Influence
from lightning_cl.core.state import local, reshard
from lightning_cl.core.task import Task
from lightning_cl.core.update import OptimizerStep, StepCache
from lightning_cl.functional.masks import hold_gradient_, scale_update_

__all__ = ["PartialUpdate"]


class PartialUpdate(SelectsParameters):
    r"""Lets each coordinate of the weights move by a share of what the optimizer would move it.

    A subclass says how much by :meth:`movability`: m from 0 to 1, for whole tensors or for each coordinate.

    - A tensor of m = 0 has no gradient in the step: the optimizer touches neither it nor its moments.
    - Coordinates that a mask of 0 and 1 holds have a gradient of 0, which is what clipping and moments see, and after
      the step they are put back to what they were, so that neither weight decay nor momentum moves them.
    - For shares between 0 and 1 the gradient stays, and the **applied update** is scaled, :math:`\theta_{before} + m
      (\theta_{after} - \theta_{before})`. Under plain SGD this equals scaling the gradient; under Adam, which divides
      by the gradient's size, scaling the gradient by a constant would do nothing.

    Gradients are held after all callbacks added to them and before clipping, whatever the order of callbacks. Of
    several such callbacks a coordinate moves by the product of their shares.

    Args:
        include: Patterns (as in :mod:`fnmatch`) of the parameters that the method is for; all trainable ones if
            ``None``.
        exclude: Patterns of parameters that move freely.
        from_task: The first task, counted from 0, in which the method holds anything.

    Attributes:
        graded: Whether a tensor of shares may hold others than 0 and 1.
        whole_tensors: Whether every share is one number for a whole tensor.
        parameters: The parameters that the method is for by name, from the start of a fit.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for a pattern that matches nothing.
    """

    graded: ClassVar[bool] = False
    whole_tensors: ClassVar[bool] = False

    def __init__(
        self, *, include: list[str] | None = None, exclude: list[str] | None = None, from_task: int = 0
    ) -> None:
        if not isinstance(from_task, int) or from_task < 0:
            raise ValueError(f"`from_task` must be a task's number, 0 or above, got {from_task!r}.")
        super().__init__(include=include, exclude=exclude)
        self.from_task = from_task
        self.parameters: dict[str, Parameter] = {}
        # a class attribute of the base: without tasks to tell apart, their boundaries may stay hidden
        self.boundaries = "required" if from_task else "unused"  # type: ignore[misc]
        self._task = 0
        self._shares: StepCache[dict[str, float | Tensor]] = StepCache()

    def movability(
        self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep
    ) -> Mapping[str, float | Tensor]:
        """Return m for parameters of the step by name; others move freely.

        A tensor is in the dtype of its parameter or in float32 and broadcasts to the parameter's local shard.
        """
        raise NotImplementedError

    @property
    def active(self) -> bool:
        """Whether the method holds anything in the present task."""
        return self._task >= self.from_task

    # ------------------------------------------------------------------ set-up

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # a validation before training may have left whole weights in the place of shards
        reshard(pl_module)
        self.parameters = self.selected(pl_module)
        self._shares.clear()

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._task = task.index

    # ------------------------------------------------------------------ the step

    @override
    def hold_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        shares: dict[str, float | Tensor] = {}
        if self.active:
            for name, share in self.movability(trainer, pl_module, step).items():
                parameter = step.parameters[name]
                if parameter.grad is None or (isinstance(share, float) and share == 1):
                    continue
                if isinstance(share, float) and share == 0:
                    parameter.grad = None
                    continue
                if isinstance(share, Tensor) and not self.graded:
                    hold_gradient_(local(parameter.grad), share)
                shares[name] = share
            step.keep(shares)
        self._shares[step] = shares

    @override
    def change_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        for name, share in self._shares[step].items():
            scale_update_(local(step.parameters[name].detach()), step.before(name), share)

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        # nothing of samples is kept
        return []

    def copy_bytes(self, pl_module: LightningModule) -> int:
        """Return the bytes on this rank of one copy of the parameters that the method is for."""
        return sum(local(p).nbytes for p in self.selected(pl_module).values())

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"task": self._task}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._task = state_dict["task"]
