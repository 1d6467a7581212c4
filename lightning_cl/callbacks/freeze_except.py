"""Training of a few parameters only: normalisations, the last blocks, or what patterns name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_cl.callbacks.layers import find_blocks, is_norm
from lightning_cl.callbacks.partial import PartialUpdate
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_patterns, match_parameters
from lightning_cl.core.freezing import FrozenForFit
from lightning_cl.core.update import OptimizerStep

__all__ = ["FreezeExcept"]


class FreezeExcept(PartialUpdate):
    r"""Train the parameters that are named and hold all others.

    From the first task on, the others are frozen for real: ``requires_grad`` is off from before the strategy wraps the
    module and the optimizer is built until the end of the fit, so that they take neither gradients nor moments nor a
    backward pass of their own. From a later task on they are held step by step, since DDP cannot change in the middle
    of a fit what it reduces.

    Args:
        trainable: Patterns (as in :mod:`fnmatch`) of parameters that train, such as ``"*.head.*"`` or ``"*.bias"``.
        norms: Let the weights of normalisations train: those of torch and every class named ``...Norm``.
        last_blocks: Let this many of the last blocks train.
        blocks: Patterns of the blocks' names. ``None``: the blocks of a Hugging Face model, else the members of lists
            of equal modules, else every layer is a block.
        from_task: The first task, counted from 0, in which the others are held.

    Raises:
        ValueError: If nothing is named or a setting is out of range; at the start of a fit for a pattern that matches
            nothing, and for ``norms`` or ``last_blocks`` that the module has not.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="freeze-except",
        family="partial update",
        paper="Frankle et al. 2021, arXiv:2003.00152 (normalisations)",
        needs="nothing",
        state="nothing",
    )
    whole_tensors: ClassVar[bool] = True

    def __init__(
        self,
        trainable: list[str] | None = None,
        *,
        norms: bool = False,
        last_blocks: int = 0,
        blocks: list[str] | None = None,
        from_task: int = 0,
    ) -> None:
        super().__init__(from_task=from_task)
        check_patterns("trainable", trainable)
        if not isinstance(last_blocks, int) or last_blocks < 0:
            raise ValueError(f"`last_blocks` must be a number of blocks, 0 or above, got {last_blocks!r}.")
        if not trainable and not norms and not last_blocks:
            raise ValueError(
                "`FreezeExcept` would hold everything: name what trains by `trainable`, `norms` or `last_blocks`."
            )
        if blocks is not None and not last_blocks:
            raise ValueError(f"`blocks={blocks}` belongs to `last_blocks`, which is 0.")
        self.trainable = trainable
        self.norms = norms
        self.last_blocks = last_blocks
        self.blocks = blocks
        self._held: set[str] = set()
        self._frozen = FrozenForFit()

    # ------------------------------------------------------------------ freezing for a whole fit

    @override
    def prepare_module(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not self.from_task:
            names = {name for name, _ in pl_module.named_parameters()}
            self._frozen.freeze(pl_module, names - self._named(pl_module))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._frozen.thaw(pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning calls no teardown then
        self.teardown(trainer, pl_module, "fit")

    # ------------------------------------------------------------------ holding from a task on

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._held = self.parameters.keys() - self._named(pl_module)

    @override
    def movability(
        self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep
    ) -> Mapping[str, float | Tensor]:
        return {name: 0.0 for name in step.parameters if name in self._held}

    def _named(self, pl_module: LightningModule) -> set[str]:
        """Return the parameters that are to train."""
        found = match_parameters(pl_module, "trainable", self.trainable)
        if self.norms:
            norms = [(path, module) for path, module in pl_module.named_modules() if is_norm(module)]
            named = {name for path, norm in norms for name, _ in norm.named_parameters(prefix=path)}
            if not named:
                raise ValueError(f"`norms=True`, but {type(pl_module).__name__} has no normalisation with weights.")
            found |= named
        if self.last_blocks:
            blocks = list(find_blocks(pl_module, self.blocks).values())
            if len(blocks) < self.last_blocks:
                raise ValueError(
                    f"`last_blocks={self.last_blocks}`, but {type(pl_module).__name__} has {len(blocks)} blocks."
                )
            layers = [item for block in blocks[-self.last_blocks :] for item in block.items()]
            found |= {n for path, layer in layers for n, _ in layer.named_parameters(prefix=path, recurse=False)}
        return found
