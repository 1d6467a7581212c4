"""A snapshot of a running fit in the memory of the machine, to return to."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from lightning_cl.core.copies import persistent_buffers
from lightning_cl.core.state import local, reshard, shard

__all__ = ["Snapshot"]


@dataclass(frozen=True)
class _Shard:
    """This rank's part of a tensor, and how the whole lies over the ranks."""

    part: Tensor
    mesh: DeviceMesh
    placements: Any
    shape: torch.Size
    stride: tuple[int, ...]

    @property
    def whole(self) -> DTensor:
        part = self.part.clone()
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
        # the sections "weights", "buffers" and "state", that of the optimizer, which may nest containers
        self._kept: dict[str, dict[Any, Any]] = {}
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
        # in the same order as long as the same is kept
        memory = iter([leaf.part if isinstance(leaf, _Shard) else leaf for leaf in tree_leaves(self._kept)])
        self._kept = tree_map(lambda leaf: _on_host(leaf, next(memory, None)), _present(pl_module, optimizer))
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.step = step

    @torch.no_grad()
    def restore(self, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Bring weights, buffers and the optimizer's state back; its settings, such as the learning rate, stay."""
        reshard(pl_module)
        _copy_into(_trainable(pl_module), self._kept["weights"])
        _copy_into(persistent_buffers(pl_module), self._kept["buffers"])
        groups = optimizer.state_dict()["param_groups"]
        # before there are two of it
        optimizer.state.clear()
        # copies, because the optimizer goes on with what it is given
        state = tree_map(_given_out, self._kept["state"])
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    def clear(self) -> None:
        """Forget it."""
        self.step, self._kept, self._restored = None, {}, False

    def num_bytes(self, pl_module: LightningModule) -> int:
        """Return what a snapshot takes on this rank, with the two moments of Adam for every trainable weight."""
        weights = sum(local(parameter).nbytes for parameter in _trainable(pl_module).values())
        return 3 * weights + sum(buffer.nbytes for buffer in persistent_buffers(pl_module).values())

    def state_dict(self) -> dict[str, Any]:
        """Return the snapshot, shards as DTensors."""
        return {"step": self.step, "kept": tree_map(_given_out, self._kept)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` returned; :meth:`place` brings it to its shards."""
        self.step, self._restored = state["step"], True
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
        weights: dict[Any, Tensor] = {**_trainable(pl_module), **persistent_buffers(pl_module)}
        numbered = dict(enumerate(stepped))
        for section, values in self._kept.items():
            for name, value in values.items():
                like = (numbered if section == "state" else weights).get(name)
                # what an optimizer keeps for itself, under a name, belongs to no parameter
                of_optimizer = section == "state" and not isinstance(name, int)
                if not of_optimizer and (like is None or (section != "state" and like.shape != value.shape)):
                    has = f"parameter {name}" if section == "state" else f"{name!r} of shape {tuple(value.shape)}"
                    raise ValueError(
                        f"The snapshot of `{self._owner}` has {has}, the module has not. Go on with the model and the"
                        " trainable parameters of the run before."
                    )
                values[name] = tree_map(partial(_cut, like=like), value)


def _present(pl_module: LightningModule, optimizer: Optimizer) -> dict[str, dict[Any, Any]]:
    buffers = dict(persistent_buffers(pl_module))
    return {"weights": _trainable(pl_module), "buffers": buffers, "state": optimizer.state_dict()["state"]}


def _trainable(pl_module: LightningModule) -> dict[str, Any]:
    return {name: parameter for name, parameter in pl_module.named_parameters() if parameter.requires_grad}


def _copy_into(targets: dict[str, Any], values: dict[str, Any]) -> None:
    for name, target in targets.items():
        if name in values:
            kept = values[name]
            local(target).copy_(kept.part if isinstance(kept, _Shard) else kept)


def _on_host(value: Any, memory: Any) -> Any:
    """Return a copy of this rank's part of a tensor in the memory of the machine, in ``memory`` if it fits."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    part = local(value.detach())
    if not isinstance(memory, Tensor) or memory.shape != part.shape or memory.dtype != part.dtype:
        memory = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
    kept = memory.copy_(part, non_blocking=True)
    if isinstance(value, DTensor):
        return _Shard(kept, value.device_mesh, value.placements, value.shape, value.stride())
    return kept


def _given_out(kept: Any) -> Any:
    """Return a copy of what was kept, sharded as it was."""
    if isinstance(kept, _Shard):
        return kept.whole
    return kept.clone() if isinstance(kept, Tensor) else copy.deepcopy(kept)


def _cut(value: Any, like: Tensor | None) -> Any:
    """Return what is to be kept of a value out of a checkpoint, of a tensor the part that this rank has of ``like``."""
    # a counter is the same on all ranks
    if like is None or not isinstance(value, Tensor) or not value.dim():
        return _on_host(value, None)
    part = _on_host(shard(value, like), None)
    if isinstance(like, DTensor):
        return _Shard(part, like.device_mesh, like.placements, value.shape, value.stride())
    return part
