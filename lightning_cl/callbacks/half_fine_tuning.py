"""Half fine-tuning (Hui et al. 2024, arXiv:2404.18466)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_cl.callbacks.layers import find_blocks, is_norm
from lightning_cl.callbacks.partial import PartialUpdate
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_choice
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.update import OptimizerStep
from lightning_cl.functional.masks import half_of_each

__all__ = ["HalfFineTuning"]


class HalfFineTuning(PartialUpdate):
    r"""Freeze half of the layers of every block, another half in every round.

    .. math:: \vartheta^t \leftarrow \vartheta^{t-1} - \eta \nabla_\vartheta \mathcal{L}(\theta^{t-1}), \qquad
        \psi^t \leftarrow \psi^{t-1}, \qquad \theta = \{\vartheta, \psi\}.

    The half :math:`\psi` is drawn in each block by category: two of the four matrices of attention; one of the three of
    the feed-forward network in a random half of the blocks and two in the others; half of the normalisations, all
    blocks together. A layer's bias goes with its weight. What lies outside of the blocks, embeddings and head, trains.

    A round's choice is a pure function of ``seed`` and the round's number: the same on all ranks and after a resume.

    Args:
        round: What a round is: a ``"task"`` or an ``"epoch"``.
        blocks: Patterns (as in :mod:`fnmatch`) of the blocks' names. ``None``: the blocks of a Hugging Face model, else
            the members of lists of equal modules, else every layer is a block, of which half are frozen.
        seed: Seed of the choices.
        from_task: The first task, counted from 0, in which layers are frozen.
        include: Patterns of the parameters to choose from; all trainable ones if ``None``.
        exclude: Patterns of parameters that always train.

    Attributes:
        frozen: Names of the parameters that the present round freezes.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for a pattern that matches nothing.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="hft",
        family="partial update",
        paper="Hui et al. 2024, arXiv:2404.18466",
        needs="nothing",
        state="the round's number",
    )
    whole_tensors: ClassVar[bool] = True

    def __init__(
        self,
        *,
        round: Literal["task", "epoch"] = "task",
        blocks: list[str] | None = None,
        seed: int = 0,
        from_task: int = 0,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
    ) -> None:
        super().__init__(include=include, exclude=exclude, from_task=from_task)
        check_choice("round", round, ("task", "epoch"))
        self.round = round
        self.blocks = blocks
        self.seed = seed
        if round == "task":
            self.boundaries = "required"  # type: ignore[misc]
        self.frozen: set[str] = set()
        self._chosen_for: tuple[int, int] | None = None
        # category -> block -> layer -> parameters
        self._categories: dict[str, dict[str, dict[str, list[str]]]] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._categories, self._chosen_for = {}, None
        for block_name, layers in find_blocks(pl_module, self.blocks).items():
            for layer_name, layer in layers.items():
                owned = [name for name, _ in layer.named_parameters(prefix=layer_name, recurse=False)]
                if names := [name for name in owned if name in self.parameters]:
                    category = _category(layer_name.removeprefix(block_name), layer)
                    self._categories.setdefault(category, {}).setdefault(block_name, {})[layer_name] = names

    @override
    def movability(
        self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep
    ) -> Mapping[str, float | Tensor]:
        # epochs count from 0 in each fit of one task, and on in one fit of many
        number = (self._task, trainer.current_epoch if self.round == "epoch" else 0)
        if number != self._chosen_for:
            self.frozen, self._chosen_for = self._choose(*number), number
        return {name: 0.0 for name in step.parameters if name in self.frozen}

    def _choose(self, task: int, epoch: int) -> set[str]:
        frozen: set[str] = set()
        for category, blocks in self._categories.items():
            generator = torch.Generator().manual_seed(derived_seed("half", self.seed, task, epoch, category))
            chosen = half_of_each([len(layers) for layers in blocks.values()], generator)
            for layers, positions in zip(blocks.values(), chosen, strict=True):
                members = list(layers.values())
                frozen.update(name for position in positions for name in members[position])
        return frozen


def _category(path: str, layer: nn.Module) -> str:
    """Return what a layer of a block is, from its path in it: attention, a normalisation, or the rest."""
    if is_norm(layer):
        return "norm"
    return "attention" if "attn" in path.lower() or "attention" in path.lower() else "feed-forward"
