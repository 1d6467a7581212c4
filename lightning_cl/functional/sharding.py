"""Sums over ranks for parameters that :func:`~torch.distributed.fsdp.fully_shard` has split.

A rank knows the squared gradients of its own samples in full, of one parameter at a time, and keeps a shard of the sum
over all ranks. What moves is what a gradient moves in training: one reduce-scatter of each parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

__all__ = ["ShardedSums", "UnshardedWeights", "check_layout", "differing", "root_mean_squares"]

# elements that wait to be reduced together: 32 MB of float32
_BUCKET = 1 << 23


def check_layout(parameters: Mapping[str, Tensor]) -> None:
    """Refuse what is sharded otherwise than by ``fully_shard``, with or without replicas.

    Raises:
        ValueError: If a parameter is split along several dimensions or over a part of the ranks only.
    """
    for name, parameter in parameters.items():
        if not isinstance(parameter, DTensor):
            continue
        split = [kind for kind in parameter.placements if not kind.is_replicate()]
        if len(split) > 1 or any(type(kind) is not Shard for kind in split):
            layout = f"is placed as {parameter.placements}"
        elif parameter.device_mesh.size() != dist.get_world_size():
            layout = f"lies on {parameter.device_mesh.size()} of {dist.get_world_size()} ranks"
        else:
            continue
        raise ValueError(
            f"{name!r} {layout}, but sums over samples need every parameter on all ranks, sharded at most once. Leave"
            " it out, or train without tensor parallelism."
        )


class ShardedSums:
    """Adds full tensors, one of each rank, to totals that are sharded, in buckets that are reduced together.

    All ranks must add to totals of the same parameters in the same order, and :meth:`flush` at the end.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[DTensor, Tensor]] = []
        self._elements = 0

    def add(self, total: DTensor, value: Tensor) -> None:
        """Add ``value`` of all ranks to ``total``.

        Args:
            total: Changed in place, at the latest by :meth:`flush`.
            value: Full tensor of this rank, ``[*total.shape]`` in its dtype, on a device that the ranks communicate on;
                it must not change before the flush.
        """
        dimension, shards = _split(total)
        value = value.movedim(dimension, 0)
        if padding := -len(value) % shards:
            value = torch.cat([value, value.new_zeros(padding, *value.shape[1:])])
        rows = value.reshape(shards, -1)
        if self._waiting and (self._elements + rows.numel() > _BUCKET or _kind(total) != _kind(self._waiting[0][0])):
            self.flush()
        self._waiting.append((total, rows))
        self._elements += rows.numel()

    @contextmanager
    def full(self, total: Tensor) -> Iterator[Tensor]:
        """Give the tensor to add to: ``total``, or zeros of its full shape that join a sharded one."""
        if not isinstance(total, DTensor):
            yield total
            return
        full = torch.zeros(total.shape, dtype=total.dtype, device=total.device_mesh.device_type)
        yield full
        self.add(total, full)

    def flush(self) -> None:
        """Reduce what waits."""
        if not self._waiting:
            return
        waiting, self._waiting, self._elements = self._waiting, [], 0
        rows = waiting[0][1] if len(waiting) == 1 else torch.cat([rows for _, rows in waiting], dim=1)
        sums = _reduce(rows, waiting[0][0])
        for (total, _), part in zip(waiting, sums.split([rows.shape[1] for _, rows in waiting]), strict=True):
            shard = total.to_local().movedim(_split(total)[0], 0)
            # shards that are offloaded lie on the CPU
            shard += part[: shard.numel()].view(shard.shape).to(shard.device)


class UnshardedWeights:
    """Knows the tensors that stand in the graph of a forward pass in place of sharded parameters.

    A context manager: they are noted whenever ``fully_shard`` has gathered them inside it.

    Args:
        module: The model.
        parameters: Parameters of ``module`` by name; plain ones stand for themselves.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        self._module = module
        self._parameters = dict(parameters)
        self._gathered: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        names = {id(p): name for name, p in self._parameters.items() if isinstance(p, DTensor)}
        for block in self._module.modules() if names else ():
            if isinstance(block, FSDPModule):
                assert isinstance(block, nn.Module)
                owners = [(owner, key, names[id(p)]) for owner, key, p in _own_parameters(block) if id(p) in names]
                # behind the hook that gathers
                self._handles.append(block.register_forward_pre_hook(self._recorder(owners)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._gathered.clear()

    def _recorder(self, owners: list[tuple[nn.Module, str, str]]) -> Any:
        def record(*_: Any) -> None:
            for owner, key, name in owners:
                tensor = owner._parameters[key]
                if tensor is not None and not isinstance(tensor, DTensor):
                    self._gathered[name] = tensor

        return record

    def __getitem__(self, name: str) -> Tensor | None:
        """Return the tensor in the graph, ``None`` if the parameter has not been gathered."""
        parameter = self._parameters[name]
        return self._gathered.get(name) if isinstance(parameter, DTensor) else parameter


def root_mean_squares(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the root of the mean square of every tensor; of sharded ones all ranks must ask."""
    sums = {name: _local(tensor).square().sum(dtype=torch.float64) for name, tensor in tensors.items()}
    kinds: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            kinds.setdefault(_kind(tensor), []).append(name)
    for names in kinds.values():
        first = tensors[names[0]]
        assert isinstance(first, DTensor)
        joined = torch.stack([sums[name] for name in names]).to(first.device_mesh.device_type)
        for axis, kind in enumerate(first.placements):
            if kind.is_shard():
                dist.all_reduce(joined, group=first.device_mesh.get_group(axis))
        sums.update(zip(names, joined, strict=True))
    return {name: (float(total) / max(tensors[name].numel(), 1)) ** 0.5 for name, total in sums.items()}


def differing(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> list[str]:
    """Return the names whose sums of squares differ by more than rounding; of sharded ones all ranks must ask.

    Args:
        found: Sums of squared gradients by name.
        expected: Those of another way, in the same placements.
        tolerance: Largest relative error, of the root of the squared gradients, that is taken for rounding.
    """
    roots = {name: square.sqrt() for name, square in expected.items()}
    sizes = root_mean_squares(roots)
    errors = root_mean_squares({name: found[name].sqrt() - root for name, root in roots.items()})
    # gradients that are 0 but for rounding differ by all of themselves
    noise = 1e-3 * tolerance * max(sizes.values(), default=0.0)
    return [name for name, size in sizes.items() if not errors[name] <= tolerance * size + noise]


def _own_parameters(block: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield what is gathered with ``block``: the parameters under it that no block inside it holds."""
    yield from ((block, key, parameter) for key, parameter in block._parameters.items() if parameter is not None)
    for child in block.children():
        if not isinstance(child, FSDPModule):
            yield from _own_parameters(child)


def _split(tensor: DTensor) -> tuple[int, int]:
    """Return the dimension that is split, and over how many ranks."""
    for axis, kind in enumerate(tensor.placements):
        if isinstance(kind, Shard):
            return kind.dim, tensor.device_mesh.size(axis)
    return 0, 1


def _kind(tensor: DTensor) -> tuple[Any, ...]:
    return tensor.device_mesh, tuple(kind.is_shard() for kind in tensor.placements), tensor.dtype


def _reduce(rows: Tensor, like: DTensor) -> Tensor:
    """Sum ``[shards, n]`` over ranks, and return the row of this rank's shard, ``[n]``."""
    mesh = like.device_mesh
    mine = rows[0]
    for axis, kind in enumerate(like.placements):
        if kind.is_shard():
            mine = rows.new_empty(rows.shape[1])
            dist.reduce_scatter_single(mine, rows.flatten(), group=mesh.get_group(axis))
    for axis, kind in enumerate(like.placements):
        if not kind.is_shard():
            dist.all_reduce(mine, group=mesh.get_group(axis))
    return mine


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
