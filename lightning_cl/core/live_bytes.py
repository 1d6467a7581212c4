"""Counting the bytes of the tensors that live while a piece of code runs."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import Self

__all__ = ["LiveBytes"]

# what a storage was last taken for stays, unless it proves to be one of those behind it
_KINDS = ("other", "saved", "gathered", "known")
_resize = torch.UntypedStorage.resize_


class LiveBytes(TorchDispatchMode):
    """Follows the storages of all tensors that operations return, from their first sight to their end.

    A context manager. It sees real tensors, fake ones and local shards, on every device, and what ``fully_shard``
    allocates and frees by resizing; not what a kernel takes for itself inside one operation.

    Args:
        known: Tensors that are there before; they count until they end.
        tell_saved: Tell apart what is saved for the backward, which the transforms of ``torch.func`` do not allow.

    Attributes:
        peak: Bytes of all storages when they were most.
        largest: These bytes by kind: ``"known"``, ``"saved"`` for the backward, ``"gathered"`` (resized, as the whole
            weights of ``fully_shard`` are), and ``"other"``.

    Example:
        >>> weight = torch.ones(1000, requires_grad=True)
        >>> with LiveBytes([weight]) as live:
        ...     loss = (weight.exp() + 1).sum()
        >>> live.peak, live.largest["saved"]
        (12004, 4000)
    """

    def __init__(self, known: Iterable[Tensor] = (), *, tell_saved: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest: Counter[str] = Counter()
        self.peak = 0
        # key of a storage -> reference, bytes, kind
        self._alive: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._now: Counter[str] = Counter()
        self._hooks: AbstractContextManager[Any] = nullcontext()
        if tell_saved:
            self._hooks = saved_tensors_hooks(self._save, lambda tensor: tensor)
        for tensor in known:
            self._take(_storage(tensor), "known")

    def __enter__(self) -> Self:
        seen = self

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = _resize(storage, size)
            seen._take(storage, "gathered")
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
        self._hooks.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._hooks.__exit__(kind, error, trace)
        torch.UntypedStorage.resize_ = _resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            # its own operations on local shards come here one by one
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._take(_storage(leaf), "other")
        return result

    def _save(self, tensor: Tensor) -> Tensor:
        self._take(_storage(tensor), "saved")
        return tensor

    def _take(self, storage: Any, kind: str) -> None:
        key = _key(storage)
        found = self._alive.get(key)
        if found is not None and found[0]() is storage:
            reference = found[0]
            self._now[found[2]] -= found[1]
            kind = max(kind, found[2], key=_KINDS.index)
        else:
            reference = weakref.ref(storage, lambda _: self._drop(key))
        size = storage.nbytes()
        self._alive[key] = (reference, size, kind)
        self._now[kind] += size
        total = sum(self._now.values())
        if total > self.peak:
            self.peak, self.largest = total, Counter(self._now)

    def _drop(self, key: int) -> None:
        _, size, kind = self._alive.pop(key)
        self._now[kind] -= size


def _storage(tensor: Tensor) -> Any:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage()


def _key(storage: Any) -> int:
    return storage._cdata  # type: ignore[no-any-return]
