r"""Which coordinates of a weight move, and how much: a movability from 0 (held) to 1 (free) for each of them.

Everything is elementwise on plain tensors, so it runs on local shards as it is; only :func:`kth_largest` must be told
how to add up counts over the shards of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["half_of_each", "hold_gradient_", "kth_largest", "scale_update_", "unit_importance"]

# shift and width of the digits of a float's 31 bits without its sign; a histogram of 2048 counts at most
_DIGITS = ((20, 11), (10, 10), (0, 10))


@torch.no_grad()
def hold_gradient_(gradient: Tensor, mask: Tensor) -> None:
    """Set the gradient of held coordinates to 0.

    Args:
        gradient: Changed in place.
        mask: 0 for held and 1 for free, of a shape that broadcasts to that of the gradient.

    Example:
        >>> gradient = torch.tensor([1.0, 2.0, 3.0])
        >>> hold_gradient_(gradient, torch.tensor([0.0, 1.0, 1.0]))
        >>> gradient
        tensor([0., 2., 3.])
    """
    gradient.mul_(mask.to(gradient.dtype))


@torch.no_grad()
def scale_update_(weight: Tensor, before: Tensor, movability: Tensor | float) -> None:
    r"""Replace a weight after a step by :math:`\theta_{before} + m (\theta - \theta_{before})`.

    A finite weight of movability 0 is exactly what it was, and one of movability 1 exactly what the step made of it.
    Half-precision weights are computed in float32 and rounded once.

    Args:
        weight: :math:`\theta`, changed in place.
        before: :math:`\theta_{before}`, of the same shape.
        movability: :math:`m`, a number or a tensor that broadcasts to the shape of the weight.

    Example:
        >>> weight = torch.tensor([1.0, 2.0, 3.0])
        >>> scale_update_(weight, torch.zeros(3), torch.tensor([0.0, 0.5, 1.0]))
        >>> weight
        tensor([0., 1., 3.])
    """
    if isinstance(movability, Tensor) and movability.dtype != weight.dtype:
        weight.copy_(torch.lerp(before.to(movability.dtype), weight.to(movability.dtype), movability))
    else:
        torch.lerp(before, weight, movability, out=weight)


@torch.no_grad()
def kth_largest(
    magnitudes: Sequence[Tensor], ranks: Sequence[int], total: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    r"""Return the k-th largest entry of each tensor, whatever part of the tensor this process holds.

    The bits of a float that is not negative, read as an integer, are in the order of the floats. Three histograms of
    their digits, from the highest, find the entry exactly; shards add their histograms up.

    Args:
        magnitudes: Local shards, float32, contiguous, not negative.
        ranks: k for each tensor, from 1 to its number of entries over all shards.
        total: Sums counts, int64 [tensors, bins], over the shards of each tensor; not needed for whole tensors.

    Returns:
        The entries, float32 [tensors].

    Example:
        >>> kth_largest([torch.tensor([3.0, 1.0, 2.0]), torch.tensor([5.0, 5.0])], [2, 1])
        tensor([2., 5.])
    """
    keys = [magnitude.view(torch.int32).flatten() for magnitude in magnitudes]
    device = keys[0].device
    remaining = torch.tensor(ranks, device=device)
    found = torch.zeros(len(keys), dtype=torch.int64, device=device)
    for shift, width in _DIGITS:
        bins = 1 << width
        prefixes = [key >> shift for key in keys]
        counts = torch.stack([torch.bincount(prefix & (bins - 1), minlength=bins) for prefix in prefixes])
        if total is not None:
            counts = total(counts)
        # entries in a bin or above it, from the highest bin down
        above = counts.flip(1).cumsum(1)
        steps = (above < remaining[:, None]).sum(1)
        passed = above.gather(1, (steps - 1).clamp(min=0)[:, None]).squeeze(1)
        remaining = remaining - torch.where(steps > 0, passed, 0)
        found = (found << width) | (bins - 1 - steps)
        if shift:
            keys = [key[prefix == digit] for key, prefix, digit in zip(keys, prefixes, found, strict=True)]
    return found.to(torch.int32).view(torch.float32)


def unit_importance(sums: Tensor) -> Tensor:
    r"""Return :math:`|\tanh(z)|`, :math:`z` being the sums of a layer's units brought to mean 0 and variance 1.

    Args:
        sums: One number for each unit, such as the absolute gradients of its gate summed over samples, [units].

    Returns:
        From 0 to 1, [units]; 0 for units that do not differ.

    Example:
        >>> unit_importance(torch.tensor([1.0, 1.0, 1.0, 5.0]))
        tensor([0.4621, 0.4621, 0.4621, 0.9051])
    """
    centred = sums - sums.mean()
    spread = centred.square().sum().div(max(len(sums) - 1, 1)).sqrt()
    return torch.where(spread > 0, centred / spread, 0.0).tanh().abs()


def half_of_each(sizes: Sequence[int], generator: torch.Generator) -> list[list[int]]:
    """Choose half of the members of each group at random, and never more than half of all.

    Of a group of odd size, the one between is chosen in a random half of such groups.

    Args:
        sizes: Members of each group.
        generator: Where the choice comes from, on the CPU.

    Returns:
        The chosen positions in each group, in order.

    Example:
        >>> half_of_each([4, 3, 3], torch.Generator().manual_seed(0))
        [[0, 3], [1, 2], [1]]
    """
    odd = [group for group, size in enumerate(sizes) if size % 2]
    order = torch.randperm(len(odd), generator=generator).tolist()
    rounded_up = {odd[position] for position in order[: len(odd) // 2]}
    return [
        sorted(torch.randperm(size, generator=generator)[: size // 2 + (group in rounded_up)].tolist())
        for group, size in enumerate(sizes)
    ]
