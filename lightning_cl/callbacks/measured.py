"""What penalties share whose importances are measured on a task's data when it ends: EWC and MAS."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_cl.callbacks.measuring import Measurement
from lightning_cl.callbacks.penalty import QuadraticPenalty
from lightning_cl.callbacks.renewal import measured_again
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.requests import Influence
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.state import local
from lightning_cl.core.task import Task
from lightning_cl.core.task_data import task_batches

__all__ = ["MeasuredPenalty"]


class MeasuredPenalty(QuadraticPenalty):
    r"""A quadratic penalty with importances that :attr:`estimator` measures when a task ends.

    What would fail there fails before the first step of a fit. A subclass says how tasks are merged.

    Args:
        strength: :math:`\lambda` of the method; above 0.
        estimator: Measures the importances.
        include: Patterns (as in :mod:`fnmatch`) of the parameters to protect; all trainable ones if ``None``.
        exclude: Patterns of parameters to leave free.

    Attributes:
        fading: What stays of the importances of earlier tasks when another one is merged.
    """

    fading: float = 1.0

    def __init__(
        self,
        strength: float,
        estimator: Measurement,
        *,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
    ) -> None:
        super().__init__(strength, include=include, exclude=exclude)
        self.estimator = estimator
        self._checked = False
        # the factors of all tasks in the importances, summed
        self._tasks = 0.0

    def merge(self, new: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
        """Protect what the task that ends makes important, besides what earlier tasks did.

        Args:
            new: The task's importances, local shards by name.
            weights: Copies of the present weights, likewise.
        """
        raise NotImplementedError

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._checked = False

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._checked:
            self.estimator.check(pl_module, self.parameters, batch)
            self._checked = True

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self.warn_of_thawed(pl_module)
        new = self.estimator.estimate(trainer, pl_module, self.parameters, derived_seed("fisher", task.index))
        self.merge(new, self.present_weights())
        self._tasks = self.fading * self._tasks + 1

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        if not self.importance:
            return []

        def drop() -> None:
            self.protect({}, None)

        def measure(sample_ids: Tensor) -> None:
            if not self._checked:
                # of a run that resumed inside the request
                batch, _ = next(task_batches(trainer, pl_module, self.estimator.adapter, sample_ids=sample_ids))
                self.estimator.check(pl_module, self.parameters, batch)
            seed = derived_seed("fisher", task.index)
            new = self.estimator.estimate(trainer, pl_module, self.parameters, seed, sample_ids)
            # one mean over the samples of all tasks, as strong as the sum of the tasks' means was
            self.protect({name: value.mul_(self._tasks) for name, value in new.items()}, None)

        anchors = super().renew_state(trainer, pl_module, task)
        importances = measured_again(trainer, task, self, "the importances of the weights", drop, measure)
        if not self.importance:
            self._tasks = 0.0
        return [*anchors, importances]

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        parameters = self.selected(pl_module)

        def consolidate() -> Any:
            new = self.estimator.rehearse(pl_module, parameters, batch)
            return new, {name: local(p.detach()).to(new[name].dtype, copy=True) for name, p in parameters.items()}

        # importances and anchors
        return Footprint(device=2 * self._copy_bytes(pl_module), task_end=consolidate)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "by_sample": self.estimator.by_sample, "tasks": self._tasks}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.estimator.by_sample = state_dict["by_sample"]
        self._tasks = state_dict["tasks"]
