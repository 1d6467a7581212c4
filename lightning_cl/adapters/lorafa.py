"""LoRA with a frozen factor A (Zhang et al. 2023, arXiv:2308.03303; Zhu et al. 2024, arXiv:2402.16842)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_cl.adapters.slot import Slot
from lightning_cl.adapters.slots import AdapterSlots
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_choice
from lightning_cl.core.rng import derived_seed
from lightning_cl.functional.lorafa import orthonormal_rows

__all__ = ["LoRAFA"]


class LoRAFA(AdapterSlots):
    r"""Train the factor B of an adapter only; A stays as it was drawn.

    With one A for all tasks, ``shared``, what tasks learn adds up exactly in the past slot's factor of the present
    rank,

    .. math:: W + s \sum_t B_t A = W + s \Big( \sum_t B_t \Big) A,

    so nothing grows with their number. All tasks then move the weights in the same r directions of the inputs. Frozen
    means without ``requires_grad`` from before the strategy wraps the module, whatever PEFT is asked to do in between:
    A takes neither gradients nor moments, and a layer keeps r numbers for each token for its backward pass in the place
    of its input.

    Args:
        init: ``"orthogonal"`` draws A with orthonormal rows, as Zhu et al. do. ``"kaiming"`` is LoRA's own start: the
            first task keeps the A that the module has.
        shared: One A for all tasks. Otherwise each draws its own, and finished tasks lie beside one another in the past
            slot.
        capacity: Without ``shared``, the rank of the slot for finished tasks: tasks times r for an exact sum; 64 if
            ``None``. With ``shared`` it is r.
        seed: Seed of the factors A.

    Raises:
        ValueError: As :class:`AdapterSlots`; for ``capacity`` with ``shared``; at the start of the first task for
            ``"orthogonal"`` where an adapter is trained already, or has more ranks than its layer has inputs.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="lora-fa",
        family="adapters",
        paper="Zhang et al. 2023, arXiv:2308.03303",
        needs="a PEFT model with LoRA",
        state="r ranks for each adapted layer, in the module",
    )
    starts_first: ClassVar[bool] = True
    starts_itself: ClassVar[bool] = True

    def __init__(
        self,
        init: Literal["orthogonal", "kaiming"] = "orthogonal",
        *,
        shared: bool = True,
        capacity: int | None = None,
        seed: int = 0,
    ) -> None:
        check_choice("init", init, ("orthogonal", "kaiming"))
        if shared and capacity is not None:
            raise ValueError(
                f"`capacity={capacity}` belongs to `shared=False`: with one A for all tasks their sum has the rank of"
                " the adapter."
            )
        super().__init__(64 if capacity is None else capacity, seed=seed)
        self.init = init
        self.shared = shared

    @override
    def trains(self, slot: Slot) -> set[str]:
        return {"lora_B"}

    @override
    def past_rank(self, rank: int) -> int:
        return rank if self.shared else self.capacity

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule, slot: Slot, task_index: int) -> tuple[Tensor, Tensor]:
        down, up = slot.factors(slot.current)
        first = not self.segments[slot.name][-1]
        if first and self.init == "kaiming":
            return down, up
        if first and up.any():
            raise ValueError(
                f"The adapter of {slot.name!r} is trained already, and `LoRAFA(init='orthogonal')` would draw its A"
                " anew. Use `init='kaiming'`, which keeps it, or begin with a fresh adapter."
            )
        if self.shared and not first:
            return down, torch.zeros_like(up)
        if self.init == "kaiming":
            return super().start(trainer, pl_module, slot, task_index)
        rank, features = down.shape
        if rank > features:
            raise ValueError(
                f"`LoRAFA(init='orthogonal')` draws orthonormal rows, but the adapter of {slot.name!r} has rank {rank}"
                f" on {features} inputs. Lower the rank, or use `init='kaiming'`."
            )
        generator = torch.Generator().manual_seed(derived_seed("lora-fa", self.seed, slot.name, task_index))
        return orthonormal_rows(rank, features, generator).to(down.device), torch.zeros_like(up)

    @override
    def absorb(self, slot: Slot, down: Tensor, up: Tensor, *, extends: bool = False) -> None:
        if not self.shared:
            super().absorb(slot, down, up, extends=extends)
            return
        # of the largest rank of all layers
        past_down, past_up = slot.weights(slot.past)
        past_down[: len(down)] = down
        past_up[:, : len(down)] += up
        slot.write(slot.past, past_down, past_up)
        self.segments[slot.name] = [0, len(down)]
