"""The datamodule of a model that is there already and must forget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lightning_cl.core.requests import ForgetRequest
from lightning_cl.datamodules.scenarios import DataIncremental
from lightning_cl.datamodules.stream import Data, TaskStreamDataModule

__all__ = ["UnlearningDataModule"]


class UnlearningDataModule(TaskStreamDataModule):
    """The training data of a model that has learned them, and requests to forget parts of them.

    One ``Trainer.fit`` serves the requests in their order. A batch is ``{"forget": batch, "retain": batch}``; an epoch
    is a pass over what a request forgets, with as many retained samples, drawn on every rank anew from the training
    data without what this and earlier requests name. It is a :class:`TaskStreamDataModule` whose learning is done.

    Args:
        train: What the model was trained on: data as for :class:`TaskStreamDataModule`.
        val: Validation data: samples that the model never saw, for its utility and as the other side of membership
            inference.
        test: Test data.
        requests: What to forget, in order; their ``after`` has no meaning here.
        batch_size: Samples to forget for each rank and step; at least 1.
        epochs_per_request: Passes over what a request forgets; at least 1.
        num_workers: Worker processes of each loader.
        collate_fn: Joins a list of samples to a batch; torch's default if ``None``.
        seed: Seed of the order and of the draws.
        label: Key or position of the label in a sample, where it is not ``"label"``, ``"labels"`` or the last element.

    Raises:
        ValueError: If there is no request, or as :class:`TaskStreamDataModule` does.

    Example:
        >>> import torch
        >>> inputs, labels = torch.randn(8, 2), torch.tensor([0, 1, 2, 3] * 2)
        >>> data = UnlearningDataModule((inputs, labels), requests=[ForgetRequest("class 3", classes=[3])])
        >>> data.setup("fit")
        >>> request = data.tasks[-1]
        >>> request.kind, data.forgotten_ids(request).tolist(), len(data.retained_ids(request))
        ('forget', [3, 7], 6)
    """

    def __init__(
        self,
        train: Data,
        val: Data | None = None,
        test: Data | None = None,
        *,
        requests: list[ForgetRequest],
        batch_size: int = 64,
        epochs_per_request: int = 1,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        seed: int = 0,
        label: str | int | None = None,
    ) -> None:
        if not requests:
            raise ValueError("`requests` must name what to forget, such as `[ForgetRequest('class 3', classes=[3])]`.")
        super().__init__(
            train,
            val,
            test,
            scenario=DataIncremental(n_tasks=1),
            batch_size=batch_size,
            epochs_per_task=0,
            num_workers=num_workers,
            collate_fn=collate_fn,
            seed=seed,
            label=label,
            requests=[replace(request, after=None) for request in requests],
            epochs_per_request=epochs_per_request,
        )
