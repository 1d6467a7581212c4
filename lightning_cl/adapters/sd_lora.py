"""Directions that stay and magnitudes that train on (SD-LoRA, Wu et al. 2025, arXiv:2501.13198)."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_cl.adapters.slot import Slot
from lightning_cl.adapters.slots import AdapterSlots
from lightning_cl.core.card import MethodCard
from lightning_cl.core.events import TaskEvents
from lightning_cl.core.state import fill
from lightning_cl.core.task import Task
from lightning_cl.functional.sd_lora import direction_and_magnitude, fit_direction

__all__ = ["SDLoRA"]


class SDLoRA(AdapterSlots):
    r"""Keep the direction of every finished task's update, and go on training how far each goes.

    In task t a layer computes

    .. math:: h = W x + s \sum_{i<t} \alpha_i \frac{B_i A_i}{\lVert B_i A_i \rVert_F} x + s \, \alpha_t B_t A_t x

    and trains :math:`A_t`, :math:`B_t` and all magnitudes :math:`\alpha_1, \dots, \alpha_t`. At the task's end its
    update is split into direction and norm, :math:`\alpha_t \leftarrow \alpha_t \lVert B_t A_t \rVert_F`, which changes
    no output; the magnitudes of earlier tasks stay as they were learned. A new task begins with a magnitude of 1.

    Args:
        merge_below: Do not keep a new direction that the earlier ones span but for a residual of less than this share
            of its norm, from 0 to 1; its least-squares coefficients are added to their magnitudes. 0 keeps every
            direction. Above 0, when the capacity is used up, every further direction is merged, whatever its residual.
        capacity: Rank of the slot for finished tasks: tasks times r, because directions cannot be compressed.
        seed: Seed of the fresh adapters.

    Attributes:
        errors: For each layer whose latest update was merged, the residual as a share of that update's norm.

    Raises:
        ValueError: For a setting out of range; at the start of a fit if the tasks' directions do not fit into the
            capacity, and as :class:`~lightning_cl.adapters.AdapterSlots`.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="sd-lora",
        family="adapters",
        paper="Wu et al. 2025, arXiv:2501.13198",
        needs="a PEFT model with LoRA; room for the ranks of all tasks",
        state="capacity ranks for each adapted layer, in the module",
    )

    def __init__(self, merge_below: float = 0.0, *, capacity: int = 64, seed: int = 0) -> None:
        super().__init__(capacity, seed=seed)
        if not 0 <= merge_below <= 1:
            raise ValueError(f"`merge_below` must be from 0 to 1, got {merge_below!r}.")
        self.merge_below = merge_below

    # ------------------------------------------------------------------ set-up

    @override
    def extend(self, slot: Slot) -> None:
        # one magnitude for the ranks of a task, at the place of the first of them
        slot.add_mixing(slot.current, torch.ones(1), torch.zeros(slot.rank(slot.current), dtype=torch.int64))
        slot.add_mixing(slot.past, torch.ones(slot.rank(slot.past)), torch.arange(slot.rank(slot.past)))

    @override
    def trains_past(self, slot: Slot) -> set[str]:
        return {"mixing"}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # what a request teaches is kept as a task is
        self._check_room(TaskEvents.attach(trainer).tasks_to_end(self, requests=True) or 0)

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().on_task_start(trainer, pl_module, task)
        self._check_room(1)

    def _check_room(self, tasks: int) -> None:
        """Refuse a capacity that is too small for tasks that are still to end."""
        for name, slot in self.slots.items():
            used, rank = self.segments.get(name, [0])[-1], slot.rank(slot.current)
            if self.merge_below > 0:
                # the first direction has nothing to be merged into
                tasks = min(tasks, int(used == 0))
            if used + tasks * rank > slot.rank(slot.past):
                raise ValueError(self._no_room(name, used, tasks, rank))

    def _no_room(self, name: str, used: int, tasks: int, rank: int) -> str:
        return (
            f"`SDLoRA(capacity={self.capacity})` keeps every direction as it is. In {name!r} {used} ranks are used, and"
            f" with {tasks} more tasks of rank {rank} it needs a capacity of {used + tasks * rank}. Raise `capacity`,"
            " lower the rank `r` of the adapters, or let directions that earlier ones span be merged, such as"
            " `merge_below=0.5`."
        )

    # ------------------------------------------------------------------ the end of a task

    @override
    def absorb(self, slot: Slot, down: Tensor, up: Tensor, *, extends: bool = False) -> None:
        segments = self.segments[slot.name]
        first, room = segments[-1], slot.rank(slot.past) - segments[-1]
        magnitudes = slot.mixing(slot.past)
        if self.merge_below > 0 and first > 0:
            past_down, past_up = slot.weights(slot.past)
            kept = [(start, end) for start, end in pairwise(segments) if end > start]
            directions = [(past_down[start:end], past_up[:, start:end]) for start, end in kept]
            coefficients, residual = fit_direction(down, up, directions)
            if residual < self.merge_below or len(down) > room:
                places = torch.tensor([start for start, _ in kept], device=magnitudes.device)
                magnitudes[places] += coefficients.to(magnitudes)
                fill(slot.parameters(slot.past)["mixing"], magnitudes)
                self.errors[slot.name] = float(residual)
                segments.append(first)
                return
        if len(down) > room:
            # a truncated sum would have no directions, and the magnitudes would belong to nothing
            raise ValueError(self._no_room(slot.name, first, 1, len(down)))
        down, up, norm = direction_and_magnitude(down, up)
        super().absorb(slot, down, up)
        magnitudes[first] = norm.to(magnitudes)
        fill(slot.parameters(slot.past)["mixing"], magnitudes)
        slot.down(slot.past).groups[first : first + len(down)] = first

    @override
    def tell_errors(self, trainer: Trainer) -> None:
        if not self.errors:
            return
        worst = max(self.errors.values())
        rank_zero_info(
            f"`SDLoRA` merged the new direction of {len(self.errors)} layers into earlier ones: up to {worst:.2e} of"
            " the norm of an update is left out."
        )
        for logger in trainer.loggers:
            logger.log_metrics({"sd_lora/error": worst}, step=trainer.global_step)
