"""I-LoRA (Ren et al. 2024, "Analyzing and Reducing Catastrophic Forgetting in PEFT", arXiv:2402.18865)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import Unpack, override

from lightning_cl.callbacks.feature_distillation import features_last, first_tensor
from lightning_cl.callbacks.layers import find_blocks
from lightning_cl.callbacks.memory_settings import MemorySettings
from lightning_cl.callbacks.momentum_interpolation import MomentumInterpolation
from lightning_cl.callbacks.replay import ExperienceReplay
from lightning_cl.core.capture import OutputCapture, forward_step, undisturbed
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_positive
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.step import loss_of
from lightning_cl.functional.distillation import feature_distance
from lightning_cl.memory import Drawn

__all__ = ["ILoRA"]


class ILoRA(ExperienceReplay, MomentumInterpolation):
    r"""Train fast weights with replay, let slow ones follow, and hold the fast features of old samples near the slow.

    The fast weights (working memory) go on over all tasks. The slow ones (long-term memory) follow after each optimizer
    step, :math:`\theta_s \leftarrow \mu \, \theta_s + (1 - \mu) \, \theta_f`, and evaluate. With a draw :math:`B_M`
    from a memory of old samples the step minimises the module's own loss plus

    .. math:: \frac{w}{|B_M|} \sum_{x \in B_M} \ell(x) + \frac{\lambda}{L} \sum_{l=1}^{L}
        \frac{1}{|B_M| D_l} \sum_{x \in B_M} \left\| h_l(x; \theta_f) - h_l(x; \theta_s) \right\|^2

    over the L blocks of the network, a mean over positions that are no padding too, and over the calls of a block that
    a step calls several times. Only the fast features have a gradient. The slow ones are computed in evaluation mode.

    The method was made for LoRA: what is frozen has no slow copy, so both sets of weights are adapters on one base.
    It works on any trainable weights. Its adapters are never folded or started anew, so not beside ``AdapterSlots``.

    Args:
        capacity: Samples in memory, over all ranks together; or bytes, such as ``"512MiB"``. The paper keeps 500.
        decay: :math:`\mu`, above 0 and below 1. Slow weights average over about :math:`1 / (1 - \mu)` steps.
        strength: :math:`\lambda`; above 0.
        weight: w, of the loss on old samples; above 0.
        blocks: Patterns (as in :mod:`fnmatch`) of the blocks' names. ``None``: the blocks of a Hugging Face model, else
            the members of lists of equal modules, else every layer is a block.
        at_end: The weights that the module holds when a fit has ended. With ``"slow"`` the next fit trains on from
            them.
        **memory: Settings of the memory, see :class:`StoredSamples`.

    Raises:
        ValueError: For a setting out of range; at the start of a fit under manual optimization, and for a pattern that
            matches nothing; in the first step with a draw for a block that the step does not call.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="i-lora",
        family="adapters",
        paper="Ren et al. 2024, arXiv:2402.18865",
        needs="blocks with hidden states; automatic optimization; made for LoRA",
        state="capacity samples over all ranks; 1 float32 per trainable parameter",
    )

    def __init__(
        self,
        capacity: int | str,
        *,
        decay: float = 0.99,
        strength: float = 1.0,
        weight: float = 1.0,
        blocks: list[str] | None = None,
        at_end: Literal["fast", "slow"] = "fast",
        **memory: Unpack[MemorySettings],
    ) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"`decay` must be above 0 and below 1, got {decay!r}.")
        check_positive("strength", strength)
        # neither calls the other's
        MomentumInterpolation.__init__(self, decay, at_end=at_end)
        ExperienceReplay.__init__(self, capacity, mode="separate", weight=weight, **memory)
        self.decay = decay
        self.strength = strength
        self.blocks = blocks
        self._blocks: list[_Block] = []
        # of the present draw, for each block and call
        self._slow_features: list[list[Tensor]] = []
        # which positions of the present draw are no padding
        self._positions: Tensor | None = None

    # ------------------------------------------------------------------ set-up

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        MomentumInterpolation.on_train_start(self, trainer, pl_module)
        ExperienceReplay.on_train_start(self, trainer, pl_module)
        for name in find_blocks(pl_module, self.blocks):
            self._blocks.append(_Block(pl_module, name))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        MomentumInterpolation.on_train_batch_start(self, trainer, pl_module, batch, batch_idx)
        ExperienceReplay.on_train_batch_start(self, trainer, pl_module, batch, batch_idx)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for block in self._blocks:
            block.capture.__exit__()
        self._blocks = []
        MomentumInterpolation.teardown(self, trainer, pl_module, stage)
        ExperienceReplay.teardown(self, trainer, pl_module, stage)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning calls no teardown then
        self.teardown(trainer, pl_module, "fit")

    # ------------------------------------------------------------------ the step

    @contextmanager
    @override
    def around_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> Iterator[None]:
        # before the module computes anything: a gathered unit would go on with the weights that it was gathered with
        if self.must_rehearse(self._drawn):
            self._recall(pl_module, self._drawn, batch, batch_idx)
        with super().around_step(trainer, pl_module, batch, batch_idx):
            yield

    def _recall(self, pl_module: LightningModule, drawn: Drawn | None, like: Any, batch_idx: int) -> None:
        """Let the slow weights compute the features of a draw."""
        batch = like if drawn is None else self.as_batch(drawn, like)
        self._positions = self.adapter.padding_mask(batch)
        with (
            self._recording() as slow,
            undisturbed(pl_module, None, as_in_step=True),
            self._slow.in_place(pl_module),
        ):
            forward_step(pl_module, batch, batch_idx)
        self._slow_features = [[output.detach() for output in outputs] for outputs in slow]

    @contextmanager
    def _recording(self) -> Iterator[list[list[Tensor]]]:
        """Give what each block returns inside, call by call; it is there when the block has ended."""
        found: list[list[Tensor]] = []
        for block in self._blocks:
            block.capture.enabled = True
        try:
            yield found
            found += [block.outputs() for block in self._blocks]
        finally:
            for block in self._blocks:
                block.capture.enabled = False
                block.clear()

    @override
    def loss_term(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, outputs: Any
    ) -> Tensor | None:
        drawn, self._drawn = self._drawn, None
        if loss_of(outputs) is None or not self.must_rehearse(drawn):
            return None
        with self._recording() as fast:
            rehearsed = self.rehearse(pl_module, drawn, batch, batch_idx)
        slow, self._slow_features = self._slow_features, []
        distance = torch.stack([self._of_block(*outputs) for outputs in zip(fast, slow, strict=True)]).mean()
        return self.weight * rehearsed.loss + self.strength * rehearsed.share * distance

    def _of_block(self, fast: list[Tensor], slow: list[Tensor]) -> Tensor:
        if len(fast) != len(slow):
            raise ValueError(
                f"A block was called {len(fast)} times with the fast weights of `ILoRA`, and {len(slow)} times with the"
                " slow ones: their features are not compared call by call. Choose other `blocks`."
            )
        return torch.stack([self._distance(*outputs) for outputs in zip(fast, slow, strict=True)]).mean()

    def _distance(self, fast: Tensor, slow: Tensor) -> Tensor:
        fast, slow, mask = features_last(fast), features_last(slow), self._positions
        counted = mask if mask is not None and fast.ndim == 3 and fast.shape[:2] == mask.shape else None
        return feature_distance(fast, slow, positions=counted)

    # ------------------------------------------------------------------ memory and checkpoints

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        slow = MomentumInterpolation.footprint(self, trainer, pl_module, batch)
        kept = ExperienceReplay.footprint(self, trainer, pl_module, batch)
        return replace(kept, device=kept.device + slow.device)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"slow": MomentumInterpolation.state_dict(self), "memory": ExperienceReplay.state_dict(self)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        MomentumInterpolation.load_state_dict(self, state_dict["slow"])
        ExperienceReplay.load_state_dict(self, state_dict["memory"])


class _Block:
    """What a submodule returns, call by call."""

    def __init__(self, pl_module: LightningModule, name: str) -> None:
        self._outputs: list[Tensor] = []
        self.capture = OutputCapture(pl_module, name, self._read).__enter__()
        self.capture.enabled = False

    def _read(self, output: Any) -> Tensor | None:
        found = first_tensor(output)
        if found is not None:
            self._outputs.append(found)
        return found

    def outputs(self) -> list[Tensor]:
        """Return them; a submodule that was not called is an error."""
        _ = self.capture.output
        return self._outputs

    def clear(self) -> None:
        self._outputs = []
        self.capture.clear()
