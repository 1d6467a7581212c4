r"""Zeroth-order steps in place, with directions that are drawn again and never kept (MeZO, arXiv:2305.17333)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_cl.functional.sparse_masks import derived_key

__all__ = ["direction", "move_along_", "projected_gradient"]

# numbers drawn from one seed: a part of the definition of a direction, and all the memory that a move takes
_BLOCK = 2**18


def projected_gradient(loss_plus: float, loss_minus: float, eps: float) -> float:
    r"""Return the slope of the loss along a direction, from the losses on both sides.

    .. math:: g = \frac{L(\theta + \epsilon z) - L(\theta - \epsilon z)}{2 \epsilon} \approx z^\top \nabla L(\theta).

    Args:
        loss_plus: :math:`L(\theta + \epsilon z)`.
        loss_minus: :math:`L(\theta - \epsilon z)`.
        eps: :math:`\epsilon`, above 0.

    Example:
        >>> projected_gradient(3.0, 1.0, eps=0.5)
        2.0
    """
    return (loss_plus - loss_minus) / (2.0 * eps)


def _blocks(like: Tensor, numel: int, start: int, stop: int, key: Sequence[int]) -> Iterator[tuple[int, int, Tensor]]:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    generator = torch.Generator(like.device)
    buffer = torch.empty(min(_BLOCK, numel), dtype=dtype, device=like.device)
    for block in range(start // _BLOCK, -(-stop // _BLOCK)):
        first = block * _BLOCK
        generator.manual_seed(derived_key(*key, block))
        # a block is always drawn whole, or else a shard would begin in the middle of the generator's sequence
        values = buffer[: min(_BLOCK, numel - first)].normal_(generator=generator)
        begin, end = max(first, start), min(first + _BLOCK, stop)
        yield begin - start, end - start, values[begin - first : end - first]


def direction(like: Tensor, key: Sequence[int]) -> Tensor:
    r"""Return the whole direction :math:`z \sim N(0, I)` of a parameter.

    Args:
        like: Gives shape, device and dtype; of less than 32 bits, :math:`z` is float32.
        key: Numbers that :math:`z` is a pure function of on a kind of device, such as a seed, the number of the
            parameter and a count of steps.

    Example:
        >>> weight = torch.zeros(2, 3)
        >>> torch.equal(direction(weight, (0, 1)), direction(weight, (0, 1)))
        True
        >>> torch.equal(direction(weight, (0, 1)), direction(weight, (0, 2)))
        False
    """
    parts = [values.clone() for _, _, values in _blocks(like, like.numel(), 0, like.numel(), key)]
    return torch.cat(parts).view(like.shape) if parts else torch.empty_like(like)


def move_along_(
    weight: Tensor, alpha: float, key: Sequence[int], *, keep: float = 1.0, start: int = 0, numel: int | None = None
) -> None:
    r"""Move weights along a direction, in place and with one block of it in memory at a time.

    .. math:: \theta \leftarrow c \, \theta + \alpha z.

    Each weight is rounded to its dtype once.

    Args:
        weight: Contiguous, any shape: a whole parameter, or the part of a sharded one that begins at ``start``.
        alpha: :math:`\alpha`.
        key: As in :func:`direction`; a shard moves along its part of the direction of the whole parameter.
        keep: :math:`c`.
        start: Where ``weight`` begins in the flattened parameter.
        numel: Elements of the whole parameter; those of ``weight`` if ``None``.

    Example:
        >>> weight = torch.ones(4)
        >>> move_along_(weight, 0.5, (0, 1))
        >>> torch.equal(weight, 1 + 0.5 * direction(weight, (0, 1)))
        True
        >>> part = torch.ones(2)
        >>> move_along_(part, 0.5, (0, 1), start=2, numel=4)
        >>> torch.equal(part, weight[2:])
        True
    """
    flat = weight.view(-1)
    for begin, end, values in _blocks(weight, numel or weight.numel(), start, start + weight.numel(), key):
        if keep == 1.0:
            flat[begin:end].add_(values, alpha=alpha)
        else:
            flat[begin:end].copy_(values.mul_(alpha).add_(flat[begin:end], alpha=keep))
