"""One rank's memory in a training step, found by running the step on tensors without values.

The ranks are those of torch's fake process group, which hands out memory and moves nothing. The strategy shards the
module as it would for training, so that units, padding, gathered weights and the gradients on their way are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_cl.cli.fakes import AllDistinct, build_module, faked, give_fakes, values_of_masks
from lightning_cl.core.callback import ContinualCallback, continual_callbacks
from lightning_cl.core.capture import forward_loss, silenced
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.live_bytes import LiveBytes
from lightning_cl.core.state import local
from lightning_cl.quantization.layers import quantized_layers, state_tensors
from lightning_cl.strategies import FSDP2Strategy
from lightning_cl.strategies.sharding import is_sharded

__all__ = ["RankMemory", "simulate"]


@dataclass
class RankMemory:
    """Bytes on the rank with most of them, by part.

    Attributes:
        device: On the device that computes.
        host: In the memory of the machine.
        disk: In files.
        notes: What is not known, and why.
    """

    device: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def simulate(trainer: Trainer, module: LightningModule, read_batch: Callable[[], Any]) -> RankMemory:
    """Return what a rank needs to train ``module`` with the Trainer's strategy, optimizers and methods.

    Args:
        trainer: A Trainer for CPUs, with the data attached, on :func:`~lightning_cl.cli.fakes.fake_ranks`.
        module: It is useless afterwards: its weights have no values.
        read_batch: Sets the data up and returns the batch of a rank, as the loader's reaches the callbacks.

    Raises:
        ValueError: For a strategy that is not ``fsdp2``, ``ddp`` or one device; for what the strategy refuses.
    """
    strategy: Any = trainer.strategy
    shards = isinstance(strategy, FSDP2Strategy)
    if not (shards or isinstance(strategy, (DDPStrategy, SingleDeviceStrategy))):
        raise ValueError(
            f"`lightning-cl plan` knows the strategies `fsdp2`, `ddp` and one device, got {type(strategy).__name__}."
        )
    offload = shards and strategy.cpu_offload
    if offload:
        strategy.cpu_offload = False  # there is no device to offload from
    strategy.connect(module)
    strategy.setup_environment()
    batch = read_batch()
    build_module(trainer, module)
    for callback in continual_callbacks(trainer):
        callback.prepare_module(trainer, module, "fit")
    if is_sharded(module):
        raise ValueError(f"{type(module).__name__} shards itself, which `lightning-cl plan` cannot follow.")
    if shards:
        strategy.shard_mesh  # noqa: B018  # made of numbers that a tensor must hold
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    give_fakes(module, mode)
    with mode:
        strategy.precision_plugin.convert_module(module)
        if shards:
            strategy._shard()
        optimizers: list[Optimizer] = _init_optimizers_and_lr_schedulers(module)[0]
    with values_of_masks(module, batch), mode:
        return _Simulation(trainer, module, optimizers).run(tree_map(faked(mode), batch), offload=offload)


# ---------------------------------------------------------------------- the step


class _Simulation:
    """Steps of one rank; to be used where tensors have no values."""

    def __init__(self, trainer: Trainer, module: LightningModule, optimizers: list[Optimizer]) -> None:
        self.trainer = trainer
        self.module = module
        self.optimizers = optimizers

    def run(self, batch: Any, *, offload: bool) -> RankMemory:
        """Return what stays from step to step, and what a step and the end of a task take on top."""
        memory = RankMemory()
        footprints = _footprints(self.trainer, self.module, batch)
        trained = batch
        for footprint in footprints.values():
            if footprint is not None and footprint.batch is not None:
                trained = footprint.batch(trained)
        known = self._try(memory, "activations", lambda: self._pass(trained))
        for parameter in self.module.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._optimize()
        kept = self._kept()
        parts = {name: _bytes(tensors) for name, tensors in kept.items()}
        (memory.host if offload else memory.device).update(parts)
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("gradient_as_bucket_view"):
            memory.device["gradients in DDP's buckets"] = parts["gradients"]
        step = 0
        if known:
            # what the first step made is there now, as in all later ones
            live = LiveBytes(_all(kept))
            # the gradients of the last step go when the optimizers let go of them
            del kept
            with live:
                self._pass(trained)
                self._optimize()
            step = live.peak - sum(parts.values())
            saved = live.largest["saved"]
            # at the peak a part of the gradients may be still to come
            gathered = min(live.largest["gathered"], step - saved)
            step_parts = {
                "activations": saved,
                "gathered weights": gathered,
                "temporary results": step - saved - gathered,
            }
            memory.device |= {name: size for name, size in step_parts.items() if size}
        _add_footprints(memory, footprints)
        if known:
            self._add_task_ends(memory, footprints, step)
        return memory

    def _add_task_ends(self, memory: RankMemory, footprints: Mapping[str, Footprint | None], step: int) -> None:
        """Add what the most demanding end of a task takes more than a step."""
        most, which = step, ""
        for name, footprint in footprints.items():
            if footprint is None or footprint.task_end is None:
                continue
            end = footprint.task_end
            kept = self._kept()
            with LiveBytes(_all(kept), tell_saved=False) as live, AllDistinct():
                if not self._try(memory, f"{name} at a task's end", end):
                    continue
            taken = live.peak - _bytes(_all(kept))
            if taken > most:
                most, which = taken, name
        if which:
            memory.device[f"{which} at a task's end"] = most - step

    def _try(self, memory: RankMemory, what: str, act: Callable[[], Any]) -> bool:
        """Do what may need values; where it does, note that its memory is not known."""
        try:
            act()
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            memory.notes.append(
                f"{what}: not known, because {type(self.module).__name__} does not run on tensors without values"
                f" ({type(error).__name__}: {first})"
            )
            return False
        return True

    def _pass(self, batch: Any) -> None:
        """Run forward and backward in Lightning's order: gradients live until the forward is done."""
        with silenced(self.module), self.trainer.precision_plugin.train_step_context():
            loss = forward_loss(self.module, batch)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()

    def _optimize(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def _kept(self) -> dict[str, list[Tensor]]:
        """Return the tensors that live from step to step, by part."""
        packed = [layer for _, layer in quantized_layers(self.module)]
        packed_weights = {id(layer.weight) for layer in packed}
        adapted = any(type(part).__module__.startswith("peft.") for part in self.module.modules())
        parameters = [p for p in self.module.parameters() if id(p) not in packed_weights]
        states = [value for o in self.optimizers for state in o.state.values() for value in state.values()]
        parts: dict[str, list[Any]] = {
            "weights": [p for p in parameters if not (adapted and p.requires_grad)],
            "quantized weights": [layer.weight for layer in packed],
            "quantization state": [tensor for layer in packed for tensor in state_tensors(layer)],
            "adapters": [p for p in parameters if adapted and p.requires_grad],
            "buffers": list(self.module.buffers()),
            "gradients": [p.grad for p in parameters if p.grad is not None],
            "optimizer": [value for value in states if isinstance(value, Tensor)],
        }
        return {name: tensors for name, tensors in parts.items() if tensors or name == "gradients"}


def _all(kept: Mapping[str, list[Tensor]]) -> list[Tensor]:
    return [tensor for tensors in kept.values() for tensor in tensors]


def _bytes(tensors: Iterable[Any]) -> int:
    storages = {id(storage): storage for storage in (local(tensor).untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


# ---------------------------------------------------------------------- the methods


def _footprints(trainer: Trainer, module: LightningModule, batch: Any) -> dict[str, Footprint | None]:
    """Return what each method says of itself, ``None`` if it says nothing."""
    found: dict[str, Footprint | None] = {}
    for callback in continual_callbacks(trainer):
        declares = type(callback).footprint is not ContinualCallback.footprint
        if declares or getattr(type(callback), "card", None) is not None:
            name = _free_name(type(callback).__name__, found)
            found[name] = callback.footprint(trainer, module, batch) if declares else None
    return found


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    count = sum(other.partition(" ")[0] == name for other in taken)
    return name if count == 0 else f"{name} {count + 1}"


def _add_footprints(memory: RankMemory, footprints: Mapping[str, Footprint | None]) -> None:
    for name, footprint in footprints.items():
        if footprint is None:
            memory.notes.append(f"{name}: not known, because it has no `footprint`")
            continue
        places = ((memory.device, footprint.device), (memory.host, footprint.host), (memory.disk, footprint.disk))
        for place, size in places:
            if size:
                place[name] = size
