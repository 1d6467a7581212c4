"""How much weights matter for given samples, of any module, with a Trainer or without."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import cross_entropy
from typing_extensions import override

from lightning_cl.callbacks.fisher import FisherEstimator
from lightning_cl.callbacks.sensitivity import OutputSensitivity
from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.checks import check_choice
from lightning_cl.core.distributed import rank, world_size

__all__ = ["Importance", "SteppedModule", "importance_estimator", "importance_sums", "numbered"]

Importance = Literal["fisher", "sensitivity"]


def importance_estimator(
    importance: Importance, adapter: BatchAdapter, logits: str | None
) -> FisherEstimator | OutputSensitivity:
    """Return what measures an importance: squared gradients of the loss, or absolute ones of the output's norm.

    Raises:
        ValueError: If the importance is unknown.
    """
    check_choice("importance", importance, get_args(Importance))
    if importance == "fisher":
        return FisherEstimator("empirical", adapter, None, logits)
    return OutputSensitivity(adapter, None, logits)


def importance_sums(
    estimator: FisherEstimator | OutputSensitivity,
    batches: Iterable[tuple[Any, Tensor]],
    pl_module: LightningModule,
    parameters: Mapping[str, Parameter],
    seed: int,
) -> tuple[dict[str, Tensor], float]:
    """Return the sums of an importance over samples of all ranks, as local shards, and the number of samples.

    Args:
        estimator: Measures it, after a look at the first batch.
        batches: This rank's batches on the device, with identities.
        pl_module: The module.
        parameters: The parameters by name.
        seed: Seeds what is drawn.

    Raises:
        ValueError: If there is no sample.
    """
    source = iter(batches)
    first = next(source, None)
    if first is not None:
        estimator.check(pl_module, parameters, first[0])
        sums, count = estimator.sums_over(chain([first], source), pl_module, parameters, seed)
    if first is None or not count:
        raise ValueError(f"There is no sample to measure the {estimator.quantity} on.")
    return sums, count


def numbered(batches: Iterable[Any], adapter: BatchAdapter) -> Iterator[tuple[Any, Tensor]]:
    """Pair batches without identities with numbers of their samples, different on every rank."""
    read = 0
    for batch in batches:
        size = adapter.size(batch)
        yield batch, torch.arange(read, read + size) * world_size() + rank()
        read += size


class SteppedModule(LightningModule):
    """Gives any module a training step, so that it can be measured as a LightningModule is.

    Args:
        module: The module, which is not copied.
        loss: Returns the loss of a batch. By default that of a mapping's ``module(**batch)``, else the cross-entropy.
        adapter: Reads batches.
        labelled: Whether a loss is needed at all.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[nn.Module, Any], Tensor] | None,
        adapter: BatchAdapter,
        *,
        labelled: bool,
    ) -> None:
        super().__init__()
        self.module = module
        self.loss = loss
        self.adapter = adapter
        self.labelled = labelled
        # tells Lightning's part of the module where its parameters are
        self.to(next(module.parameters()).device)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.loss is not None:
            return self.loss(self.module, batch)
        if isinstance(batch, Mapping):
            output = self.module(**batch)
            loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        else:
            output = self.module(self.adapter.inputs(batch))
            labels = self.adapter.labels(batch)
            loss = None if labels is None else cross_entropy(output, labels)
        if not self.labelled:
            return torch.zeros(())
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"A batch of type {type(batch).__name__} gives {type(self.module).__name__} no loss. Say by `loss` what"
                " it is, or measure by `importance='sensitivity'`, which needs none."
            )
        return loss
