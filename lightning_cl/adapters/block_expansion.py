"""New blocks in a frozen network (LLaMA Pro, Wu et al. 2024, arXiv:2401.02415)."""

from __future__ import annotations

from typing import ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from typing_extensions import override

from lightning_cl.adapters.blocks import insert_blocks, inserted_blocks
from lightning_cl.core.callback import ContinualCallback
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_count, check_patterns, match_parameters
from lightning_cl.core.freezing import FrozenForFit
from lightning_cl.core.reduction import check_trainable

__all__ = ["BlockExpansion"]


class BlockExpansion(ContinualCallback):
    """Insert blocks that change nothing yet into the module's network, and train only these.

    The network's blocks are put into groups, and behind each group comes a copy of its last block with output
    projections of zero (:func:`~lightning_cl.adapters.insert_blocks`), so that the network computes the same to the bit
    until the first step. All else is frozen for the time of a fit, from before the strategy wraps the module and the
    optimizer is built.

    A module that has such blocks, from a fit before or from its own ``__init__``, gets no more. They stay in the module
    after the fit. To load its checkpoint without a Trainer, call :func:`insert_blocks` before.

    Args:
        count: New blocks, spread evenly over the depth; 8 for 32 blocks in the paper.
        trainable: Patterns (as in :mod:`fnmatch`) of parameters that train beside the new blocks, such as
            ``"*lm_head*"``.
        network: Name of the submodule to grow; the first model of transformers in the module if ``None``.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for a network that blocks cannot be inserted into,
            a pattern that matches nothing, and a new block that no optimizer steps.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="block-expansion",
        family="adapters",
        paper="Wu et al. 2024, arXiv:2401.02415",
        needs="a network of blocks that add to their input, such as Llama or GPT-2",
        state="nothing",
    )
    boundaries: ClassVar[Literal["required", "unused", "evaluation"]] = "unused"
    needs_state: ClassVar[bool] = False

    def __init__(self, count: int, *, trainable: list[str] | None = None, network: str | None = None) -> None:
        check_count("count", count)
        check_patterns("trainable", trainable)
        self.count = count
        self.trainable = trainable
        self.network = network
        self._frozen = FrozenForFit()

    @override
    def prepare_module(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not inserted_blocks(pl_module):
            insert_blocks(self._network(pl_module), self.count)
        if stage == "fit":
            names = {name for name, _ in pl_module.named_parameters()}
            self._frozen.freeze(pl_module, names - self._trained(pl_module))

    def _network(self, pl_module: LightningModule) -> nn.Module:
        if self.network is not None:
            known: dict[str, nn.Module] = dict(pl_module.named_modules())
            if self.network not in known:
                raise ValueError(
                    f"`network={self.network!r}` names no submodule of {type(pl_module).__name__}; its children are"
                    f" {[name for name, _ in pl_module.named_children()]}."
                )
            return known[self.network]
        for module in pl_module.modules():
            if hasattr(module, "dummy_inputs"):
                return module
        raise ValueError(
            f"{type(pl_module).__name__} has no model of transformers. Call `insert_blocks(network, {self.count},"
            " example=...)` in its `__init__`, and this callback trains what that inserted."
        )

    def _trained(self, pl_module: LightningModule) -> set[str]:
        names = [name for name, _ in pl_module.named_parameters()]
        blocks = tuple(f"{block}." for block in inserted_blocks(pl_module))
        found = {name for name in names if name.startswith(blocks)}
        return found | match_parameters(pl_module, "trainable", self.trainable)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_trainable(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._frozen.thaw(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning calls no teardown then
        self.teardown(trainer, pl_module, "fit")
