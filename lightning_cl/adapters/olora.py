"""Orthogonal low-rank adaptation (Wang et al. 2023, arXiv:2310.14152)."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from typing_extensions import override

from lightning_cl.adapters.slots import AdapterSlots
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_choice, check_positive
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.state import local, reshard, sum_over_shards
from lightning_cl.core.step import loss_of
from lightning_cl.core.task import Task
from lightning_cl.core.update import OptimizerStep, StepCache
from lightning_cl.functional.olora import OrthogonalityForm, orthogonality_gradient_, orthogonality_penalty

__all__ = ["OLoRA"]


class _Pair(NamedTuple):
    """The present factor A of a layer, whole or a shard of its rows, and those of all finished tasks, whole."""

    new: Parameter
    past: Tensor
    strength: float


class OLoRA(AdapterSlots):
    r"""Keep the input directions of a task's adapter orthogonal to those of earlier tasks.

    From the second task on, the step minimises the task's loss plus

    .. math:: \lambda \sum_l \sum_{i,j} \left( A^{(l)} A_{past}^{(l)\top} \right)_{ij}^2

    over the adapted layers l, with the rows of all earlier tasks in :math:`A_{past}`. The penalty acts as its gradient
    :math:`2 \lambda A A_{past}^\top A_{past}`, added once per optimizer step after unscaling and before clipping, which
    equals the penalty in the loss; gradient accumulation does not change it. In the first task it is exactly zero. Its
    value after a step, and its ratio to the loss of the step's last micro-batch on the first rank, are logged as
    ``olora/penalty`` and ``olora/ratio``, every ``log_every_n_steps`` steps of the Trainer.

    Args:
        strength: :math:`\lambda`; above 0. 0.5 is what the authors use with ``"absolute"``.
        form: ``"squared"``, the paper's. ``"absolute"``: :math:`\sum_{i,j} |\cdot|`, that of the authors' code and
            so of the published numbers. ``"cosine"``: the mean of the squared cosines between new and old rows, over
            all pairs and layers: at most 1 whatever the ranks, widths, numbers of layers and of tasks.
        capacity: Rank of the slot for finished tasks: tasks times r for an exact sum.
        seed: Seed of the fresh adapters.

    Raises:
        ValueError: As :class:`AdapterSlots`; at the start of a fit for factors that are sharded within their rows.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="o-lora",
        family="adapters",
        paper="Wang et al. 2023, arXiv:2310.14152",
        needs="a PEFT model with LoRA",
        state="capacity ranks for each adapted layer, in the module",
    )

    def __init__(
        self, strength: float = 0.5, *, form: OrthogonalityForm = "squared", capacity: int = 64, seed: int = 0
    ) -> None:
        check_positive("strength", strength)
        check_choice("form", form, get_args(OrthogonalityForm))
        super().__init__(capacity, seed=seed)
        self.strength = strength
        self.form = form
        self._pairs: dict[str, _Pair] = {}
        self._owned: StepCache[list[_Pair]] = StepCache()
        self._logs = False

    # ------------------------------------------------------------------ what is compared

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for slot in self.slots.values():
            down = slot.parameters(slot.current)["lora_A"]
            kinds = down.placements if isinstance(down, DTensor) else ()
            if any(kind.is_shard() and not kind.is_shard(0) for kind in kinds):
                raise ValueError(
                    f"`OLoRA` needs factors sharded on dimension 0, so that every rank holds whole rows; A of"
                    f" {slot.name!r} is placed as {kinds}. Shard by `fully_shard` without a `shard_placement_fn`."
                )
        self._compare(pl_module)

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().on_task_start(trainer, pl_module, task)
        self._compare(pl_module)

    def _compare(self, pl_module: LightningModule) -> None:
        """Take up what finished tasks left; it stays until the task ends."""
        reshard(pl_module)
        self._pairs = {}
        self._owned.clear()
        for slot in self.slots.values():
            used = self.segments.get(slot.name, [0])[-1]
            if not used:
                continue
            past = slot.parameters(slot.past)["lora_A"].detach()
            rows = past.full_tensor()[:used].clone() if isinstance(past, DTensor) else past[:used]
            if not rows.any(1).all():
                # an approximation of a lower rank than the capacity leaves zeros, which would count in the mean
                rows = rows[rows.any(1)]
            # a mean over the rows of all ranks and over layers
            parts = slot.rank(slot.current) * len(self.slots) if self.form == "cosine" else 1
            new = slot.parameters(slot.current)["lora_A"]
            self._pairs[slot.name] = _Pair(new, rows, self.strength / parts)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._pairs = {}
        self._owned.clear()

    # ------------------------------------------------------------------ the penalty

    @override
    def change_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        pairs = self._owned_by(step)
        for pair in pairs:
            if not pair.new.requires_grad:
                continue
            if pair.new.grad is None:
                # the penalty reaches a factor that this step's loss does not
                pair.new.grad = torch.zeros_like(pair.new)
            gradient, rows = local(pair.new.grad), local(pair.new.detach())
            orthogonality_gradient_(gradient, rows, pair.past, pair.strength, self.form)
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if pairs and trainer.loggers and every and trainer.global_step % every == 0:
            self._logs = True

    def _owned_by(self, step: OptimizerStep) -> list[_Pair]:
        if step not in self._owned:
            stepped = {id(parameter) for parameter in step.parameters.values()}
            self._owned[step] = [pair for pair in self._pairs.values() if id(pair.new) in stepped]
        return self._owned[step]

    def penalty(self) -> Tensor:
        """Return the value of the penalty at the present weights, a scalar; ranks with shards must all call it."""
        if not self._pairs:
            return torch.zeros(())
        terms = {
            name: pair.strength * orthogonality_penalty(local(pair.new.detach()), pair.past, self.form)
            for name, pair in self._pairs.items()
        }
        return sum_over_shards(terms, {name: pair.new for name, pair in self._pairs.items()})

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._logs:
            return
        self._logs = False
        penalty, loss = self.penalty(), loss_of(outputs)
        values = {"olora/penalty": float(penalty)}
        if loss is not None:
            # Lightning has divided it by the number of micro-batches
            micro_batches = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            values["olora/ratio"] = float(penalty / (micro_batches * loss))
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for logger in trainer.loggers:
            logger.log_metrics(finite, step=trainer.global_step)

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        others = super().footprint(trainer, pl_module, batch)
        past = [slot.parameters(slot.past)["lora_A"] for slot in self.slots.values()]
        # of what lies in shards, every rank keeps a whole copy during a task
        copies = sum(p.numel() * p.itemsize for p in past if isinstance(p, DTensor))
        return Footprint(device=others.device + copies, host=others.host)
