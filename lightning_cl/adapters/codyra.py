"""Ranks chosen for every layer and task by gates (CoDyRA, Lu et al. 2024, arXiv:2412.01004)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter
from typing_extensions import override

from lightning_cl.adapters.slot import Slot
from lightning_cl.adapters.slots import AdapterSlots
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_positive
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.schedules import steps_of_task
from lightning_cl.core.state import fill, local
from lightning_cl.core.task import Task
from lightning_cl.core.update import OptimizerStep, StepCache
from lightning_cl.functional.codyra import soft_threshold_, surviving_factors, threshold_at

__all__ = ["CoDyRA"]


class CoDyRA(AdapterSlots):
    r"""Learn every task with as many ranks in each layer as it needs: gates on ranks are trained to be sparse.

    The update of a layer is :math:`B \, \mathrm{diag}(w) A`, with a trained gate for each rank. After the n-th of the N
    optimizer steps of a task,

    .. math:: w \leftarrow \mathrm{sign}(w) \max(|w| - \kappa_n, 0), \qquad
        \kappa_n = \kappa_{max} \frac{\max(n - dN, 0)}{N - dN},

    the proximal step of :math:`\kappa \lVert w \rVert_1`. At the task's end ranks with a gate of 0 are dropped, and
    only the others take room in the slot for finished tasks. Gates begin every task with draws from the normal
    distribution.

    Args:
        threshold: :math:`\kappa_{max}`, above 0, in units of a gate and step: a gate that nothing pushes falls by about
            :math:`\kappa_{max} (1 - d) N / 2` in a task.
        dense: d, the share of a task's steps before thresholds begin, from 0 to below 1.
        capacity: Rank of the slot for finished tasks.
        seed: Seed of the fresh adapters and gates.

    Attributes:
        ranks: The ranks that the task before has kept, by layer.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for adapters below float32, as those of
            ``"bf16-true"``, whose gates cannot take the steps; at the start of a task whose number of steps is
            unknown, and as :class:`~lightning_cl.adapters.AdapterSlots`.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="codyra",
        family="adapters",
        paper="Lu et al. 2024, arXiv:2412.01004",
        needs="a PEFT model with LoRA; tasks of known length",
        state="capacity ranks for each adapted layer, in the module",
    )

    def __init__(self, threshold: float = 0.005, *, dense: float = 0.5, capacity: int = 64, seed: int = 0) -> None:
        super().__init__(capacity, seed=seed)
        check_positive("threshold", threshold)
        if not 0 <= dense < 1:
            raise ValueError(f"`dense` must be from 0 to below 1, got {dense!r}.")
        self.threshold = threshold
        self.dense = dense
        self.ranks: dict[str, int] = {}
        self._done, self._steps = 0, 1
        self._gates: StepCache[list[Parameter]] = StepCache()

    @override
    def extend(self, slot: Slot) -> None:
        slot.add_mixing(slot.current, self._first_gates(slot, 0))

    def _first_gates(self, slot: Slot, task_index: int) -> Tensor:
        generator = torch.Generator().manual_seed(derived_seed("gates", self.seed, slot.name, task_index))
        return torch.randn(slot.rank(slot.current), generator=generator)

    @override
    def fold(self, slot: Slot) -> tuple[Tensor, Tensor]:
        down, up = surviving_factors(*slot.weights(slot.current), slot.mixing(slot.current))
        self.ranks[slot.name] = len(down)
        return down, up

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._gates.clear()
        for name, slot in self.slots.items():
            dtype = slot.parameters(slot.current)["mixing"].dtype
            if torch.finfo(dtype).eps > torch.finfo(torch.float32).eps:
                raise ValueError(
                    f"`CoDyRA` subtracts thresholds from gates that are smaller than what {dtype} resolves, so the"
                    f" gates of {name!r} would stand still. Keep the adapters in float32: use"
                    " `Trainer(precision='bf16-mixed')`, or a base model in bfloat16 under adapters in float32, as PEFT"
                    " makes them (`autocast_adapter_dtype=True`), without `precision='bf16-true'`."
                )

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._done, self._steps = 0, steps_of_task(trainer, task, self)
        super().on_task_start(trainer, pl_module, task)

    @override
    def finish(self, trainer: Trainer, pl_module: LightningModule, next_task: int) -> None:
        super().finish(trainer, pl_module, next_task)
        for logger in trainer.loggers:
            logger.log_metrics({f"codyra/rank/{name}": r for name, r in self.ranks.items()}, step=trainer.global_step)

    @override
    def restart(self, trainer: Trainer, pl_module: LightningModule, task_index: int) -> None:
        super().restart(trainer, pl_module, task_index)
        for slot in self.slots.values():
            fill(slot.parameters(slot.current)["mixing"], self._first_gates(slot, task_index))

    @override
    def change_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        if step not in self._gates:
            moved = {id(parameter) for parameter in step.parameters.values()}
            every = [slot.parameters(slot.current)["mixing"] for slot in self.slots.values()]
            self._gates[step] = [gate for gate in every if id(gate) in moved]
        gates = self._gates[step]
        if not gates:
            return
        if gates[0] is self._leader():
            self._done += 1
        threshold = threshold_at(self._done, self._steps, self.dense, self.threshold)
        if threshold > 0:
            soft_threshold_([local(gate.detach()) for gate in gates], threshold)

    def _leader(self) -> Parameter:
        """Return the gates whose steps are counted, where several optimizers share the layers."""
        first = next(iter(self.slots.values()))
        return first.parameters(first.current)["mixing"]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "ranks": dict(self.ranks), "done": self._done, "steps": self._steps}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.ranks = dict(state_dict["ranks"])
        self._done, self._steps = state_dict["done"], state_dict["steps"]
