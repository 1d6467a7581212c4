"""Training of the most sensitive blocks only (IRepair, Imtiaz et al. 2025, arXiv:2502.07072)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_cl.callbacks.layers import find_blocks
from lightning_cl.callbacks.partial import PartialUpdate
from lightning_cl.core.card import MethodCard
from lightning_cl.core.state import local, sum_rows_over_shards
from lightning_cl.core.update import OptimizerStep

__all__ = ["SalientLayers"]


class SalientLayers(PartialUpdate):
    r"""Train only the blocks that the data of the step asks to change most, chosen anew as training goes on.

    A block's sensitivity is the norm of the task's gradient over all of its parameters,

    .. math:: S_b = \sqrt{\sum_{\theta \in b} \lVert \nabla_\theta \mathcal{L} \rVert_2^2},

    over all ranks and micro-batches of the step and before any callback adds to it. The ``num_blocks`` blocks with the
    largest train; everything else is held, embeddings and head too, unless ``exclude`` names them. Several optimizers
    choose among the blocks that they step.

    Args:
        num_blocks: Blocks that train at a time; the paper trains one.
        every_n_steps: Optimizer steps from one choice to the next; the paper chooses in every one.
        blocks: Patterns (as in :mod:`fnmatch`) of the blocks' names. ``None``: the blocks of a Hugging Face model, else
            the members of lists of equal modules, else every layer is a block.
        from_task: The first task, counted from 0, in which blocks are chosen.
        include: Patterns of the parameters that the choice is about; all trainable ones if ``None``.
        exclude: Patterns of parameters that always train, such as ``"*head*"``.

    Attributes:
        chosen: Names of the blocks that train, by the number of the optimizer.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for a pattern that matches nothing, and for fewer
            blocks than ``num_blocks``.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="salient-layers",
        family="partial update",
        paper="Imtiaz et al. 2025, arXiv:2502.07072",
        needs="nothing",
        state="names of blocks",
    )
    whole_tensors: ClassVar[bool] = True

    def __init__(
        self,
        num_blocks: int = 1,
        *,
        every_n_steps: int = 1,
        blocks: list[str] | None = None,
        from_task: int = 0,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
    ) -> None:
        super().__init__(include=include, exclude=exclude, from_task=from_task)
        for name, value in (("num_blocks", num_blocks), ("every_n_steps", every_n_steps)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a number above 0, got {value!r}.")
        self.num_blocks = num_blocks
        self.every_n_steps = every_n_steps
        self.blocks = blocks
        self.chosen: dict[int, list[str]] = {}
        self._taken: dict[int, int] = {}
        self._block_of: dict[str, str] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._block_of = {
            name: block
            for block, layers in find_blocks(pl_module, self.blocks).items()
            for path, layer in layers.items()
            for name, _ in layer.named_parameters(prefix=path, recurse=False)
            if name in self.parameters
        }
        if (found := len(set(self._block_of.values()))) < self.num_blocks:
            raise ValueError(
                f"`num_blocks={self.num_blocks}`, but {type(pl_module).__name__} has {found} blocks to choose from by"
                f" `blocks={self.blocks}`."
            )

    @override
    def observe_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        if not self.active:
            return
        number = trainer.optimizers.index(step.optimizer)
        taken = self._taken.get(number, 0)
        if taken % self.every_n_steps == 0:
            self.chosen[number] = self._most_sensitive(step)
        self._taken[number] = taken + 1

    def _most_sensitive(self, step: OptimizerStep) -> list[str]:
        named = [(n, p) for n, p in step.parameters.items() if n in self._block_of and p.grad is not None]
        if not named:
            return []
        gradients = [local(p.grad) for _, p in named if p.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients])
        squares = sum_rows_over_shards(norms.square(), [p for _, p in named])
        sensitivity: dict[str, float] = {}
        for (name, _), square in zip(named, squares.tolist(), strict=True):
            sensitivity[self._block_of[name]] = sensitivity.get(self._block_of[name], 0.0) + square
        # of equal ones the first in the network
        return sorted(sensitivity, key=lambda block: -sensitivity[block])[: self.num_blocks]

    @override
    def movability(
        self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep
    ) -> Mapping[str, float | Tensor]:
        chosen = self.chosen[trainer.optimizers.index(step.optimizer)]
        held = (name for name in step.parameters if name in self.parameters)
        return {name: 0.0 for name in held if self._block_of.get(name) not in chosen}

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "chosen": dict(self.chosen), "taken": dict(self._taken)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.chosen, self._taken = dict(state_dict["chosen"]), dict(state_dict["taken"])
