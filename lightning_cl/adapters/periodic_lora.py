"""Chains of low-rank updates: PeriodicLoRA (Meng et al. 2024), Chain of LoRA (Xia et al. 2024), ReLoRA."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_cl.adapters.slot import Slot
from lightning_cl.adapters.slots import AdapterSlots
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_count
from lightning_cl.core.events import TaskEvents
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.update import OptimizerStep, StepCache

__all__ = ["PeriodicLoRA"]


class PeriodicLoRA(AdapterSlots):
    r"""Restart the adapter within a task, so that a chain of low-rank updates adds up to one of a higher rank.

    After every k-th optimizer step of a task, with the momentum m,

    .. math::
        [B_{past}, A_{past}] \leftarrow [B_{past} \,|\, m B, \; A_{past} \,|\, A], \qquad
        (A, B) \leftarrow \begin{cases} (A_{new}, 0) & m = 1 \\ (A, (1 - m) B) & m < 1, \end{cases}

    and the optimizer forgets its moments for A and B. The outputs do not change: :math:`m \, BA` moves to the slot for
    finished tasks, where the papers merge it into the base weights, and :math:`(1 - m) BA` stays. A restart is made
    before the step that follows, so a task never ends with an empty adapter. The chain of a task is one segment of the
    past slot. The learning rate is left alone; a schedule with restarts of its own may warm it up again.

    Args:
        every: k, optimizer steps of a task between two restarts; the end of a task restarts the adapter too.
        momentum: m, above 0 and at most 1. 1 moves the whole update and draws A anew: Chain of LoRA, ReLoRA, and
            PeriodicLoRA without momentum.
        capacity: Rank of the slot for finished chains: tasks times links of a chain times r for an exact sum.
        seed: Seed of the fresh adapters.

    Attributes:
        restarts: Restarts in the task so far.

    Raises:
        ValueError: As :class:`AdapterSlots`.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="periodic-lora",
        family="adapters",
        paper="Meng et al. 2024, arXiv:2402.16141",
        needs="a PEFT model with LoRA",
        state="capacity ranks for each adapted layer, in the module",
    )

    def __init__(self, every: int, *, momentum: float = 1.0, capacity: int = 64, seed: int = 0) -> None:
        check_count("every", every)
        if not 0 < momentum <= 1:
            raise ValueError(f"`momentum` must be above 0 and at most 1, got {momentum!r}: 0 would move nothing.")
        super().__init__(capacity, seed=seed)
        self.every = every
        self.momentum = momentum
        self.restarts = 0
        # optimizer steps since the adapter started
        self._steps = 0
        self._restarting = False
        # whether an optimizer is the first one that steps adapters
        self._counts: StepCache[bool] = StepCache()

    # ------------------------------------------------------------------ what moves, and what stays

    @override
    def fold(self, slot: Slot) -> tuple[Tensor, Tensor]:
        down, up = super().fold(slot)
        return down, self.momentum * up if self._restarting else up

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule, slot: Slot, task_index: int) -> tuple[Tensor, Tensor]:
        if not self._restarting:
            return super().start(trainer, pl_module, slot, task_index)
        if self.momentum == 1:
            return super().start(trainer, pl_module, slot, derived_seed("restart", task_index, self.restarts))
        down, up = slot.factors(slot.current)
        # of one factor only: of both, the product would lose m (1 - m) more
        return down, (1 - self.momentum) * up

    @override
    def absorb(self, slot: Slot, down: Tensor, up: Tensor, *, extends: bool = False) -> None:
        # the first restart of a task begins its segment
        super().absorb(slot, down, up, extends=extends or self.restarts > 0)

    @override
    def finish(self, trainer: Trainer, pl_module: LightningModule, next_task: int) -> None:
        super().finish(trainer, pl_module, next_task)
        self.restarts = self.restarts + 1 if self._restarting else 0
        self._steps = 0

    # ------------------------------------------------------------------ when

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._steps < self.every:
            return
        task = TaskEvents.attach(trainer).task
        assert task is not None
        self._restarting = True
        try:
            self.finish(trainer, pl_module, task.index)
        finally:
            self._restarting = False

    @override
    def change_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        if step not in self._counts:
            factors = {id(p) for slot in self.slots.values() for p in slot.parameters(slot.current).values()}
            optimizers = [
                optimizer
                for optimizer in trainer.optimizers
                if any(id(p) in factors for group in optimizer.param_groups for p in group["params"])
            ]
            self._counts[step] = step.optimizer is optimizers[0]
        self._steps += self._counts[step]

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "restarts": self.restarts, "steps": self._steps}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.restarts, self._steps = state_dict["restarts"], state_dict["steps"]
