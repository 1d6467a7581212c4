"""A checksum of frozen weights, so that what trained on them is never put on others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import prod

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_cl.core.distributed import is_distributed, rank
from lightning_cl.core.state import local
from lightning_cl.strategies.checkpoint_ranks import cpu_group

__all__ = ["check_fingerprint", "fingerprint"]

_BLOCK = 1 << 16  # words; a block and its weights fit the cache of a core
_BLOCK_BYTES = 4 * _BLOCK
_BLOCKS_ON_GPU = 64  # at once: 32 MiB of products
_PADDED_BYTES = 1 << 22  # of rows at once, where a shard cuts rows


@torch.no_grad()
def fingerprint(named_tensors: Mapping[str, Tensor]) -> dict[str, int]:
    r"""Return a 64-bit checksum of every tensor: of its bytes, their places, its dtype and its shape.

    With the bytes read as 32-bit words :math:`x_{kj}`, in blocks k of 65536 words, it is a hash of

    .. math:: \sum_k b_k \sum_j a_j x_{kj} \bmod 2^{64}

    with fixed pseudo-random odd :math:`a_j, b_k`. The sum is the same however the tensor is cut into shards, and needs
    one reduction of 8 bytes for each tensor. Every change of a single word changes it. A random other tensor has the
    same sum with probability :math:`2^{-64}`; changes of nothing but the highest bits of words, the worst case, cancel
    with probability :math:`2^{-33}`. It finds mistakes; it is no protection against who forges one.

    Args:
        named_tensors: Tensors of any dtype and shape; DTensors are summed where they lie. All ranks call this with the
            same names in the same order. Of a plain tensor, and of replicas, the first rank's counts.

    Raises:
        ValueError: For a DTensor with values that are still to be summed.
    """
    if not named_tensors:
        return {}
    sums = torch.stack([_share(tensor).cpu() for tensor in named_tensors.values()])
    if is_distributed():
        dist.all_reduce(sums, group=cpu_group("foreground"))
    return {
        name: _digest(tensor, total) for (name, tensor), total in zip(named_tensors.items(), sums.tolist(), strict=True)
    }


def check_fingerprint(saved: Mapping[str, int], current: Mapping[str, int], source: str) -> None:
    """Check that the frozen tensors are those that ``source`` was trained on.

    Args:
        saved: The fingerprint in the checkpoint.
        current: The fingerprint of the module.
        source: The checkpoint, for the error.

    Raises:
        ValueError: If a tensor differs, is missing or is new.
    """
    wrong = [
        f"{name} (other values, dtype or shape)" for name in saved if current.get(name, saved[name]) != saved[name]
    ]
    wrong += [f"{name} (not in this module)" for name in saved if name not in current]
    wrong += [f"{name} (not in the checkpoint)" for name in current if name not in saved]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"{source} was trained on another frozen base; these tensors differ: {', '.join(wrong[:3])}{more}. It holds"
            " only what trains, so it is resumed only over the base of that run: the same pretrained files and"
            " revision, the same quantization, dtype and frozen layers."
        )


def _share(tensor: Tensor) -> Tensor:
    """Return this rank's part of the sum of ``tensor``, int64 []."""
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for data, start in _pieces(tensor):
        total += _weighted_sum(data, start)
    return total


def _pieces(tensor: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Yield bytes, uint8 [n], that this rank accounts for, and where they stand in the whole tensor."""
    # a plain tensor, because classes of packed weights give their own meaning to views
    data = local(tensor).detach().as_subclass(Tensor)
    if not isinstance(tensor, DTensor):
        if rank() == 0:
            yield _as_bytes(data), 0
        return
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError("a tensor with values that are still to be summed over ranks has no fingerprint yet")
    coordinate = tensor.device_mesh.get_coordinate()
    copies = zip(coordinate or (), tensor.placements, strict=coordinate is not None)
    if coordinate is None or any(place and kind.is_replicate() for place, kind in copies) or not data.numel():
        return
    (chunk,) = tensor.__create_chunk_list__()
    if not tensor.ndim or chunk.sizes[1:] == tensor.shape[1:]:
        row = prod(tensor.shape[1:]) * tensor.element_size()
        yield _as_bytes(data), chunk.offsets[0] * row if tensor.ndim else 0
        return
    # rows are cut: the rest of each is zeros here, and counts on the ranks that have it
    row = prod(tensor.shape[1:]) * tensor.element_size()
    cut = zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)
    rows_and_columns = (slice(None), *(slice(at, at + size) for at, size in cut))
    step = max(1, _PADDED_BYTES // row)
    for first in range(0, len(data), step):
        rows = data[first : first + step]
        padded = rows.new_zeros((len(rows), *tensor.shape[1:]))
        padded[rows_and_columns] = rows
        yield _as_bytes(padded), (chunk.offsets[0] + first) * row


def _weighted_sum(data: Tensor, start: int) -> Tensor:
    """Return the sum over ``data``, uint8 [n], which stands at byte ``start`` of its tensor."""
    weights = _weights(data.device)
    at_once = 1 if data.device.type == "cpu" else _BLOCKS_ON_GPU
    end = start + len(data)
    first = start // _BLOCK_BYTES
    factors = _odd(first, -(-end // _BLOCK_BYTES), salt=1, device=data.device)
    products = weights.new_empty((min(at_once, len(data) // _BLOCK_BYTES), _BLOCK))
    total = weights.new_zeros(())
    here = start
    while here < end:
        block, inside = divmod(here, _BLOCK_BYTES)
        factor = factors[block - first :]
        count = 0 if inside else min((end - here) // _BLOCK_BYTES, at_once)
        if count:
            length = count * _BLOCK_BYTES
            words = _as_words(data[here - start : here - start + length]).view(count, _BLOCK)
            sums = torch.mul(words, weights, out=products[:count]).sum(1)
            total += (sums * factor[:count]).sum()
        else:  # a part of a block, and perhaps of its first and last word
            length = min(_BLOCK_BYTES - inside, end - here)
            before = inside % 4
            padded = data.new_zeros(-(-(before + length) // 4) * 4)
            padded[before : before + length] = data[here - start : here - start + length]
            words = padded.view(torch.int32)
            total += (words * weights[inside // 4 : inside // 4 + len(words)]).sum() * factor[0]
        here += length
    return total


def _as_bytes(data: Tensor) -> Tensor:
    return data.contiguous().reshape(-1).view(torch.uint8)


def _as_words(data: Tensor) -> Tensor:
    return (data.clone() if data.storage_offset() % 4 else data).view(torch.int32)


@lru_cache
def _weights(device: torch.device) -> Tensor:
    return _odd(0, _BLOCK, salt=0, device=device)


def _odd(first: int, last: int, *, salt: int, device: torch.device) -> Tensor:
    """Return the odd numbers that belong to ``first`` to ``last`` - 1, int64, by SplitMix64 (Steele et al. 2014)."""
    state: NDArray[np.uint64] = np.arange(first, last, dtype=np.uint64) + np.uint64(1 + (salt << 40))
    state *= np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state = (state ^ (state >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(state.view(np.int64)).to(device)


def _digest(tensor: Tensor, total: int) -> int:
    described = f"{tensor.dtype} {tuple(tensor.shape)} {total}".encode()
    return int.from_bytes(hashlib.blake2b(described, digest_size=8).digest(), "big")
