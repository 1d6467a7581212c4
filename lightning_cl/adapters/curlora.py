"""Updates within columns and rows of the base weight (CURLoRA, Fawi 2024, arXiv:2408.14572)."""

from __future__ import annotations

from typing import ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_cl.adapters.slot import Slot
from lightning_cl.adapters.slots import AdapterSlots
from lightning_cl.core.card import MethodCard
from lightning_cl.core.rng import derived_seed
from lightning_cl.functional.curlora import sample_columns_and_rows

__all__ = ["CURLoRA"]


class CURLoRA(AdapterSlots):
    r"""Learn every task by a small matrix between columns and rows of the base weight that matter little to it.

    .. math:: h = W x + s \, C U R \, x,

    with r columns C and r rows R of W, drawn for each task with probabilities inverse to their squared norms and kept
    as they are, and :math:`U`, ``[r, r]``, trained from 0: :math:`r^2` trained numbers in a layer.

    Args:
        capacity: Rank of the slot for finished tasks.
        seed: Seed of the draws.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for a base weight with fewer than r columns or
            rows that are not 0, and as :class:`~lightning_cl.adapters.AdapterSlots`.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="curlora",
        family="adapters",
        paper="Fawi 2024, arXiv:2408.14572",
        needs="a PEFT model with LoRA",
        state="capacity ranks for each adapted layer, in the module",
    )
    starts_first: ClassVar[bool] = True
    starts_itself: ClassVar[bool] = True

    @override
    def extend(self, slot: Slot) -> None:
        rank = slot.rank(slot.current)
        slot.add_mixing(slot.current, torch.zeros(rank, rank))

    @override
    def trains(self, slot: Slot) -> set[str]:
        return {"mixing"}

    @override
    def start(self, trainer: Trainer, pl_module: LightningModule, slot: Slot, task_index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(derived_seed("cur", self.seed, slot.name, task_index))
        try:
            return sample_columns_and_rows(slot.base_weight(), slot.rank(slot.current), generator)
        except ValueError as error:
            raise ValueError(
                f"`CURLoRA` cannot start in {slot.name!r}: {error} Lower the rank `r` of the adapters, or leave the"
                " layer out of `target_modules`."
            ) from None
