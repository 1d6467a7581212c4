"""A snapshot of a running fit in the memory of the machine, to return to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_cl.core.copies import persistent_buffers
from lightning_cl.core.state import local, reshard, shard

__all__ = ["Snapshot"]


@dataclass(frozen=True)
class _Sharding:
    """How a tensor, of which this rank has a part, lies over the ranks."""

    mesh: DeviceMesh
    placements: Any
    shape: torch.Size
    stride: tuple[int, ...]

    def whole(self, part: Tensor) -> DTensor:
        return DTensor.from_local(part, self.mesh, self.placements, shape=self.shape, stride=self.stride)


class Snapshot:
    """Trainable weights, persistent buffers and the state of an optimizer; of what is sharded, this rank's shards.

    It lies in the memory of the machine, page-locked where weights are on a GPU, and is written over by the next one.

    Args:
        owner: The callback, for errors.

    Attributes:
        step: The number that it was taken with, ``None`` while there is none.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self.step: int | None = None
        # the sections "weights" and "buffers", and for each parameter with a state its number in the optimizer
        self._kept: dict[str, dict[str, Any]] = {}
        self._shardings: dict[tuple[str, str], _Sharding] = {}
        self._restored = False

    @torch.no_grad()
    def take(self, pl_module: LightningModule, optimizer: Optimizer, step: int) -> None:
        """Copy what there is, outside of the module's forward.

        Args:
            pl_module: The module.
            optimizer: Its optimizer.
            step: A number to know the snapshot by.
        """
        reshard(pl_module)
        before = self._kept
        self._kept, self._shardings = {}, {}
        for section, values in _present(pl_module, optimizer):
            kept = before.get(section, {})
            self._kept[section] = {name: _on_host(value, kept.get(name)) for name, value in values.items()}
            for name, value in values.items():
                if isinstance(value, DTensor):
                    sharding = _Sharding(value.device_mesh, value.placements, value.shape, value.stride())
                    self._shardings[section, name] = sharding
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.step = step

    @torch.no_grad()
    def restore(self, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Bring weights, buffers and the optimizer's state back; its settings, such as the learning rate, stay."""
        reshard(pl_module)
        state = {}
        for section, values in self._kept.items():
            if section == "weights":
                _copy_into(_trainable(pl_module), values)
            elif section == "buffers":
                _copy_into(persistent_buffers(pl_module), values)
            else:
                # copies, because the optimizer goes on with what it is given
                state[int(section)] = self._given_out(section)
        groups = optimizer.state_dict()["param_groups"]
        # before there are two of it
        optimizer.state.clear()
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    def clear(self) -> None:
        """Forget it."""
        self.step, self._kept, self._shardings = None, {}, {}

    def num_bytes(self, pl_module: LightningModule) -> int:
        """Return what a snapshot takes on this rank, with the two moments of Adam for every trainable weight."""
        weights = sum(local(parameter).nbytes for parameter in _trainable(pl_module).values())
        return 3 * weights + sum(buffer.nbytes for buffer in persistent_buffers(pl_module).values())

    def state_dict(self) -> dict[str, Any]:
        """Return the snapshot, shards as DTensors."""
        return {"step": self.step, "kept": {section: self._given_out(section) for section in self._kept}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` returned; :meth:`place` brings it to its shards."""
        self.step, self._shardings, self._restored = state["step"], {}, True
        self._kept = {section: dict(values) for section, values in state["kept"].items()}

    def place(self, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Cut what was loaded to the shards of the module's parameters.

        Raises:
            ValueError: If the snapshot is of another model.
        """
        if not self._restored:
            return
        self._restored = False
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        weights: dict[str, Tensor] = {**_trainable(pl_module), **persistent_buffers(pl_module)}
        for section, values in self._kept.items():
            for name, value in values.items():
                like = weights.get(name) if section in ("weights", "buffers") else stepped[int(section)]
                if like is None or (section in ("weights", "buffers") and like.shape != value.shape):
                    raise ValueError(
                        f"The snapshot of `{self._owner}` has {name!r} of shape {tuple(value.shape)}, the module has"
                        " not. Go on with the model and the trainable parameters of the run before."
                    )
                if isinstance(value, Tensor):
                    values[name] = self._cut(section, name, value, like)

    def _cut(self, section: str, name: str, value: Tensor, like: Tensor) -> Any:
        if not value.dim():
            # a counter, the same on all ranks
            return _on_host(value, None)
        if isinstance(like, DTensor):
            self._shardings[section, name] = _Sharding(like.device_mesh, like.placements, value.shape, value.stride())
        return _on_host(shard(value, like), None)

    def _given_out(self, section: str) -> dict[str, Any]:
        """Return copies of a section's tensors, sharded as they were."""
        return {
            name: self._shardings[section, name].whole(value.clone())
            if (section, name) in self._shardings
            else value.clone()
            if isinstance(value, Tensor)
            else value
            for name, value in self._kept[section].items()
        }


def _present(pl_module: LightningModule, optimizer: Optimizer) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "weights", _trainable(pl_module)
    yield "buffers", dict(persistent_buffers(pl_module))
    for number, values in optimizer.state_dict()["state"].items():
        yield str(number), values


def _trainable(pl_module: LightningModule) -> dict[str, Any]:
    return {name: parameter for name, parameter in pl_module.named_parameters() if parameter.requires_grad}


def _copy_into(targets: dict[str, Any], values: dict[str, Any]) -> None:
    for name, target in targets.items():
        if name in values:
            local(target).copy_(values[name])


def _on_host(value: Any, kept: Any) -> Any:
    """Return a copy of this rank's part of a tensor in the memory of the machine, in that of ``kept`` if it fits."""
    if not isinstance(value, Tensor):
        return value
    part = local(value.detach())
    if kept is None or kept.shape != part.shape or kept.dtype != part.dtype:
        kept = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
    return kept.copy_(part, non_blocking=True)
