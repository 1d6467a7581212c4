"""Starts for the adapter of each task, from random or from what is known of the data."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from lightning_cl.adapters.covariance import (
    by_identity,
    check_features,
    covariance_dtype,
    input_covariances,
    loaded_by_identity,
    read_batch,
    saved_by_identity,
    write_rows,
)
from lightning_cl.adapters.slot import Slot
from lightning_cl.adapters.slots import AdapterSlots
from lightning_cl.callbacks.renewal import measured_again
from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.callback import ContinualCallback
from lightning_cl.core.checks import check_choice, check_count
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.requests import Influence
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.task import Task
from lightning_cl.functional.adapter_starts import least_context_rows, variance_rows
from lightning_cl.functional.lorafa import orthonormal_rows

__all__ = ["AdapterStart", "Start"]

Start = Literal["orthogonal", "eva", "corda"]


class AdapterStart(ContinualCallback):
    r"""Choose where the adapters of :class:`AdapterSlots` start a task from.

    Stands beside ``AdapterSlots`` or a method built on it, and gives the factor A of each layer, before each task,
    orthonormal rows instead of uniform random ones; B is zero as always, so no start changes an output:

    - ``"orthogonal"``: random ones.
    - ``"eva"``: the leading eigenvectors of the covariance of the layer's inputs over the coming task, from one pass
      over it (Paischer et al. 2024, arXiv:2410.07170). All layers keep their rank.
    - ``"corda"``: the r smallest components of the weight in the context of the earlier tasks, after CorDA's
      knowledge-preserving mode (Yang et al. 2024, arXiv:2406.05223): with :math:`C = \sum_t C_t` the covariances of the
      inputs in the tasks so far and :math:`W C = U S V^\top`, rows with the span of :math:`V_r^\top C^{-1}`. The first
      task has no context and keeps its own start. The paper takes these components out of W and trains them, so that
      the adapter starts as :math:`U_r S_r V_r^\top C^{-1}` and W stays less by it; here W stays as it is, because later
      tasks, other adapters and 4-bit weights need it, and the adapter starts at zero.

    Args:
        kind: The start.
        n_samples: Samples of a task to read for ``"eva"`` and ``"corda"``, over all ranks; the whole task if ``None``.
        seed: Seed of ``"orthogonal"``.
        batch_adapter: Reads batches of an uncommon structure.

    Attributes:
        context: Of ``"corda"``: C by the name of the layer, from the end of the first task on.

    Raises:
        ValueError: For a setting out of range, or one that belongs to another start; at the start of a fit without
            ``AdapterSlots``, or beside a method that starts its adapters itself; at the start of a task for a step that
            calls none of the layers, or for an adapter that has been trained.
    """

    def __init__(
        self,
        kind: Start,
        *,
        n_samples: int | None = None,
        seed: int = 0,
        batch_adapter: BatchAdapter | None = None,
    ) -> None:
        check_choice("kind", kind, get_args(Start))
        if n_samples is not None:
            check_count("n_samples", n_samples)
        for name, value, mine in (("n_samples", n_samples, kind != "orthogonal"), ("seed", seed, kind == "orthogonal")):
            if value and not mine:
                raise ValueError(f"`{name}={value}` does not belong to `kind={kind!r}`, which does not use it.")
        self.kind = kind
        self.n_samples = n_samples
        self.seed = seed
        self.adapter = batch_adapter or BatchAdapter()
        self.context: dict[str, Tensor] = {}

    # ------------------------------------------------------------------ set-up

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        found = [c for c in trainer.callbacks if isinstance(c, AdapterSlots)]  # type: ignore[attr-defined]
        if stage != "fit":
            return
        if not found:
            raise ValueError(
                f"`AdapterStart({self.kind!r})` starts the adapters of `AdapterSlots` or a method built on it, and the"
                " Trainer has none: put it beside one."
            )
        if found[0].starts_itself:
            name = type(found[0]).__name__
            raise ValueError(f"`{name}` chooses itself where its adapters start: leave `AdapterStart` out.")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.context:
            return
        features = {name: len(total) for name, total in self.context.items()}
        check_features("AdapterStart", "context", features, _slots(trainer))

    # ------------------------------------------------------------------ tasks

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        slots = _slots(trainer)
        if self.kind == "orthogonal":
            self._start_at_random(slots, task.index)
        elif self.kind == "eva":
            covariances = input_covariances(trainer, pl_module, slots, self.adapter, self.n_samples)
            groups = [names for names in by_identity(covariances) if covariances[names[0]].any()]

            def leading(names: list[str], covariance: Tensor) -> Tensor:
                return variance_rows(covariance, max(_rank(slots[name]) for name in names))

            write_rows(slots, groups, lambda name: covariances[name], leading, "AdapterStart")
        elif self.context:
            self._start_beside_context(slots, pl_module.device)

    def _start_at_random(self, slots: dict[str, Slot], task_index: int) -> None:
        def random(names: list[str], slot: Slot) -> Tensor:
            generator = torch.Generator().manual_seed(derived_seed("orthogonal", self.seed, slot.name, task_index))
            rank, length = _rank(slot), slot.layer.in_features
            # of more rows than inputs, the last are zero
            return pad(orthonormal_rows(min(rank, length), length, generator), (0, 0, 0, max(rank - length, 0)))

        write_rows(slots, [[name] for name in slots], lambda name: slots[name], random, "AdapterStart")

    def _start_beside_context(self, slots: dict[str, Slot], device: torch.device) -> None:
        known = [name for name in slots if self.context[name].any()]

        def least(names: list[str], weight: Tensor) -> Tensor:
            context = self.context[names[0]].to(device)
            return least_context_rows(weight, context, _rank(slots[names[0]]))

        write_rows(slots, [[name] for name in known], lambda name: slots[name].base_weight(), least, "AdapterStart")

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if self.kind != "corda":
            return
        self._add_context(trainer, pl_module)

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        if not self.context:
            return []
        measure = partial(self._add_context, trainer, pl_module)
        return [measured_again(trainer, task, self, "covariances of inputs", self.context.clear, measure)]

    def _add_context(self, trainer: Trainer, pl_module: LightningModule, sample_ids: Tensor | None = None) -> None:
        """Add the covariances of the inputs in a task, or of samples by their identities."""
        slots = _slots(trainer)
        new = input_covariances(trainer, pl_module, slots, self.adapter, self.n_samples, sample_ids)
        context: dict[str, Tensor] = {}
        for names in by_identity(new, self.context):
            total = new[names[0]].clone()
            if names[0] in self.context:
                total += self.context[names[0]].to(total)
            context |= dict.fromkeys(names, total)
        self.context = context

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        if self.kind == "orthogonal":
            return Footprint()
        slots, device = _slots(trainer), pl_module.device
        lengths = [slot.layer.in_features for slot in slots.values()] if self.kind == "corda" else []

        def sums() -> Any:
            return [torch.empty(d, d, dtype=covariance_dtype(d, device), device=device) for d in lengths]

        # as if no layers shared their inputs
        kept = sum(length**2 * covariance_dtype(length, device).itemsize for length in lengths)
        return Footprint(device=kept, task_end=read_batch(pl_module, slots, self.adapter, batch, sums))

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"context": saved_by_identity(self.context, lambda total: {"sum": total.cpu().clone()})}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # copies, because the tensors may be mapped from a file
        self.context = loaded_by_identity(state_dict["context"], lambda saved: torch.as_tensor(saved["sum"]).clone())


def _slots(trainer: Trainer) -> dict[str, Slot]:
    """Return the slots of the method beside."""
    return next(c.slots for c in trainer.callbacks if isinstance(c, AdapterSlots))  # type: ignore[attr-defined]


def _rank(slot: Slot) -> int:
    return slot.rank(slot.current)
