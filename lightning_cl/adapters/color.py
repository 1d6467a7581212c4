"""CoLoR (Wistuba et al. 2023, "Continual Learning with Low Rank Adaptation", arXiv:2311.17601)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_cl.adapters.routed import RoutedSlots
from lightning_cl.adapters.router import PrototypeRouter
from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.card import MethodCard
from lightning_cl.core.requests import Influence, RequestStream
from lightning_cl.core.task import Task
from lightning_cl.functional.prototypes import Metric

__all__ = ["CoLoR"]


class CoLoR(RoutedSlots):
    r"""Train a LoRA adapter for each task, and give each sample that of the task with the nearest prototype.

    Of the features :math:`\varphi(x)` of the samples of task t, computed by the frozen base, k-means makes k
    prototypes :math:`\mu_{t1} \dots \mu_{tk}`. In evaluation a sample gets the adapter of the task

    .. math:: \hat{t}(x) = \arg\min_t \min_j \| \varphi(x) - \mu_{tj} \|

    and a head of its own where one is trained beside the adapters. The prototypes are made at a task's start: the base
    does not change in training.

    Args:
        k: Prototypes of a task, from 1.
        features_from: ``"base"``, or ``"first"`` (CoLoR++): the base with the first task's adapter. Then those of
            the first task are made at its end.
        metric: Distance of a prototype: ``"euclidean"``, ``"cosine"`` or ``"manhattan"``.
        mask_classes: Whether a sample is given the classes of its task only, in training and in evaluation: for
            class-incremental streams, and without effect where all tasks have the same classes.
        features: Name of the submodule whose output is :math:`\varphi(x)`; the input of the last linear layer if
            ``None``. Of a sequence of vectors the mean is taken.
        logits: Name of the submodule that returns the class scores; found by itself in most modules.
        n_samples: Samples of a task that prototypes are made of, over all ranks; the whole task if ``None``.
        batch_adapter: Reads batches of an uncommon structure.
        capacity: Rank of the slot for finished tasks, at least tasks times r.
        seed: Seed of the fresh adapters and of k-means.

    Attributes:
        router: The prototypes.

    Raises:
        ValueError: For a setting out of range; at the start of a fit as :class:`AdapterSlots`, for a capacity that is
            too small for the tasks of the stream, for a memory of samples or a teacher of the task before beside it,
            for manual optimization where something has to be found or masked, and for trainable parameters that belong
            neither to the slots nor to one linear layer; at the start of a task for features or class scores that are
            not found, and for an adapted layer whose first dimension is not that of the samples.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="color",
        family="adapters",
        paper="Wistuba et al. 2023, arXiv:2311.17601",
        needs="a PEFT model with LoRA; class labels for mask_classes",
        state="r ranks for each adapted layer, k feature vectors and a head, for each task",
    )

    def __init__(
        self,
        *,
        k: int = 5,
        features_from: Literal["base", "first"] = "base",
        metric: Metric = "euclidean",
        mask_classes: bool = True,
        features: str | None = None,
        logits: str | None = None,
        n_samples: int | None = None,
        batch_adapter: BatchAdapter | None = None,
        capacity: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(
            mask_classes=mask_classes,
            features_from=features_from,
            features=features,
            logits=logits,
            n_samples=n_samples,
            batch_adapter=batch_adapter,
            capacity=capacity,
            seed=seed,
        )
        self.k = k
        self.metric = metric
        self.router = PrototypeRouter(k, metric, seed=seed)
        # identities of the samples that a task's prototypes are made of, and tasks that some were forgotten of
        self._clustered: dict[int, Tensor] = {}
        self._stale: set[int] = set()

    @property
    @override
    def known(self) -> int:
        return len(self.router)

    @override
    def learn(self, index: int, features: Tensor, sample_ids: Tensor) -> None:
        self.router.add(index, features)
        self._clustered[index] = sample_ids

    # ------------------------------------------------------------------ requests to forget

    @override
    def forget_samples(self, trainer: Trainer, pl_module: LightningModule, sample_ids: Tensor) -> list[Influence]:
        kept = {index: ids[~torch.isin(ids, sample_ids.cpu())] for index, ids in self._clustered.items()}
        self._stale |= {index for index, ids in kept.items() if len(ids) < len(self._clustered[index])}
        self._clustered = kept
        emptied = [index for index in self._stale if not len(kept[index])]
        for index in emptied:
            # no sample is given the adapter of a task that is forgotten as a whole
            del self.router.prototypes[index], self._clustered[index]
        self._stale -= set(emptied)
        name = type(self).__name__
        return [Influence(name, "prototypes of tasks", "removed", len(emptied))] if emptied else []

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        found = super().renew_state(trainer, pl_module, task)
        if self._stale:
            readable = isinstance(trainer.datamodule, RequestStream)  # type: ignore[attr-defined]
            for index in sorted(self._stale) if readable else ():
                self._learn(trainer, pl_module, index, self._clustered[index])
            outcome: Literal["recomputed", "remains"] = "recomputed" if readable else "remains"
            found.append(Influence(type(self).__name__, "prototypes of tasks", outcome, len(self._stale)))
            self._stale = set()
        return found

    # ------------------------------------------------------------------ checkpoints

    @override
    def choose(self, features: Tensor) -> Tensor:
        return self.router.nearest(features)[:, None]

    @override
    def feature_rows(self, tasks: int) -> int:
        return tasks * self.k

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "router": self.router.state_dict(),
            "clustered": dict(self._clustered),
            "stale": sorted(self._stale),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.router.load_state_dict(state_dict["router"])
        self._clustered, self._stale = dict(state_dict["clustered"]), set(state_dict["stale"])
