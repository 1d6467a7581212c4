"""What penalties share whose importance comes from the way that the weights took: SI and RWalk."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter
from typing_extensions import override

from lightning_cl.callbacks.penalty import QuadraticPenalty
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.requests import Influence
from lightning_cl.core.state import ParameterState, local
from lightning_cl.core.task import Task
from lightning_cl.core.update import OptimizerStep, StepCache
from lightning_cl.functional.path_integral import path_integral_

__all__ = ["PathIntegral"]


class _Followed:
    """What one optimizer steps of the protected, and copies of the step under way."""

    def __init__(self, parameters: dict[str, Parameter]) -> None:
        self.parameters = parameters
        # those with a gradient in this step
        self.moving: list[str] = []
        self.gradients: dict[str, Tensor] = {}
        # not `OptimizerStep.keep`, because these are overwritten by the moves: a pass over memory less
        self.weights: dict[str, Tensor] = {}


class PathIntegral(QuadraticPenalty):
    r"""A quadratic penalty that adds up, for each weight, what its moves did to the loss of the task.

    Each optimizer step adds :math:`-g \, (\theta_{t+1} - \theta_t)` to :attr:`path`. The gradient is that of the task's
    loss, copied before penalties, other methods and clipping change it; the weights are those that the step left, after
    all corrections. A step that a gradient scaler skipped adds nothing, nor does a weight without a gradient.

    Attributes:
        path: :math:`\omega` of the task so far.
    """

    def __init__(self, strength: float, *, include: list[str] | None = None, exclude: list[str] | None = None) -> None:
        super().__init__(strength, include=include, exclude=exclude)
        self.path = ParameterState()
        self._followed: StepCache[_Followed] = StepCache()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.path.place(self.parameters, f"The path of `{type(self).__name__}`")
        self._followed.clear()

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if not self.importance:
            # the first task starts here, a later one where the one before ended
            self.protect(None, self.present_weights())
        self.path.set(self._zeros(), self.parameters)

    # ------------------------------------------------------------------ the path

    @override
    def observe_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        followed = self._followed_by(step)
        gradients = {name: local(p.grad) for name, p in followed.parameters.items() if p.grad is not None}
        weights = {name: local(followed.parameters[name].detach()) for name in gradients}
        followed.moving = list(gradients)
        _copy(gradients, followed.gradients)
        _copy(weights, followed.weights)

    @override
    def observe_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        followed = self._followed_by(step)
        names = followed.moving
        path_integral_(
            [self.path[name] for name in names],
            [followed.gradients[name] for name in names],
            [followed.weights[name] for name in names],
            [local(followed.parameters[name].detach()) for name in names],
        )

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        # the ways that led to the weights are gone
        importances = Influence(type(self).__name__, "the importances of the weights", "remains")
        anchors = super().renew_state(trainer, pl_module, task)
        return [*anchors, importances] if anchors else []

    def _followed_by(self, step: OptimizerStep) -> _Followed:
        """Return what is known of an optimizer's step; its ``moving`` are the weights that have a gradient in it."""
        if step not in self._followed:
            step.check_current(self.parameters, self)
            self._followed[step] = _Followed({n: p for n, p in self.parameters.items() if n in step.parameters})
        return self._followed[step]

    def _zeros(self) -> dict[str, Tensor]:
        """Return zeros beside this rank's shards of all protected weights."""
        return {name: torch.zeros_like(anchor) for name, anchor in self.anchors.items()}

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        # importances, anchors and path; the gradients of a step and the weights before it; new anchors
        return self._footprint(pl_module, kept=5, renewed=1)

    def _footprint(self, pl_module: LightningModule, kept: int, renewed: int) -> Footprint:
        """Return a footprint of ``kept`` copies of the weights, of which ``renewed`` are made anew at a task's end."""
        parameters = self.selected(pl_module).values()

        def renew() -> Any:
            dtypes = [torch.promote_types(p.dtype, torch.float32) for p in parameters]
            return [
                local(p.detach()).to(dtype, copy=True)
                for p, dtype in zip(parameters, dtypes, strict=True)
                for _ in range(renewed)
            ]

        return Footprint(device=kept * self._copy_bytes(pl_module), task_end=renew)

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "path": self.path.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.path.load_state_dict(state_dict["path"])


def _copy(tensors: dict[str, Tensor], into: dict[str, Tensor]) -> None:
    """Copy tensors, into the memory of the step before where it fits."""
    for name, tensor in tensors.items():
        copy = into.get(name)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            into[name] = torch.empty_like(tensor)
    if tensors:
        torch._foreach_copy_([into[name] for name in tensors], list(tensors.values()))
