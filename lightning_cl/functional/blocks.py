"""Lists of tensors cut into pieces whose temporary results stay small: blocks on the CPU, buckets elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

__all__ = ["blocks", "buckets"]

# 4 MB of float32: a larger difference is fresh memory on each call, and its page faults cost more than the arithmetic
_BLOCK = 1 << 20
# 256 MB of float32 beside the gradients, instead of one more copy of all parameters
_BUCKET = 1 << 26


def blocks(*lists: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors at each position of the lists together, large contiguous ones cut alike.

    Others come whole, as a flat view of them does not exist.

    Args:
        lists: Tensors matched by position, of the same shape at each.
    """
    for tensors in zip(*lists, strict=True):
        if tensors[0].numel() <= _BLOCK or not all(tensor.is_contiguous() for tensor in tensors):
            yield tensors
        else:
            yield from zip(*(torch.split(tensor.view(-1), _BLOCK) for tensor in tensors), strict=True)


def buckets(tensors: Sequence[Tensor]) -> Iterator[slice]:
    """Yield runs of positions that together hold a bucket of elements, for foreach kernels."""
    start = size = 0
    for stop, tensor in enumerate(tensors, start=1):
        size += tensor.numel()
        if size >= _BUCKET or stop == len(tensors):
            yield slice(start, stop)
            start, size = stop, 0
