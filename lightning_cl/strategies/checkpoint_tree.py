"""The part of a checkpoint beside weights and optimizers, taken apart by who writes it and put together again."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, empty

from lightning_cl.core.shards import PerRank, map_leaves

__all__ = ["Parts", "check_same", "empty_shards", "joined", "taken_apart"]


@dataclass
class Parts:
    """A tree by who writes it.

    Args:
        common: The tree with ``None`` for every leaf below; rank 0 writes it.
        shards: DTensors, which all ranks write together.
        shards_at: For each of them: its number among the leaves, shape, dtype and sharded dimension (``None``: it is
            replicated).
        values: What this rank alone has.
        values_at: The numbers of those leaves.
        names: Where shards and values stand in the tree, for errors.
    """

    common: Any = None
    shards: list[DTensor] = field(default_factory=list)
    shards_at: list[tuple[int, tuple[int, ...], torch.dtype, int | None]] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    values_at: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)


def taken_apart(tree: Any) -> Parts:
    """Split nested dicts, lists and tuples by who writes each leaf.

    Raises:
        ValueError: For a DTensor with unreduced values, and for shards in a container that is none of the three.
    """
    parts = Parts()
    numbers = itertools.count()

    def walk(node: Any, place: str) -> Any:
        if type(node) is dict:
            return {key: walk(value, f"{place}[{key!r}]") for key, value in node.items()}
        if type(node) in (list, tuple):
            return type(node)(walk(value, f"{place}[{index}]") for index, value in enumerate(node))
        number = next(numbers)
        if isinstance(node, DTensor):
            parts.shards.append(node)
            parts.shards_at.append((number, tuple(node.shape), node.dtype, _sharded_dimension(node, place)))
        elif isinstance(node, PerRank):
            parts.values.append(map_leaves(node.value, _compact))
            parts.values_at.append(number)
        elif _holds_shards(node):
            raise ValueError(
                f"checkpoint{place} is a {type(node).__name__} with shards in it, which would not be found again. Keep"
                " them in a dict, a list or a tuple."
            )
        else:
            return _compact(node)
        parts.names.append(f"{type(node).__name__} {place}")
        return None

    parts.common = walk(tree, "")
    return parts


def check_same(names: Sequence[Sequence[str]]) -> None:
    """Check that all ranks have their shards and values at the same places.

    Raises:
        ValueError: If they differ.
    """
    for rank, others in enumerate(names):
        if list(others) != list(names[0]):
            lone = sorted(set(others) ^ set(names[0]))[:3] or "the order"
            raise ValueError(
                f"ranks 0 and {rank} differ in the state of callbacks that is kept as shards: {lone}. `state_dict` must"
                " return the same DTensor and PerRank entries, in the same order, on every rank."
            )


def empty_shards(parts: Parts, mesh: DeviceMesh) -> list[DTensor]:
    """Return tensors without values, to be read into, sharded over the last dimension of ``mesh``."""
    before = [Replicate()] * (mesh.ndim - 1)
    return [
        empty(
            *shape,
            dtype=dtype,
            device_mesh=mesh,
            placements=[*before, Replicate() if dimension is None else Shard(dimension)],
        )
        for _, shape, dtype, dimension in parts.shards_at
    ]


def joined(parts: Parts, shards: Iterable[DTensor], values: Sequence[Sequence[Any]]) -> Any:
    """Return the tree again.

    Args:
        parts: What was saved.
        shards: The DTensors in their order.
        values: For every rank, its values in their order; each leaf becomes the list over the ranks.
    """
    found: dict[int, Any] = {at[0]: shard for at, shard in zip(parts.shards_at, shards, strict=True)}
    for index, number in enumerate(parts.values_at):
        found[number] = [of_rank[index] for of_rank in values]
    numbers = itertools.count()
    return map_leaves(parts.common, lambda leaf: found.get(next(numbers), leaf))


def _sharded_dimension(tensor: DTensor, place: str) -> int | None:
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"checkpoint{place} has values that are still to be summed over ranks: redistribute it first")
    return next((placement.dim for placement in tensor.placements if isinstance(placement, Shard)), None)


def _holds_shards(node: Any) -> bool:
    if isinstance(node, (DTensor, PerRank)):
        return True
    if isinstance(node, Mapping):
        return any(map(_holds_shards, node.values()))
    return isinstance(node, (list, tuple)) and any(map(_holds_shards, node))


def _compact(leaf: Any) -> Any:
    """Return a tensor without the rest of the storage that it is a view of: a file holds whole storages."""
    if isinstance(leaf, Tensor) and leaf.layout == torch.strided and leaf.untyped_storage().nbytes() > leaf.nbytes:
        return leaf.detach().clone()
    return leaf
