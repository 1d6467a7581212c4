"""Work that every rank could do, done by one rank for each piece."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

from lightning_cl.core.distributed import is_distributed, rank, world_size

__all__ = ["share_out"]

_Source = TypeVar("_Source")
_Made = TypeVar("_Made")


def share_out(
    names: Sequence[str], read: Callable[[str], _Source], make: Callable[[str, _Source], _Made]
) -> dict[str, _Made]:
    """Make something for each name on one of the ranks, and give it to all, so that they have the same bits.

    Args:
        names: The names, the same on all ranks.
        read: Called on all ranks for each name, such as for a gathered weight; only one rank keeps what it returns.
        make: Makes of it what is sent, with its tensors on the CPU: one on a GPU would come to all ranks on the GPU of
            the one that sent it.
    """
    made: dict[str, _Made] = {}
    for first in range(0, len(names), world_size()):
        group = names[first : first + world_size()]
        # all are read before one is made, so that the ranks make theirs at the same time
        sources = {name: source for owner, name in enumerate(group) for source in [read(name)] if owner == rank()}
        mine = {name: make(name, source) for name, source in sources.items()}
        for owner, name in enumerate(group):
            made[name] = _from_rank(owner, mine.get(name))
    return made


def _from_rank(owner: int, value: _Made | None) -> _Made:
    box = [value]
    if is_distributed():
        dist.broadcast_object_list(box, src=owner)
    assert box[0] is not None
    return box[0]
