"""New blocks in a frozen network (LLaMA Pro, Wu et al. 2024, arXiv:2401.02415)."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from typing_extensions import override

from lightning_cl.adapters.blocks import insert_blocks, inserted_blocks
from lightning_cl.core.callback import ContinualCallback
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_count
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
        if isinstance(trainable, str):
            raise ValueError(f"`trainable` must be a list of patterns, such as {[trainable]}, got {trainable!r}.")
        self.count = count
        self.trainable = trainable
        self.network = network
        self._frozen: list[str] = []

    @override
    def prepare_module(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not inserted_blocks(pl_module):
            insert_blocks(self._network(pl_module), self.count)
        if stage == "fit":
            train = self._trained(pl_module)
            self._frozen = [n for n, p in pl_module.named_parameters() if p.requires_grad and n not in train]
            self._set_frozen(pl_module, frozen=True)

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
        for pattern in self.trainable or ():
            matched = {name for name in names if fnmatchcase(name, pattern)}
            if not matched:
                raise ValueError(
                    f"`trainable` pattern {pattern!r} matches no parameter of {type(pl_module).__name__}. Its names"
                    f" look like {names[:3]}."
                )
            found |= matched
        return found

    def _set_frozen(self, pl_module: LightningModule, *, frozen: bool) -> None:
        names = set(self._frozen)
        for name, parameter in pl_module.named_parameters():
            if name in names:
                parameter.requires_grad_(not frozen)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_trainable(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._set_frozen(pl_module, frozen=False)
        self._frozen = []

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning calls no teardown then
        self.teardown(trainer, pl_module, "fit")
