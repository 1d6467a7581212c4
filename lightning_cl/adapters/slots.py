"""Adapters that learn task after task: one slot trains, another keeps what finished tasks left."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_cl.adapters.build import add_slots, peft_models
from lightning_cl.adapters.guard import SlotGuard
from lightning_cl.adapters.slot import PAST, Slot, SlotFactor
from lightning_cl.core.callback import ContinualCallback
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_count
from lightning_cl.core.distributed import copy_of_rank_zero_, max_over_ranks
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.reduction import check_still_trainable, check_trainable
from lightning_cl.core.requests import Influence
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.state import local, reshard
from lightning_cl.core.task import Task
from lightning_cl.functional.low_rank import truncate_factors
from lightning_cl.functional.reset_state import reset_state

__all__ = ["AdapterSlots"]

_VERSION = 1


class AdapterSlots(ContinualCallback):
    r"""Learn every task with a fresh LoRA adapter, and keep the sum of the finished ones in a second, frozen one.

    Each layer that the user's PEFT model adapts computes, with its present factors A, B of rank r and those of finished
    tasks, of rank ``capacity``,

    .. math:: h = W x + s \, B A x + s \, B_{past} A_{past} x.

    At a task's end A and B become the next free rows of :math:`A_{past}` and columns of :math:`B_{past}`, which changes
    no output; then A is drawn anew (uniform as PEFT's, from a seed of layer and task), B is zero, and the optimizer
    forgets its moments for them. When the capacity is used up, the sum of all is replaced by its best approximation of
    rank ``capacity`` (truncated SVD); the relative error is logged. Both slots are there before the strategy wraps the
    module, and parameters keep their names and objects: DDP, FSDP2 and checkpoints see a module that never changes.
    Nothing is merged into base weights, so they may be packed in 4 bits.

    Args:
        capacity: Rank of the slot for finished tasks: tasks times r for an exact sum.
        seed: Seed of the fresh adapters.

    Attributes:
        slots: The slots by the names of their layers, during a fit.
        segments: For each layer, where in the rank of its past slot the finished tasks lie: task i has the rows from
            the i-th number to the next. After an approximation all share one range.
        errors: For each layer, the relative error of its latest approximation.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for a module without LoRA adapters, for other
            variants than plain LoRA on linear layers, and beside callbacks that compare weights over tasks.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="adapter-slots",
        family="adapters",
        paper="Hu et al. 2022, arXiv:2106.09685 (LoRA)",
        needs="a PEFT model with LoRA",
        state="capacity ranks for each adapted layer, in the module",
    )
    boundaries: ClassVar[Literal["required", "unused", "evaluation"]] = "required"
    # whether `start` also gives the values that the first task begins with
    starts_first: ClassVar[bool] = False
    # whether the method chooses what a task begins with, so that `AdapterStart` may not
    starts_itself: ClassVar[bool] = False

    def __init__(self, capacity: int = 64, *, seed: int = 0) -> None:
        check_count("capacity", capacity)
        self.capacity = capacity
        self.seed = seed
        self.slots: dict[str, Slot] = {}
        self.segments: dict[str, list[int]] = {}
        self.errors: dict[str, float] = {}
        self._guard: SlotGuard | None = None
        self._loading: RemovableHandle | None = None
        self._trainable: set[str] = set()

    # ------------------------------------------------------------------ what a subclass says

    def extend(self, slot: Slot) -> None:
        """Add to a slot that is new what the method puts between its factors; before the strategy wraps the module."""

    def trains(self, slot: Slot) -> set[str]:
        """Return what of the present slot trains, of ``"lora_A"``, ``"lora_B"`` and ``"mixing"``."""
        return set(slot.parameters(slot.current))

    def trains_past(self, slot: Slot) -> set[str]:
        """Return what of the slot for finished tasks trains."""
        return set()

    def start(self, trainer: Trainer, pl_module: LightningModule, slot: Slot, task_index: int) -> tuple[Tensor, Tensor]:
        """Return whole factors ``[r, in]`` and ``[out, r]`` for a task to begin with, the same on all ranks.

        Called at the end of the task before.
        """
        down, up = slot.down(slot.current), slot.up(slot.current)
        generator = torch.Generator().manual_seed(derived_seed("slot", self.seed, slot.name, task_index))
        bound = down.in_features**-0.5
        first = torch.empty(down.weight.shape).uniform_(-bound, bound, generator=generator)
        return first.to(down.weight.device), torch.zeros(up.weight.shape, device=up.weight.device)

    def fold(self, slot: Slot) -> tuple[Tensor, Tensor]:
        """Return whole factors ``[r, in]`` and ``[out, r]`` of what the finished task leaves; r may be less, or 0."""
        return slot.factors(slot.current)

    def past_rank(self, rank: int) -> int:
        """Return the rank of the slot for finished tasks, given that of the present one."""
        return self.capacity

    def absorb(self, slot: Slot, down: Tensor, up: Tensor, *, extends: bool = False) -> None:
        """Put whole factors into the slot for finished tasks: behind what is there, or all of it compressed.

        Args:
            slot: The slots of a layer.
            down: ``[r, in]``.
            up: ``[out, r]``.
            extends: Whether they belong to the segment of the factors before them.
        """
        segments = self.segments[slot.name]
        used, rank = segments[-1], down.shape[0]
        past_down, past_up = slot.weights(slot.past)
        if used + rank <= len(past_down):
            past_down[used : used + rank], past_up[:, used : used + rank] = down, up
            segments[len(segments) - extends :] = [used + rank]
        else:
            both_down, both_up = torch.cat([past_down[:used], down]), torch.cat([past_up[:, :used], up], 1)
            past_down, past_up, error = truncate_factors(both_down, both_up, len(past_down))
            # a decomposition may differ in the last place between machines
            past_down, past_up = copy_of_rank_zero_(past_down), copy_of_rank_zero_(past_up)
            self.errors[slot.name] = error
            self.segments[slot.name] = [0, len(past_down)]
        slot.write(slot.past, past_down, past_up)

    # ------------------------------------------------------------------ set-up

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._refuse_neighbours(trainer)
        super().setup(trainer, pl_module, stage)

    @override
    def finds_network(self, pl_module: LightningModule) -> bool:
        return bool(peft_models(pl_module))

    def _refuse_neighbours(self, trainer: Trainer) -> None:
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            name = type(self).__name__
            if other is not self and isinstance(other, AdapterSlots):
                raise ValueError(f"`{name}` and `{type(other).__name__}` both fill the slots: use one of them.")
            if isinstance(other, (StochasticWeightAveraging, WeightAveraging)):
                raise ValueError(
                    f"`{type(other).__name__}` averages weights over tasks, and would put averages of several adapters"
                    f" in the place of those that `{name}` keeps: leave one of them out."
                )
            if isinstance(other, ContinualCallback) and other.compares_weights:
                raise ValueError(
                    f"`{type(other).__name__}` compares weights with those of earlier tasks, and `{name}` starts them"
                    " anew with every task: use one of them. A teacher that goes with slots is the one of the task"
                    " before (`teacher='previous'`) or the base model (`teacher='base'`)."
                )

    @override
    def prepare_module(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
            raise ValueError(
                f"`{type(self).__name__}` reads adapters layer by layer, and `{type(trainer.strategy).__name__}` puts"
                " parameters into one flat tensor. Use `strategy='fsdp2'`, or `'ddp'`."
            )
        self.slots = add_slots(pl_module, self.past_rank, type(self).__name__, self.extend)
        trained = {
            name: {slot.current: self.trains(slot), slot.past: self.trains_past(slot)}
            for name, slot in self.slots.items()
        }
        self._guard = SlotGuard(self.slots, trained)
        if stage == "fit" and not any(p.requires_grad for s in self.slots.values() for p in s.all_parameters()):
            raise ValueError(
                f"All adapters are frozen, and `{type(self).__name__}` would learn nothing. Load adapters by"
                " `PeftModel.from_pretrained(..., is_trainable=True)`, and leave what shall train trainable."
            )
        if isinstance(trainer.strategy, ModelParallelStrategy):
            # a folder of shards leaves out what is frozen and has not changed yet
            return
        # the module is loaded before the callbacks, and would say only that keys are missing
        hook = partial(_refuse_without_slots, type(self).__name__)
        self._loading = pl_module.register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._guard is not None:
            self._guard.detach()
        if self._loading is not None:
            self._loading.remove()
        self._guard, self._loading, self.slots = None, None, {}

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Lightning calls no teardown then
        self.teardown(trainer, pl_module, "fit")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reshard(pl_module)
        assert self._guard is not None
        self._guard.start_fit()
        self._trainable = check_trainable(trainer, pl_module)
        if self.segments and self.segments.keys() != self.slots.keys():
            other = sorted(self.segments.keys() ^ self.slots.keys())
            raise ValueError(
                f"`{type(self).__name__}` has learned with other adapted layers than the module has now, such as"
                f" {other[:3]}. Go on with the adapters of the run before."
            )

    # ------------------------------------------------------------------ tasks

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._check(pl_module)
        if not self.segments:
            self._refuse_tasks_of_others()
            self.segments = {name: [0] for name in self.slots}
            if self.starts_first:
                self.restart(trainer, pl_module, task.index)

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self._check(pl_module)
        self.finish(trainer, pl_module, task.index + 1)

    def finish(self, trainer: Trainer, pl_module: LightningModule, next_task: int) -> None:
        """Fold the present slot into the past one, and start it and its moments anew; all ranks must call this."""
        # a validation inside an epoch leaves whole weights in their place
        reshard(pl_module)
        self._refuse_non_finite(pl_module)
        self.errors = {}
        for slot in self.slots.values():
            self.absorb(slot, *self.fold(slot))
        self.tell_errors(trainer)
        self.restart(trainer, pl_module, next_task)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ContinualCallback):
                callback.on_weights_rewritten(trainer, pl_module)

    def tell_errors(self, trainer: Trainer) -> None:
        """Report the errors of approximations."""
        if not self.errors:
            return
        worst = max(self.errors.values())
        rank_zero_info(
            f"`{type(self).__name__}(capacity={self.capacity})` is full: finished tasks are kept with a relative error"
            f" of up to {worst:.2e} for a layer."
        )
        for logger in trainer.loggers:
            logger.log_metrics({"adapter_slots/error": worst}, step=trainer.global_step)

    def restart(self, trainer: Trainer, pl_module: LightningModule, task_index: int) -> None:
        """Give the present slots the values that a task begins with; the optimizers forget their moments for them."""
        started = []
        for slot in self.slots.values():
            slot.write(slot.current, *self.start(trainer, pl_module, slot, task_index))
            if isinstance(down := slot.down(slot.current), SlotFactor):
                down.start_mixing()
            started += list(slot.parameters(slot.current).values())
            past = slot.parameters(slot.past)
            started += [past[key] for key in sorted(self.trains_past(slot))]
        for parameter in started:
            parameter.grad = None
        for optimizer in trainer.optimizers:
            reset_state(optimizer, started)

    def _is_trained(self) -> bool:
        """Return whether a present slot changes an output; all ranks must call this."""
        return any([all(bool(part.any()) for part in slot.factors(slot.current)) for slot in self.slots.values()])

    def _refuse_non_finite(self, pl_module: LightningModule) -> None:
        """Refuse to keep for ever what a diverged task has left, before anything is written."""
        present = {name: slot.parameters(slot.current).values() for name, slot in self.slots.items()}
        bad = [
            name for name, parts in present.items() if not all(bool(local(p.detach()).isfinite().all()) for p in parts)
        ]
        if max_over_ranks(len(bad), pl_module.device):
            raise ValueError(
                f"The adapters of {bad[:3] or 'another rank'} hold values that are not finite at the end of their task:"
                " nothing was folded. Go back to a checkpoint before the loss diverged, with a lower learning rate or"
                " clipping."
            )

    def _refuse_tasks_of_others(self) -> None:
        for slot in self.slots.values():
            if bool(slot.weights(slot.past)[1].any()):
                raise ValueError(
                    f"The slot for finished tasks of {slot.name!r} holds some that this `{type(self).__name__}` knows"
                    " nothing of, and would write over. Go on with the callback of the fit before, or with its"
                    " checkpoint (`ckpt_path`)."
                )

    def _check(self, pl_module: LightningModule) -> None:
        assert self._guard is not None
        self._guard.check()
        for model in peft_models(pl_module):
            status = model.get_model_status()
            # a trained copy of a whole module has no part for the past slot, so layers differ in what is active
            if status.enabled is not True or status.merged_adapters:
                raise ValueError(
                    f"Not all of {type(model).__name__} computes with its adapters as they are: enabled is"
                    f" {status.enabled}, merged are {status.merged_adapters}. Call `enable_adapter_layers()` or"
                    " `unmerge_adapter()` on the PEFT model."
                )
        check_still_trainable(pl_module, self._trainable)

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        if self._is_trained():
            # what the request taught is kept, and the next task begins with an adapter as others do
            self.finish(trainer, pl_module, task.index + 1)
        if not any(len(segments) > 1 for segments in self.segments.values()):
            return []
        return [Influence(type(self).__name__, "factors of finished tasks, in the module", "remains")]

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        # the slots are weights of the module
        return Footprint()

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "segments": {name: list(offsets) for name, offsets in self.segments.items()},
            "errors": dict(self.errors),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["version"] != _VERSION:
            raise ValueError(
                f"The state of `{type(self).__name__}` has version {state_dict['version']}, and this release reads"
                f" {_VERSION}: go on with the release that wrote the checkpoint."
            )
        self.segments = {name: list(offsets) for name, offsets in state_dict["segments"].items()}
        self.errors = dict(state_dict["errors"])


def _refuse_without_slots(user: str, module: nn.Module, state_dict: Mapping[str, Any], *_: Any) -> None:
    if not any(f".{PAST}." in name for name in state_dict):
        raise ValueError(
            f"The checkpoint holds no state for {user}: it was written without adapter slots. To go on from its weights"
            " with slots, load them with `load_from_checkpoint` and fit without `ckpt_path`."
        )
