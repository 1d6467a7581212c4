"""Dynamic ConPET (Song et al. 2023, "Continual Parameter-Efficient Tuning for Large Language Models")."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_cl.adapters.routed import RoutedSlots
from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_count, check_positive
from lightning_cl.core.distributed import copy_of_rank_zero_
from lightning_cl.core.requests import Influence, RequestStream
from lightning_cl.core.rng import derived_seed
from lightning_cl.functional.task_selector import likeliest_tasks, train_selector

__all__ = ["DynamicConPET"]


class DynamicConPET(RoutedSlots):
    r"""Train a LoRA adapter for each task, and let a trained selector choose those that answer for a sample.

    The selector is softmax regression on tasks over the features :math:`\varphi(x)` of the frozen base, trained anew at
    each task's start on kept features of all tasks. In evaluation a sample runs with the adapters of the ``top_k``
    likeliest tasks, one after another, and its class scores are joined: each adapter gives those of its own task's
    classes, and classes of other tasks are out.

    Args:
        top_k: Tasks for a sample, from 1. The module runs ``top_k + 1`` times in evaluation.
        memory: Feature vectors kept for the selector, over all tasks in equal shares.
        penalty: Factor :math:`\lambda` of the squared weights of the selector; above 0.
        mask_classes: Whether a sample is given the classes of its tasks only, in training and in evaluation; needed for
            ``top_k`` above 1, and without effect where all tasks have the same classes.
        features: Name of the submodule whose output is :math:`\varphi(x)`; the input of the last linear layer if
            ``None``. Of a sequence of vectors the mean is taken.
        logits: Name of the submodule that returns the class scores; found by itself in most modules.
        n_samples: Samples of a task to read features of, over all ranks; the whole task if ``None``.
        batch_adapter: Reads batches of an uncommon structure.
        capacity: Rank of the slot for finished tasks, at least tasks times r.
        seed: Seed of the fresh adapters and of which features are kept.

    Raises:
        ValueError: As :class:`CoLoR`, and for ``top_k`` above 1 without ``mask_classes``.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="dynamic-conpet",
        family="adapters",
        paper="Song et al. 2023, arXiv:2309.14763",
        needs="a PEFT model with LoRA; class labels for mask_classes",
        state="r ranks for each adapted layer and a head for each task; memory feature vectors",
    )

    def __init__(
        self,
        *,
        top_k: int = 1,
        memory: int = 2000,
        penalty: float = 0.01,
        mask_classes: bool = True,
        features: str | None = None,
        logits: str | None = None,
        n_samples: int | None = None,
        batch_adapter: BatchAdapter | None = None,
        capacity: int = 64,
        seed: int = 0,
    ) -> None:
        check_count("top_k", top_k)
        check_count("memory", memory)
        check_positive("penalty", penalty)
        if top_k > 1 and not mask_classes:
            raise ValueError(
                f"`top_k={top_k}` joins the scores that several adapters give to classes of their own, which"
                " `mask_classes=False` does not tell apart: use `top_k=1`."
            )
        super().__init__(
            mask_classes=mask_classes,
            features_from="base",
            features=features,
            logits=logits,
            n_samples=n_samples,
            batch_adapter=batch_adapter,
            capacity=capacity,
            seed=seed,
        )
        self.top_k = top_k
        self.memory = memory
        self.penalty = penalty
        # features of each task, in an order drawn once, and the identities of their samples
        self._kept: list[Tensor] = []
        self._kept_ids: list[Tensor] = []
        self._selector: tuple[Tensor, Tensor] | None = None

    @property
    @override
    def known(self) -> int:
        return 0 if self._selector is None else len(self._kept)

    @override
    def learn(self, index: int, features: Tensor, sample_ids: Tensor) -> None:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "selector", index))
        order = torch.randperm(len(features), generator=generator)
        share = max(self.memory // (index + 1), 1)
        kept, ids = (
            [*self._kept[:index], features[order.to(features.device)]],
            [*self._kept_ids[:index], sample_ids[order]],
        )
        self._kept = [rows[:share].clone() for rows in kept]
        self._kept_ids = [rows[:share].clone() for rows in ids]
        self._train(features.device)

    def _train(self, device: torch.device) -> None:
        tasks = [torch.full((len(rows),), task) for task, rows in enumerate(self._kept)]
        everything = torch.cat([rows.to(device) for rows in self._kept])
        weight, bias = train_selector(everything, torch.cat(tasks).to(device), len(self._kept), self.penalty)
        # devices may round unlike
        self._selector = copy_of_rank_zero_(weight), copy_of_rank_zero_(bias)

    @override
    def forget_samples(self, trainer: Trainer, pl_module: LightningModule, sample_ids: Tensor) -> list[Influence]:
        if not isinstance(trainer.datamodule, RequestStream):  # type: ignore[attr-defined]
            # they cannot be told from others
            return [Influence(type(self).__name__, "feature vectors in memory", "remains")] if self._kept else []
        stay = [~torch.isin(ids, sample_ids.cpu()) for ids in self._kept_ids]
        removed = sum(int((~mask).sum()) for mask in stay)
        name = type(self).__name__
        found = [Influence(name, "feature vectors in memory", "removed", removed)]
        if removed:
            self._kept = [rows[mask.to(rows.device)] for rows, mask in zip(self._kept, stay, strict=True)]
            self._kept_ids = [ids[mask] for ids, mask in zip(self._kept_ids, stay, strict=True)]
            self._selector = None
            if any(len(rows) for rows in self._kept):
                self._train(pl_module.device)
                found.append(Influence(name, "the selector", "recomputed"))
        return found

    @override
    def choose(self, features: Tensor) -> Tensor:
        assert self._selector is not None
        weight, bias = (part.to(features.device) for part in self._selector)
        return likeliest_tasks(features, weight, bias)[:, : self.top_k]

    @override
    def feature_rows(self, tasks: int) -> int:
        # the selector has a row for each task
        return max(self.memory, tasks) + tasks

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "kept": list(self._kept),
            "kept_ids": list(self._kept_ids),
            "selector": self._selector,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._kept, selector = list(state_dict["kept"]), state_dict["selector"]
        self._kept_ids = list(state_dict["kept_ids"])
        self._selector = None if selector is None else tuple(selector)
