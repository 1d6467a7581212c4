"""What measurements of per-sample gradients at a task's end share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.distributed import max_over_ranks, sum_over_ranks_
from lightning_cl.core.task_data import IdentifiedData, task_batches

__all__ = ["Measurement", "is_sharded", "mean_over_samples", "on_any_rank", "single_rows", "sum_over_samples"]


class Measurement(ABC):
    """A mean over samples of what their gradients say: the importances of weights.

    Attributes:
        quantity: What is measured, for errors.
        adapter: Reads batches.
        n_samples: Samples over all ranks; the whole task if ``None``.
        by_sample: Whether it goes sample by sample; ``None`` before :meth:`check` found out.
    """

    quantity: ClassVar[str]
    adapter: BatchAdapter
    n_samples: int | None
    by_sample: bool | None = None

    @abstractmethod
    def check(self, pl_module: LightningModule, parameters: Mapping[str, Parameter], batch: Any) -> None:
        """Try it on a training batch, and raise what would fail at the task's end."""

    @abstractmethod
    def sums_over(
        self,
        batches: Iterable[tuple[Any, Tensor]],
        pl_module: LightningModule,
        parameters: Mapping[str, Tensor],
        seed: int,
    ) -> tuple[dict[str, Tensor], float]:
        """Return sums over the samples of all ranks, as local shards, and the number of samples.

        Args:
            batches: This rank's batches on the device, with the identities of their samples, int64 [n].
            pl_module: The user's module.
            parameters: The parameters by name.
            seed: Seeds what is drawn at random.
        """

    @abstractmethod
    def rehearse(
        self, pl_module: LightningModule, parameters: Mapping[str, Parameter], batch: Any
    ) -> dict[str, Tensor]:
        """Do with a batch of any values, or none, what :meth:`estimate` does, for its memory."""

    def estimate(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        parameters: Mapping[str, Parameter],
        seed: int,
        sample_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the mean over the current task, float32, in the placement of each parameter.

        Of sharded parameters a rank holds its shard of the sums, and one layer in full for as long as it is added.

        Args:
            trainer: The running Trainer.
            pl_module: The user's module.
            parameters: The parameters by name.
            seed: Seeds what is drawn at random.
            sample_ids: Identities of samples to measure on in the place of the task's.

        Raises:
            ValueError: If the task holds no sample.
        """
        batches = task_batches(trainer, pl_module, self.adapter, self.n_samples, sample_ids)
        if not isinstance(trainer.datamodule, IdentifiedData):  # type: ignore[attr-defined]
            # each rank counts from 0, and reads every world_size-th sample
            batches = ((batch, ids * trainer.world_size + trainer.global_rank) for batch, ids in batches)
        sums, count = self.sums_over(batches, pl_module, parameters, seed)
        return mean_over_samples(sums, count, self.quantity)


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
