"""Random masks that are a pure function of a seed and of the place in the whole tensor, whatever the sharding."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

__all__ = ["derived_key", "global_indices", "random_mask"]

# SplitMix64 (Steele, Lea and Flood 2014), its constants as signed 64-bit integers
_GOLDEN_RATIO = 0x9E3779B97F4A7C15 - 2**64
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_BITS = 53


def _unsigned_shift(values: Tensor, bits: int) -> Tensor:
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def derived_key(*numbers: int) -> int:
    """Return 63 bits that are a pure function of ``numbers``, such as a seed and counts.

    Example:
        >>> derived_key(0, 1) == derived_key(0, 1), derived_key(0, 1) == derived_key(1, 0)
        (True, False)
    """
    state = 0
    for number in numbers:
        state = (state ^ number % 2**64) + _GOLDEN_RATIO % 2**64
        for shift, factor in zip((30, 27), _FACTORS, strict=True):
            state = (state % 2**64 ^ state % 2**64 >> shift) * (factor % 2**64)
        state = state % 2**64 ^ state % 2**64 >> 31
    return state >> 1


def _mixed(values: Tensor) -> Tensor:
    values = values + _GOLDEN_RATIO
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        values = (values ^ _unsigned_shift(values, shift)) * factor
    return values ^ _unsigned_shift(values, 31)


def random_mask(indices: Tensor, density: float, *key: int) -> Tensor:
    """Return a mask that holds each index with probability ``density``, independently.

    Args:
        indices: int64, any shape.
        density: From 0 to 1.
        key: Numbers that the draw is a pure function of, such as a seed and a count.

    Returns:
        bool, of the shape of ``indices``.

    Example:
        >>> random_mask(torch.arange(8), 0.5, 0)
        tensor([ True, False, False, False, False,  True,  True,  True])
        >>> random_mask(torch.tensor([6, 7]), 0.5, 0)
        tensor([True, True])
    """
    draws = _unsigned_shift(_mixed(_mixed(indices) ^ derived_key(*key)), 64 - _BITS)
    return draws < round(density * (1 << _BITS))


def global_indices(tensor: Tensor) -> Tensor:
    """Return where the elements of this rank's shard lie in the whole tensor, flattened.

    Args:
        tensor: A plain tensor, which is its own shard, or one that is sharded evenly or not.

    Returns:
        int64, of the shape of the shard.

    Raises:
        ValueError: If it is sharded otherwise than by ``fully_shard``.
    """
    if not isinstance(tensor, DTensor):
        return torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape)
    if any(type(placement) not in (Shard, Replicate) for placement in tensor.placements):
        raise ValueError(f"`density` below 1 needs weights sharded as by `fully_shard`, got {tensor.placements}.")
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for axis, length in enumerate(tensor.shape):
        places = torch.arange(length, device=tensor.device)
        along = [Shard(0) if placement.is_shard(axis) else Replicate() for placement in tensor.placements]
        mine = distribute_tensor(places, tensor.device_mesh, along, src_data_rank=None).to_local()
        total = total.unsqueeze(-1) + mine * prod(tensor.shape[axis + 1 :])
    return total
