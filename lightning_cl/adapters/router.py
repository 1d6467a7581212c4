"""Which task a sample is of: prototypes of each task's features, and how those features are read."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.capture import OutputCapture, run_step, undisturbed
from lightning_cl.core.checks import check_choice, check_count
from lightning_cl.core.distributed import copy_of_rank_zero_, gather_rows
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.task_data import task_batches
from lightning_cl.functional.prototypes import Metric, k_means, prototype_distances
from lightning_cl.functional.routing import pooled_features

__all__ = ["PrototypeRouter", "task_features"]


class PrototypeRouter:
    """Keeps k centres of the features of each task, and finds the task of the nearest one.

    Args:
        k: Centres of a task, from 1.
        metric: ``"euclidean"``, ``"cosine"`` or ``"manhattan"``.
        seed: Seeds the starts of k-means.

    Attributes:
        prototypes: The centres of each task, float32 [k, D], by the task's index.

    Raises:
        ValueError: For a setting out of range.

    Example:
        >>> router = PrototypeRouter(k=1)
        >>> router.add(0, torch.tensor([[0.0, 0.0], [2.0, 0.0]]))
        >>> router.add(1, torch.tensor([[9.0, 9.0]]))
        >>> router.nearest(torch.tensor([[1.0, 1.0], [8.0, 5.0]]))
        tensor([0, 1])
    """

    def __init__(self, k: int = 5, metric: Metric = "euclidean", *, seed: int = 0) -> None:
        check_count("k", k)
        check_choice("metric", metric, ("euclidean", "cosine", "manhattan"))
        self.k = k
        self.metric = metric
        self.seed = seed
        self.prototypes: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.prototypes)

    def add(self, task: int, features: Tensor) -> None:
        """Make the prototypes of a task of its features [N, D], those of all ranks; all ranks must call it."""
        centres = k_means(features, self.k, seed=derived_seed(self.seed, "prototypes", task))
        # devices may round unlike
        self.prototypes[task] = copy_of_rank_zero_(centres.contiguous())

    def distances(self, features: Tensor) -> Tensor:
        """Return the distance of each row of features [B, D] from the nearest prototype of each task, [B, tasks].

        Columns are in the order of the tasks' indices.
        """
        prototypes = [self.prototypes[task].to(features.device) for task in sorted(self.prototypes)]
        distances = prototype_distances(features, torch.cat(prototypes), self.metric)
        return torch.stack([part.amin(1) for part in distances.split([len(p) for p in prototypes], 1)], 1)

    def nearest(self, features: Tensor) -> Tensor:
        """Return the index of the task whose prototype is nearest to each row of features [B, D], int64 [B]."""
        tasks = torch.tensor(sorted(self.prototypes), device=features.device)
        return tasks[self.distances(features).argmin(1)]

    def state_dict(self) -> dict[str, Any]:
        """Return the prototypes."""
        return {"prototypes": dict(self.prototypes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` returned."""
        self.prototypes = dict(state["prototypes"])


def task_features(
    trainer: Trainer,
    pl_module: LightningModule,
    adapter: BatchAdapter,
    capture: OutputCapture,
    around: AbstractContextManager[Any],
    n_samples: int | None = None,
    sample_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the features of the current task's samples on all ranks, float32 [N, D], and the samples' identities.

    All ranks must call it.

    On a task stream they come in the order of the samples' identities, whatever the number of ranks and batches.

    Args:
        trainer: The running Trainer.
        pl_module: The user's module.
        adapter: Reads batches.
        capture: Records the features in a forward.
        around: What the forwards run in, such as with the adapters off.
        n_samples: Samples to read over all ranks; all if ``None``.
        sample_ids: Identities of samples to read in the place of the task's.

    Raises:
        ValueError: If what is recorded has not one row for each sample.
    """
    rows, identities = [], []
    with undisturbed(pl_module, seed=0), around, capture, torch.no_grad():
        for batch, found in task_batches(trainer, pl_module, adapter, n_samples, sample_ids):
            run_step(pl_module, batch, adapter)
            pooled = pooled_features(capture.output, adapter.padding_mask(batch))
            if len(pooled) != adapter.size(batch):
                raise ValueError(
                    f"Prototypes need one row of features for each sample, and for {adapter.size(batch)} samples found"
                    f" the shape {list(capture.output.shape)}. Name another submodule by `features`."
                )
            rows.append(pooled)
            identities.append(found)
    features, _ = gather_rows(torch.cat(rows))
    joined = gather_rows(torch.cat(identities).to(features.device))[0]
    order = joined.argsort(stable=True)
    return features[order], joined[order].cpu()
