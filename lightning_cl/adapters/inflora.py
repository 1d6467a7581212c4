"""InfLoRA (Liang & Li 2024, arXiv:2404.00228): adapters that see only what earlier tasks' inputs have no part in."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_cl.adapters.covariance import (
    by_identity,
    check_features,
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
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_count
from lightning_cl.core.events import TaskEvents
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.requests import Influence
from lightning_cl.core.shared_work import share_out
from lightning_cl.core.task import Task
from lightning_cl.functional.gpm import extend_basis
from lightning_cl.functional.inflora import leading_directions, memory_threshold
from lightning_cl.functional.subspaces import Subspace, exact_dtype

__all__ = ["InfLoRA"]


class InfLoRA(AdapterSlots):
    r"""Let every task's adapter see only directions of its inputs that earlier tasks' inputs have no part in.

    The memory M of a layer is an orthonormal basis of what the inputs of finished tasks span. Before task t, one pass
    over its data gives the covariance C of each layer's inputs, and A becomes

    .. math:: A = U_r^\top, \qquad (I - M M^\top) \, C \, (I - M M^\top) = U \Lambda U^\top,

    the r leading directions of the new inputs outside the memory. A is frozen and only B trains, from zero, so outputs
    on inputs in M stay: :math:`B A x = 0` for :math:`x \in M`. After the task, a second pass lets M grow (DualGPM) by
    the fewest leading directions of the inputs H outside of it, for which it holds the share

    .. math:: \epsilon_t = \epsilon_0 + (\epsilon_T - \epsilon_0) \, \frac{t}{T}, \qquad t = 0, 1, \ldots, T - 1,

    of their energy :math:`\| H \|_F^2`. Where M has more than half of the dimensions, a basis of the rest is kept.
    Layers that are called with the same tensor share C and M.

    Args:
        threshold: :math:`\epsilon_0`, above 0 and at most 1; higher forgets less and leaves less room.
        final_threshold: :math:`\epsilon_T`, from ``threshold`` to 1, which the last tasks come near to.
        n_tasks: T, where the data does not tell: with one ``fit`` per task. Not needed if both thresholds are equal.
        n_samples: Samples of a task to read in each of the two passes, over all ranks; the whole task if ``None``.
        batch_adapter: Reads batches of an uncommon structure.
        capacity: Rank of the slot for finished tasks, see :class:`AdapterSlots`.

    Attributes:
        memory: M by the name of the layer, from the end of the first task on.

    Raises:
        ValueError: For a setting out of range; at the start of a fit as :class:`AdapterSlots`, and for another model
            than the memory is of; at the start of a task if T is not known, for a step that calls none of the layers,
            and for an adapter that has been trained.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="inflora",
        family="adapters",
        paper="Liang & Li 2024, arXiv:2404.00228",
        needs="a PEFT model with LoRA",
        state="capacity ranks for each adapted layer, and up to d²/2 numbers for each different input of d features",
    )
    starts_itself: ClassVar[bool] = True

    def __init__(
        self,
        *,
        threshold: float = 0.95,
        final_threshold: float = 1.0,
        n_tasks: int | None = None,
        n_samples: int | None = None,
        batch_adapter: BatchAdapter | None = None,
        capacity: int = 64,
    ) -> None:
        super().__init__(capacity)
        if not 0 < threshold <= 1:
            raise ValueError(f"`threshold` must be above 0 and at most 1, got {threshold!r}.")
        if not threshold <= final_threshold <= 1:
            raise ValueError(f"`final_threshold` must be from `threshold={threshold}` to 1, got {final_threshold!r}.")
        for name, value in (("n_tasks", n_tasks), ("n_samples", n_samples)):
            if value is not None:
                check_count(name, value)
        self.threshold = threshold
        self.final_threshold = final_threshold
        self.n_tasks = n_tasks
        self.n_samples = n_samples
        self.adapter = batch_adapter or BatchAdapter()
        self.memory: dict[str, Subspace] = {}
        self._full: set[str] = set()

    @override
    def trains(self, slot: Slot) -> set[str]:
        return {"lora_B"}

    # ------------------------------------------------------------------ set-up

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not self.memory:
            return
        features = {name: subspace.matrix.shape[1] for name, subspace in self.memory.items()}
        check_features("InfLoRA", "memory", features, self.slots)
        moved = {id(subspace): self._on_device(subspace, pl_module.device) for subspace in self.memory.values()}
        self.memory = {name: moved[id(subspace)] for name, subspace in self.memory.items()}

    # ------------------------------------------------------------------ tasks

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().on_task_start(trainer, pl_module, task)
        # also what would be missed at the task's end
        self._threshold(trainer, task, self.completed_tasks)
        covariances = input_covariances(trainer, pl_module, self.slots, self.adapter, self.n_samples)

        def directions(names: list[str], covariance: Tensor) -> Tensor:
            rank = max(self.slots[name].rank(self.slots[name].current) for name in names)
            return leading_directions(self._basis(names[0], covariance), covariance, rank)

        groups = by_identity(covariances, self.memory)
        write_rows(self.slots, groups, lambda name: covariances[name], directions, "InfLoRA")

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._remember(trainer, pl_module, self._threshold(trainer, task, self.completed_tasks))
        super().on_task_end(trainer, pl_module, task)

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        found = super().renew_state(trainer, pl_module, task)
        if not self.memory:
            return found
        threshold = self._threshold(trainer, task, self.completed_tasks - 1)
        measure = partial(self._remember, trainer, pl_module, threshold)
        return [*found, measured_again(trainer, task, self, "the subspaces of inputs", self.memory.clear, measure)]

    def _remember(
        self, trainer: Trainer, pl_module: LightningModule, threshold: float, sample_ids: Tensor | None = None
    ) -> None:
        """Take the inputs that a task shows into the memory, or those of samples by their identities."""
        covariances = input_covariances(trainer, pl_module, self.slots, self.adapter, self.n_samples, sample_ids)
        members = {names[0]: names for names in by_identity(covariances, self.memory)}

        def extend(name: str, covariance: Tensor) -> Subspace:
            basis = extend_basis(self._basis(name, covariance), covariance, threshold)
            return self._on_device(Subspace.spanned_by([basis]), torch.device("cpu"))

        extended = share_out(list(members), lambda name: covariances[name], extend)
        self.memory = {}
        for first, subspace in extended.items():
            self.memory |= dict.fromkeys(members[first], self._on_device(subspace, pl_module.device))
        self._report()

    def _threshold(self, trainer: Trainer, task: Task, learned: int) -> float:
        """Return the threshold of the task before which so many were learned; requests are none of them."""
        coming = TaskEvents.attach(trainer).tasks_to_end(self)
        n_tasks = (task.num_tasks if coming is None else self.completed_tasks + coming) or self.n_tasks
        if self.threshold == self.final_threshold:
            return self.threshold
        if n_tasks is None:
            raise ValueError(
                f"`InfLoRA` raises its threshold from {self.threshold} to {self.final_threshold} over the tasks, and"
                " the data does not tell how many there are: give `n_tasks`, or the same `final_threshold`."
            )
        return memory_threshold(self.threshold, self.final_threshold, learned, n_tasks)

    def _basis(self, name: str, covariance: Tensor) -> Tensor:
        """Return M of a layer, ``[d, k]``."""
        if name not in self.memory:
            return covariance.new_zeros(len(covariance), 0, dtype=exact_dtype(covariance.device))
        return self.memory[name].bases()[0].to(covariance.device)

    @staticmethod
    def _on_device(subspace: Subspace, device: torch.device) -> Subspace:
        return subspace.to(torch.empty(0, device=device))

    def used(self) -> dict[str, float]:
        """Return the share of the input dimensions that the memory holds, by the name of the layer."""
        return {name: subspace.ranks()[0] / subspace.matrix.shape[1] for name, subspace in self.memory.items()}

    def _report(self) -> None:
        used = self.used()
        rank_zero_info(
            "`InfLoRA` keeps, of the input dimensions of each layer: "
            + ", ".join(f"{name} {share:.0%}" for name, share in used.items())
        )
        full = {name for name, share in used.items() if share == 1}
        new, self._full = sorted(full - self._full), full
        if new:
            rank_zero_warn(
                f"Old inputs span all dimensions of {new[:3]}: from now on these layers learn nothing. A lower"
                " `threshold` or `final_threshold` leaves room for new tasks."
            )

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        others = super().footprint(trainer, pl_module, batch)
        lengths = [slot.layer.in_features for slot in self.slots.values()]

        def bases() -> Any:
            return [torch.empty(1, d, d // 2, device=pl_module.device) for d in lengths]

        # at its largest, with half of the dimensions in each memory, as if no layers shared one
        kept = sum(length * (length // 2) * torch.float32.itemsize for length in lengths)
        collect = read_batch(pl_module, self.slots, self.adapter, batch, bases)
        return Footprint(device=others.device + kept, host=others.host, task_end=collect)

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        def save(subspace: Subspace) -> dict[str, Any]:
            return {"matrix": subspace.matrix.cpu().clone(), "complement": subspace.complement}

        return super().state_dict() | {"memory": saved_by_identity(self.memory, save)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def load(saved: dict[str, Any]) -> Subspace:
            # a copy, because the tensor may be mapped from a file
            return Subspace(torch.as_tensor(saved["matrix"]).clone(), saved["complement"])

        super().load_state_dict(state_dict)
        self.memory = loaded_by_identity(state_dict["memory"], load)
