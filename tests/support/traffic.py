"""What ranks send each other: every collective of a block of code, with its bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# everything through which torch's own packages communicate, besides point to point
_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd")
_KINDS = {
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "allgather_": "all-gather",
    "_allgather_base_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
}


class Collective(NamedTuple):
    """One collective: its kind, and the bytes of the full tensor that is reduced, gathered or sent."""

    kind: str
    size: int


class Traffic(TorchDispatchMode):
    """Records collectives while it is open, those in a backward pass too.

    Attributes:
        seen: The collectives in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func.namespace in _NAMESPACES:
            name = func.overloadpacket.__name__
            # of input and output, one is the full tensor
            self.seen.append(Collective(_KINDS.get(name, name), max((_bytes(arg) for arg in args), default=0)))
        return func(*args, **(kwargs or {}))

    def moved(self, above: int = 0) -> Counter[Collective]:
        """Return how often each collective of more than ``above`` bytes was seen."""
        return Counter(one for one in self.seen if one.size > above)

    def total(self, kind: str) -> int:
        """Return the bytes of all collectives of a kind."""
        return sum(one.size for one in self.seen if one.kind == kind)


def _bytes(argument: Any) -> int:
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    if isinstance(argument, Sequence) and not isinstance(argument, str):
        return sum(_bytes(item) for item in argument)
    return 0 if not isinstance(argument, Mapping) else sum(map(_bytes, argument.values()))
