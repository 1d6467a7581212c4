"""Ranks that grow where the gradient asks for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_cl.adapters.slot import Slot
from lightning_cl.adapters.slots import AdapterSlots
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_count
from lightning_cl.core.distributed import copy_of_rank_zero_, sum_over_ranks_
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.state import fill
from lightning_cl.core.task import Task
from lightning_cl.core.update import OptimizerStep, StepCache
from lightning_cl.functional.codyra import surviving_factors
from lightning_cl.functional.rank_growth import add_sketch_, leading_directions_outside, num_probes, probes

__all__ = ["GrowingLoRA"]


class GrowingLoRA(AdapterSlots):
    r"""Start every task with few ranks, and add more in the layers whose gradient they cannot follow.

    With :math:`G` the gradient of the loss with respect to a layer's weight, and :math:`P` the projection on the rows
    of A in use, a direction v gets a rank after a step if it is a right singular vector of :math:`G (I - P)` with

    .. math:: \frac{\sigma_v^2}{\lVert G \rVert_F^2} > \tau .

    Its row of A is v, with the norm that rows start with, and its column of B is 0: no output changes, and the column
    gets the longest gradient that a new rank can have. G is neither formed nor kept: in every so many steps, a sketch
    :math:`\Omega^\top G` with :math:`4 / \tau` random probes is summed over micro-batches and ranks. The rank r of the
    user's adapter is the most; only ranks in use take room in the slot for finished tasks. Of several optimizers each
    counts its own steps, and lets the layers grow whose A it moves.

    Args:
        start_rank: Ranks in use at a task's start, at least 1 and at most r.
        every: Optimizer steps of a task between looks at the gradient.
        threshold: :math:`\tau`, the share of the gradient's energy that earns a rank, above 0 and below 1.
        capacity: Rank of the slot for finished tasks.
        seed: Seed of the fresh adapters and of the probes.

    Attributes:
        ranks: The ranks in use, by layer; between tasks those of the task before.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for adapters of a rank below ``start_rank``, and
            as :class:`~lightning_cl.adapters.AdapterSlots`.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="growing-lora",
        family="adapters",
        paper="after GradMax (Evci et al. 2022, arXiv:2201.05125) and IncreLoRA (Zhang et al. 2023, arXiv:2308.12043)",
        needs="a PEFT model with LoRA",
        state="capacity ranks for each adapted layer, in the module",
    )

    def __init__(
        self,
        start_rank: int = 1,
        *,
        every: int = 50,
        threshold: float = 0.1,
        capacity: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(capacity, seed=seed)
        check_count("start_rank", start_rank)
        check_count("every", every)
        if not 0 < threshold < 1:
            raise ValueError(f"`threshold` must be above 0 and below 1, got {threshold!r}.")
        self.start_rank = start_rank
        self.every = every
        self.threshold = threshold
        self.ranks: dict[str, int] = {}
        # of the task, by layer, each counted by the optimizer that moves it
        self._steps: dict[str, int] = {}
        self._moved: StepCache[list[str]] = StepCache()
        # during a step after which ranks may grow
        self._sketches: dict[str, Tensor] = {}
        self._probes: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    # ------------------------------------------------------------------ set-up

    @override
    def extend(self, slot: Slot) -> None:
        rank = slot.rank(slot.current)
        if rank < self.start_rank:
            raise ValueError(
                f"`start_rank={self.start_rank}` is more than the rank r={rank} of the adapters in {slot.name!r}, which"
                " is the most that they can grow to. Lower `start_rank`, or raise `r`."
            )
        slot.add_mixing(slot.current, (torch.arange(rank) < self.start_rank).float())

    @override
    def trains(self, slot: Slot) -> set[str]:
        # what a gate of 0 closes gets no gradient, in A and in B
        return {"lora_A", "lora_B"}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._forget(self.slots)
        self._moved.clear()
        self._handles = [
            slot.layer.register_forward_hook(partial(self._watch, name)) for name, slot in self.slots.items()
        ]

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._sketches, self._probes = {}, {}
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ------------------------------------------------------------------ steps

    def _watch(self, name: str, layer: Any, args: tuple[Any, ...], output: Tensor) -> None:
        """Let the backward of a call add to the layer's sketch, in a step after which ranks may grow."""
        if (self._steps.get(name, 0) + 1) % self.every == 0 and output.requires_grad:
            output.register_hook(partial(self._add, name, args[0].detach()))

    def _add(self, name: str, inputs: Tensor, gradient: Tensor) -> None:
        if name not in self._sketches:
            count = num_probes(gradient.shape[-1], self.threshold)
            generator = torch.Generator().manual_seed(derived_seed("probes", self.seed, name))
            self._probes[name] = probes(gradient.shape[-1], count, generator).to(gradient.device)
            self._sketches[name] = torch.zeros(count, inputs.shape[-1], device=gradient.device)
        add_sketch_(self._sketches[name], inputs, gradient, self._probes[name])

    def _forget(self, names: Iterable[str]) -> None:
        for name in names:
            self._sketches.pop(name, None)
            self._probes.pop(name, None)

    @override
    def change_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        if step not in self._moved:
            moved = {id(parameter) for parameter in step.parameters.values()}
            downs = {name: slot.parameters(slot.current)["lora_A"] for name, slot in self.slots.items()}
            self._moved[step] = [name for name, down in downs.items() if id(down) in moved]
        for name in self._moved[step]:
            self._steps[name] = self._steps.get(name, 0) + 1
        due = [name for name in self._moved[step] if self._steps[name] % self.every == 0]
        if due:
            self._grow(trainer, due)
            self._forget(due)

    def _grow(self, trainer: Trainer, names: Sequence[str]) -> None:
        shares = []
        for name in names:
            slot = self.slots[name]
            gates = slot.mixing(slot.current)
            down, up = slot.weights(slot.current)
            used = gates != 0
            if used.all():
                continue
            sketch = self._sketches.get(name)
            if sketch is None:
                # this rank's batch did not come by
                sketch = torch.zeros(num_probes(len(up), self.threshold), down.shape[1], device=down.device)
            sum_over_ranks_(sketch)
            free = (~used).nonzero().flatten()
            directions, share = leading_directions_outside(sketch, down[used], self.threshold, len(free))
            taken = free[: len(directions)]
            # the root of the mean square of the norm of rows as LoRA draws them
            down[taken] = (directions * 3**-0.5).to(down)
            gates[taken] = 1.0
            for value in (down, gates):
                copy_of_rank_zero_(value)
            fill(slot.parameters(slot.current)["lora_A"], down)
            fill(slot.parameters(slot.current)["mixing"], gates)
            self.ranks[name] = int((gates != 0).sum())
            shares.append(share)
        if shares:
            for logger in trainer.loggers:
                logger.log_metrics({"growing_lora/share_outside": max(shares)}, step=trainer.global_step)

    # ------------------------------------------------------------------ tasks

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._steps = {}
        # other methods' passes over old data are no training
        self._forget(self.slots)
        self.ranks = dict.fromkeys(self.slots, self.start_rank)
        super().on_task_start(trainer, pl_module, task)

    @override
    def fold(self, slot: Slot) -> tuple[Tensor, Tensor]:
        return surviving_factors(*slot.weights(slot.current), slot.mixing(slot.current))

    @override
    def finish(self, trainer: Trainer, pl_module: LightningModule, next_task: int) -> None:
        super().finish(trainer, pl_module, next_task)
        metrics = {f"growing_lora/rank/{name}": float(rank) for name, rank in self.ranks.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "ranks": dict(self.ranks), "steps": dict(self._steps)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.ranks, self._steps = dict(state_dict["ranks"]), dict(state_dict["steps"])
