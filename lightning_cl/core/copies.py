"""A second set of a module's weights: a teacher, an average, what the module was before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_cl.core.state import ParameterState, local, reshard

__all__ = ["WeightCopy", "persistent_buffers"]


class WeightCopy:
    """Copies of the trainable parameters (this rank's shards) and of the persistent buffers of a module.

    What is frozen is shared with the module, so of adapters on a frozen base only the adapters are copied.

    Args:
        owner: The callback, for errors.
        float32: Keep copies of half-precision weights in float32, so that an average of many small steps moves.
        buffers: Copy buffers as well; without, the module computes with its own in either case.
    """

    def __init__(self, owner: str, *, float32: bool = False, buffers: bool = True) -> None:
        self._owner = owner
        self._float32 = float32
        self._with_buffers = buffers
        self._weights = ParameterState()
        self._buffers: dict[str, Tensor] = {}
        self._names: set[str] = set()
        # at the time of the copy
        self._frozen: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._weights)

    def take(self, pl_module: LightningModule) -> None:
        """Copy the module's present weights; outside of its forward, where they are shards."""
        reshard(pl_module)
        parameters = _trainable(pl_module)
        weights = {name: local(p.detach()).to(self._dtype(p), copy=True) for name, p in parameters.items()}
        self._weights.set(weights, parameters)
        self._note_names(pl_module)
        self._take_buffers(pl_module)

    def move_towards(
        self, pl_module: LightningModule, weight: float, parameters: Mapping[str, Tensor] | None = None
    ) -> None:
        r"""Move the copy to :math:`c + w (\theta - c)`; buffers are taken as they are.

        Args:
            pl_module: The module.
            weight: :math:`w`.
            parameters: The module's parameters to move towards, by name; all if ``None``.
        """
        parameters = dict(pl_module.named_parameters()) if parameters is None else parameters
        moved = {name: copy for name, copy in self._weights.items() if name in parameters}
        copies = list(moved.values())
        present = [local(parameters[name].detach()).to(copy.dtype) for name, copy in moved.items()]
        if copies:
            torch._foreach_lerp_(copies, present, weight)
        self._take_buffers(pl_module)

    def widen(self, pl_module: LightningModule) -> None:
        """Give the copies of what grew since (a head that has more classes) what the module's have more.

        What a mask has more is ``False``: the copy knows nothing of it.
        """
        parameters = dict(pl_module.named_parameters())
        grown = {
            name: copy
            for name, copy in self._weights.items()
            if name in parameters and not _is_shard(parameters[name]) and _has_grown(parameters[name], copy)
        }
        if grown:
            widened = {name: _widened(copy, parameters[name]) for name, copy in grown.items()}
            self._weights.set({**self._weights, **widened}, parameters)
        for name, buffer in self._buffers_of(pl_module).items():
            if name in self._buffers and _has_grown(buffer, self._buffers[name]):
                self._buffers[name] = _widened(self._buffers[name], buffer)

    def place(self, pl_module: LightningModule, *, to_train: bool = True) -> None:
        """Bring restored copies to the devices and shards of the module's parameters.

        Args:
            pl_module: The module.
            to_train: Whether what trains must be what is kept; else it is enough that what is kept is there.

        Raises:
            ValueError: If the copy and the module's parameters do not match.
        """
        reshard(pl_module)
        kept = {name: p for name, p in pl_module.named_parameters() if name in self._names}
        parameters = _trainable(pl_module) if to_train else kept
        self._weights.place(parameters, f"The weights kept by `{self._owner}`")
        if self and to_train:
            self._note_names(pl_module)
        devices = {name: buffer.device for name, buffer in pl_module.named_buffers()}
        self._buffers = {name: value.to(devices.get(name, value.device)) for name, value in self._buffers.items()}

    def thawed(self, pl_module: LightningModule) -> list[str]:
        """Return what was frozen when the copy was taken and is no more, so that it has no copy."""
        return sorted(self._frozen & _trainable(pl_module).keys()) if self else []

    @contextmanager
    def in_place(self, pl_module: LightningModule) -> Iterator[None]:
        """Let the module compute with the copy, without a graph, and get its own weights back at the end.

        It may be entered inside the forward of a sharded root, before the module computed anything there.
        """
        parameters = dict(pl_module.named_parameters())
        shards = {name: local(parameters[name].detach()) for name in self._weights if _is_shard(parameters[name])}
        kept = {name: shard.clone() for name, shard in shards.items()}
        whole = {name: parameters[name].data for name in self._weights if name not in shards}
        buffers = {name: buffer.clone() for name, buffer in self._buffers_of(pl_module).items()}
        with torch.no_grad():
            for name in whole:
                # by pointer: no copy, and what the optimizer and DDP hold stays the same object
                parameters[name].data = self._weights.full(name).to(whole[name].dtype)
            _copy_into(shards, self._weights)
            _copy_into(self._buffers_of(pl_module), self._buffers)
        try:
            yield
        finally:
            # a unit that was gathered for the copy must not serve the module
            reshard(pl_module)
            with torch.no_grad():
                for name, data in whole.items():
                    parameters[name].data = data
                _copy_into(shards, kept)
                _copy_into(self._buffers_of(pl_module), buffers)

    def load_into(self, pl_module: LightningModule, parameters: Mapping[str, Tensor] | None = None) -> None:
        """Make the copy the module's own weights.

        Args:
            pl_module: The module.
            parameters: Those to load, by name; all if ``None``.
        """
        reshard(pl_module)
        parameters = dict(pl_module.named_parameters()) if parameters is None else parameters
        with torch.no_grad():
            _copy_into({n: local(p.detach()) for n, p in parameters.items()}, self._weights)
            _copy_into(self._buffers_of(pl_module), self._buffers)

    def num_bytes(self, pl_module: LightningModule) -> int:
        """Return what a copy takes on this rank."""
        parameters = _trainable(pl_module).values()
        buffers = sum(buffer.nbytes for buffer in self._buffers_of(pl_module).values())
        return buffers + sum(local(p).numel() * self._dtype(p).itemsize for p in parameters)

    def state_dict(self) -> dict[str, Any]:
        """Return parameters as :class:`ParameterState` does, and buffers on the CPU."""
        buffers = {name: value.detach().cpu().clone() for name, value in self._buffers.items()}
        return {"weights": self._weights.state_dict(), "buffers": buffers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` returned; :meth:`place` brings it to its devices and shards."""
        self._weights.load_state_dict(state["weights"])
        self._names = set(state["weights"])
        self._buffers = dict(state["buffers"])

    def _note_names(self, pl_module: LightningModule) -> None:
        self._names = set(self._weights)
        self._frozen = {name for name, _ in pl_module.named_parameters()} - self._names

    def _dtype(self, parameter: Tensor) -> torch.dtype:
        return torch.promote_types(parameter.dtype, torch.float32) if self._float32 else parameter.dtype

    def _buffers_of(self, pl_module: LightningModule) -> dict[str, Tensor]:
        return persistent_buffers(pl_module) if self._with_buffers else {}

    def _take_buffers(self, pl_module: LightningModule) -> None:
        present = self._buffers_of(pl_module)
        if self._buffers.keys() == present.keys():
            _copy_into(self._buffers, present)
        else:
            self._buffers = {name: buffer.detach().clone() for name, buffer in present.items()}


def _trainable(pl_module: LightningModule) -> dict[str, nn.Parameter]:
    return {name: p for name, p in pl_module.named_parameters() if p.requires_grad}


def persistent_buffers(pl_module: LightningModule) -> dict[str, Tensor]:
    """Return what a checkpoint holds: statistics, but no tables that are made anew."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in pl_module.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def _has_grown(parameter: Tensor, copy: Tensor) -> bool:
    """Whether the copy may be a corner of the parameter; another change of shape is left to ``place`` to refuse."""
    sizes, kept = parameter.shape, copy.shape
    return sizes != kept and len(sizes) == len(kept) and all(new >= old for new, old in zip(sizes, kept, strict=True))


def _widened(copy: Tensor, present: Tensor) -> Tensor:
    wide = present.detach().to(copy.dtype, copy=True)
    if wide.dtype == torch.bool:
        wide.zero_()
    wide[tuple(map(slice, copy.shape))] = copy.to(wide.device)
    return wide


def _is_shard(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor)


def _copy_into(targets: dict[str, Tensor], sources: Any) -> None:
    for name, target in targets.items():
        if name in sources:
            target.copy_(sources[name])
