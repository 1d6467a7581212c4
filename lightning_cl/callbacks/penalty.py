"""What all penalties on the distance to old weights share: EWC, SI, MAS, RWalk, L2."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import Parameter
from typing_extensions import override

from lightning_cl.callbacks.selection import SelectsParameters
from lightning_cl.core.checks import check_positive
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.requests import Influence
from lightning_cl.core.state import ParameterState, local, reshard, sum_over_shards
from lightning_cl.core.task import Task
from lightning_cl.core.update import OptimizerStep, StepCache
from lightning_cl.functional.quadratic import quadratic_gradient_, quadratic_penalty

__all__ = ["QuadraticPenalty"]

# parameters, anchors and importances that one optimizer steps, matched by position
_Owned = tuple[list[Parameter], list[Tensor], list[Tensor] | None]


class QuadraticPenalty(SelectsParameters):
    r"""Holds weights near anchors.

    The step minimises the task's loss plus :math:`\frac{s}{2} \sum_i \Omega_i (\theta_i - \theta_i^*)^2`, with
    :math:`s` = ``factor * strength``. The penalty acts as its gradient, added once per optimizer step after unscaling
    and before clipping, which equals the penalty in the loss. A subclass says what the importances are: it replaces
    :attr:`importance` and :attr:`anchors` by :meth:`protect`, at a task's end. While there are none, nothing is added.
    One that is not ``weighted`` has anchors only, and an importance of 1 everywhere.

    Args:
        strength: :math:`\lambda` of the method; above 0.
        include: Patterns (as in :mod:`fnmatch`) of the parameters to protect; all trainable ones if ``None``.
        exclude: Patterns of parameters to leave free.

    Attributes:
        factor: 1 where the paper halves the penalty, 2 where it does not.
        weighted: Whether importances weigh the distances.
        parameters: The protected parameters by name, from the start of a fit.
        importance: :math:`\Omega`.
        anchors: :math:`\theta^*`.

    Raises:
        ValueError: If ``strength`` is not above 0; at the start of a fit for a pattern that matches nothing.
    """

    compares_weights = True
    factor: ClassVar[float] = 1.0
    weighted: ClassVar[bool] = True

    def __init__(self, strength: float, *, include: list[str] | None = None, exclude: list[str] | None = None) -> None:
        check_positive("strength", strength)
        self.strength = strength
        super().__init__(include=include, exclude=exclude)
        self.parameters: dict[str, Parameter] = {}
        self.importance = ParameterState()
        self.anchors = ParameterState()
        # what folding several quadratics into one leaves over: it moves the value, not the gradient
        self._constant = 0.0
        self._owned: StepCache[_Owned] = StepCache()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # here, and not in `setup`: only now are parameters sharded, on their device, and the state restored
        # a validation before training may have left whole weights in their place
        reshard(pl_module)
        self.parameters = self.selected(pl_module)
        name = type(self).__name__
        self.importance.place(self.parameters, f"The importance of `{name}`")
        self.anchors.place(self.parameters, f"The anchors of `{name}`")
        self._owned.clear()

    # ------------------------------------------------------------------ the penalty

    @override
    def change_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        # also while there is nothing to hold: what was replaced could not be measured when the task ends
        parameters, anchors, importance = self._owned_by(step)
        if not parameters:
            return
        if not all(parameter.requires_grad for parameter in parameters):
            # the penalty does not move what was frozen since the fit began
            free = [row for row, parameter in enumerate(parameters) if parameter.requires_grad]
            parameters = [parameters[row] for row in free]
            anchors = [anchors[row] for row in free]
            importance = None if importance is None else [importance[row] for row in free]
        for parameter in parameters:
            if parameter.grad is None:
                # the penalty reaches a weight that this step's loss does not
                parameter.grad = torch.zeros_like(parameter)
        grads = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        weights = [local(parameter.detach()) for parameter in parameters]
        quadratic_gradient_(grads, weights, anchors, importance, self.factor * self.strength)

    def _owned_by(self, step: OptimizerStep) -> _Owned:
        """Return what the step's optimizer moves of the protected; with several optimizers each is penalised once."""
        if step not in self._owned:
            step.check_current(self.parameters, self)
            names = [name for name in self._held if name in step.parameters]
            self._owned[step] = (
                [self.parameters[name] for name in names],
                [self.anchors[name] for name in names],
                self._importance_of(names),
            )
        return self._owned[step]

    @property
    def _held(self) -> ParameterState:
        """What has an entry for each parameter that is held by now."""
        return self.importance if self.weighted else self.anchors

    def _importance_of(self, names: list[str]) -> list[Tensor] | None:
        return [self.importance[name] for name in names] if self.weighted else None

    def penalty(self) -> Tensor:
        """Return the value of the penalty at the present weights, a scalar; ranks with shards must all call it."""
        strength = self.factor * self.strength
        if not self._held:
            return torch.zeros(())
        terms = {
            name: quadratic_penalty([self.weight(name)], [self.anchors[name]], self._importance_of([name]), strength)
            for name in self._held
        }
        return sum_over_shards(terms, self.parameters) + 0.5 * strength * self._constant

    # ------------------------------------------------------------------ consolidation

    def weight(self, name: str) -> Tensor:
        """Return this rank's shard of a protected weight."""
        return local(self.parameters[name].detach())

    def present_weights(self) -> dict[str, Tensor]:
        """Return copies of this rank's shards of all protected weights, in float32 or above."""
        return {
            name: local(p.detach()).to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self.parameters.items()
        }

    def protect(self, importance: dict[str, Tensor] | None, anchors: dict[str, Tensor] | None) -> None:
        """Hold the parameters from now on with these importances around these anchors, ``None`` for those as they are.

        Args:
            importance: Local shards by name.
            anchors: Local shards by name.
        """
        if importance is not None:
            self.importance.set(importance, self.parameters)
        if anchors is not None:
            self.anchors.set(anchors, self.parameters)
        self._owned.clear()

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        if not self._held:
            return []
        self.protect(None, self.present_weights())
        self._constant = 0.0
        return [Influence(type(self).__name__, "the weights to stay near", "recomputed")]

    def warn_of_thawed(self, pl_module: LightningModule) -> None:
        """Warn of parameters that became trainable after the fit began: nothing holds them."""
        if thawed := self.selected(pl_module).keys() - self.parameters.keys():
            rank_zero_warn(
                f"`{type(self).__name__}` does not protect {sorted(thawed)[:3]}, which became trainable after the fit"
                " began. Make them trainable before it, or leave them out by `exclude`."
            )

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        # anchors, and importances
        return Footprint(device=(1 + self.weighted) * self._copy_bytes(pl_module))

    def _copy_bytes(self, pl_module: LightningModule) -> int:
        """Return the bytes on this rank of one copy of the protected parameters, in float32 or above."""
        parameters = self.selected(pl_module).values()
        return sum(local(p).numel() * torch.promote_types(p.dtype, torch.float32).itemsize for p in parameters)

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "importance": self.importance.state_dict(),
            "anchors": self.anchors.state_dict(),
            "constant": self._constant,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.importance.load_state_dict(state_dict["importance"])
        self.anchors.load_state_dict(state_dict["anchors"])
        self._constant = state_dict["constant"]
