"""State that differs between ranks, on its way into a checkpoint: shards of tensors, and what each rank has of its own.

``state_dict`` of a callback may hold, anywhere in nested dicts and lists, a :class:`~torch.distributed.tensor.DTensor`
or a :class:`PerRank`. A strategy that ``saves_shards`` writes both as they are. For every other strategy the task
events replace them by :func:`gathered`, so that what reaches Lightning is plain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.distributed.tensor import DTensor

from lightning_cl.core.distributed import gather_on_rank_zero

__all__ = ["PerRank", "Uncopied", "gathered", "map_leaves", "of_all_ranks"]


@dataclass(frozen=True)
class PerRank:
    """What this rank alone has, such as its share of a memory; read from a checkpoint, it is the list of all ranks'.

    Args:
        value: Tensors and plain containers.
    """

    value: Any


class Uncopied(dict[str, Any]):
    """A loaded state that ``deepcopy`` leaves alone: Lightning would copy the memory of all ranks on each of them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Uncopied:
        return self


def of_all_ranks(value: Any) -> list[Any]:
    """Return the values of all ranks, in rank order, of what was saved as a :class:`PerRank`."""
    return [value.value] if isinstance(value, PerRank) else value


def map_leaves(tree: Any, function: Callable[[Any], Any]) -> Any:
    """Return nested dicts, lists and tuples with ``function`` applied to all else, in the order of their items."""
    if type(tree) is dict:
        return {key: map_leaves(value, function) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map_leaves(value, function) for value in tree)
    return function(tree)


def gathered(tree: Any) -> Any:
    """Return ``tree`` with full tensors on the CPU and the lists of all ranks' values; all ranks must call it.

    On other ranks than 0 the lists are ``None``.
    """

    def whole(leaf: Any) -> Any:
        if isinstance(leaf, DTensor):
            return leaf.full_tensor().cpu()
        return gather_on_rank_zero(leaf.value) if isinstance(leaf, PerRank) else leaf

    return map_leaves(tree, whole)
