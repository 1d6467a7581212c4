"""Tensors that a method keeps beside the parameters: anchors, importances, trajectories.

Each is kept in the placement of its parameter: the local shard of a :class:`~torch.distributed.tensor.DTensor`, the
whole tensor otherwise. Elementwise mathematics therefore runs on local shards, without communication.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

__all__ = [
    "ParameterState",
    "fill",
    "full_copy",
    "full_tensor",
    "local",
    "reshard",
    "shard",
    "sum_over_shards",
    "sum_rows_over_shards",
    "zero_of_parameters",
]


def local(tensor: Tensor) -> Tensor:
    """Return the shard of ``tensor`` that this rank holds; a plain tensor is its own shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor, gathered from its shards if it has some; all ranks must call it."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_copy(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor in memory of its own; all ranks must call it."""
    whole = full_tensor(tensor)
    return whole if isinstance(tensor, DTensor) else whole.clone()


@torch.no_grad()
def fill(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter, or what belongs there into the shard of it that this rank holds."""
    local(parameter.detach()).copy_(shard(value.to(parameter.dtype), parameter))


def zero_of_parameters(module: nn.Module) -> Tensor:
    """Return a 0 that depends on all trainable parameters: DDP waits for the gradients of all, used or not."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.stack([p.flatten()[:0].float().sum() for p in parameters]).sum()


def reshard(module: nn.Module) -> None:
    """Free what FSDP2 gathered for a forward that no backward follows, so that parameters are shards again."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


class ParameterState(Mapping[str, Tensor]):
    """Local float32 tensors keyed by fully qualified parameter names.

    Restored values wait in full until :meth:`place` knows devices and shards; a missing or mis-shaped entry raises
    there, because silence would mean an unprotected model.
    """

    def __init__(self) -> None:
        self._local: dict[str, Tensor] = {}
        self._restored: dict[str, Tensor] | None = None
        self._like: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._local[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._local)

    def __len__(self) -> int:
        return len(self._local)

    def set(self, values: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        """Keep ``values`` (local shards) for ``parameters``."""
        self._local = dict(values)
        self._like = {name: parameters[name] for name in values}

    def place(self, parameters: Mapping[str, Tensor], owner: str) -> None:
        """Bring restored values to the devices and shards of ``parameters``.

        Args:
            parameters: The module's parameters by name.
            owner: The callback and the quantity, for errors.

        Raises:
            ValueError: If the state holds a parameter that the module lacks, or one of another shape, or lacks one.
        """
        if self._restored is not None:
            _check_match(self._restored, parameters, owner)
            # a copy, because the restored tensors may be mapped from a file that is deleted or belong to another state
            self.set({name: shard(self._restored[name], p).clone() for name, p in parameters.items()}, parameters)
            self._restored = None
        elif self._local:
            _check_match(self._like, parameters, owner)
            # a later fit may have moved the module to another device
            self.set({name: value.to(parameters[name].device) for name, value in self._local.items()}, parameters)

    def full(self, name: str) -> Tensor:
        """Return a whole tensor; the ranks that share it must all call this."""
        value, like = self._local[name], self._like[name]
        return _placed(value, like).full_tensor() if isinstance(like, DTensor) else value

    def state_dict(self) -> dict[str, Tensor]:
        """Return a tensor for each parameter: where it is sharded a DTensor over the tensor itself, else a CPU copy.

        Any number of ranks can load it, as shards or in full.
        """
        if self._restored is not None:
            return dict(self._restored)
        return {
            name: _placed(value, like)
            if isinstance(like := self._like[name], DTensor)
            else value.detach().cpu().clone()
            for name, value in self._local.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what :meth:`state_dict` returned; it is placed by :meth:`place`."""
        self._restored = {name: torch.as_tensor(value) for name, value in state.items()} or None
        self._local = {}


def _check_match(kept: Mapping[str, Tensor], parameters: Mapping[str, Tensor], owner: str) -> None:
    if missing := parameters.keys() - kept.keys():
        raise ValueError(
            f"{owner} has no entry for {sorted(missing)[:3]}: these parameters would train unprotected. Go on with the"
            " model, the trainable parameters and the `include`/`exclude` settings of the run before."
        )
    for name, value in kept.items():
        if name not in parameters or parameters[name].shape != value.shape:
            found = tuple(parameters[name].shape) if name in parameters else "no such trainable parameter"
            raise ValueError(
                f"{owner} has {name!r} of shape {tuple(value.shape)}, the module has {found}. Go on with the model, the"
                " trainable parameters and the `include`/`exclude` settings of the run before."
            )


def shard(value: Tensor, parameter: Tensor) -> Tensor:
    """Return the part of ``value`` that belongs to this rank's shard of ``parameter``, on its device.

    Args:
        value: A full tensor, or one sharded in another way.
        parameter: The tensor to follow.
    """
    if isinstance(value, DTensor):
        if not isinstance(parameter, DTensor):
            return value.full_tensor().to(parameter.device)
        if value.device_mesh == parameter.device_mesh:
            return value.redistribute(placements=parameter.placements).to_local()
        value = value.full_tensor()
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
    return value


def sum_over_shards(terms: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Tensor:
    """Return the sum of values by name, each taken over the ranks that share the parameter of that name.

    Args:
        terms: A value of this rank's shard for each name: a scalar, or sums of several things of one shape.
        parameters: Parameters by name; all ranks must call this with the same ones.
    """
    whole: list[Tensor] = []
    shared: dict[Any, list[Tensor]] = {}
    for name, term in terms.items():
        parameter = parameters[name]
        if isinstance(parameter, DTensor):
            shared.setdefault((parameter.device_mesh, parameter.placements), []).append(term)
        else:
            whole.append(term)
    for (mesh, placements), parts in shared.items():
        kinds = [Partial() if placement.is_shard() else Replicate() for placement in placements]
        whole.append(DTensor.from_local(torch.stack(parts).sum(0), mesh, kinds).full_tensor())
    return torch.stack(whole).sum(0)


def sum_rows_over_shards(rows: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return rows of numbers, one for each parameter, each summed over the ranks that share that parameter.

    All ranks must call this with the same parameters.
    """
    members: dict[Any, list[int]] = {}
    for row, parameter in enumerate(parameters):
        sharding = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
        members.setdefault(sharding, []).append(row)
    if not members.keys() - {None}:
        return rows
    terms: dict[str, Tensor] = {}
    for group in members.values():
        terms[str(group[0])] = torch.zeros_like(rows)
        terms[str(group[0])][group] = rows[group]
    return sum_over_shards(terms, {name: parameters[int(name)] for name in terms})


def _placed(value: Tensor, parameter: DTensor) -> DTensor:
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(value, mesh, placements, shape=parameter.shape, stride=parameter.stride())
