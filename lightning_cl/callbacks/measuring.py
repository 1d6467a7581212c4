"""What measurements of per-sample gradients at a task's end share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_cl.core.distributed import max_over_ranks, sum_over_ranks_

__all__ = ["is_sharded", "mean_over_samples", "on_any_rank", "single_rows", "sum_over_samples"]


def on_any_rank(flag: bool, pl_module: LightningModule) -> bool:
    """Return whether ``flag`` holds on a rank: those of a sharded model must run the same forwards."""
    return max_over_ranks(int(flag), pl_module.device) > 0


def is_sharded(parameters: Mapping[str, Tensor]) -> bool:
    """Return whether a parameter is split over ranks."""
    return any(isinstance(parameter, DTensor) for parameter in parameters.values())


def single_rows(size: int, pl_module: LightningModule, sharded: bool) -> Iterator[tuple[int, bool]]:
    """Yield the rows of a batch one by one; ranks of a sharded model with fewer of them go on with idle ones."""
    # they must run the same forwards
    rounds = max_over_ranks(size, pl_module.device) if sharded else size
    return ((min(row, max(size - 1, 0)), row >= size) for row in range(rounds))


def sum_over_samples(
    sums: Mapping[str, Tensor], count: int, pl_module: LightningModule
) -> tuple[dict[str, Tensor], float]:
    """Add up the sums and the samples of all ranks.

    Args:
        sums: Sums over this rank's samples, in place; of sharded parameters over those of all ranks.
        count: This rank's samples.
        pl_module: The user's module.

    Returns:
        Local shards by name, and the samples of all ranks.
    """
    total = sum_over_ranks_(torch.tensor(float(count), device=pl_module.device, dtype=torch.float64))
    # sums of sharded parameters are over all ranks already
    whole = (value.to_local() if isinstance(value, DTensor) else sum_over_ranks_(value) for value in sums.values())
    return dict(zip(sums, whole, strict=True)), float(total)


def mean_over_samples(sums: Mapping[str, Tensor], count: float, quantity: str) -> dict[str, Tensor]:
    """Divide what :func:`sum_over_samples` returned, in place.

    Args:
        sums: Sums over all samples.
        count: The samples.
        quantity: What is measured, for the error.

    Raises:
        ValueError: If there is no sample.
    """
    if not count:
        raise ValueError(f"The task holds no sample to measure the {quantity} on.")
    return {name: value.div_(count) for name, value in sums.items()}
