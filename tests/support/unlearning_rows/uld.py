"""ULD as a plain loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_cl.unlearning import ULD
from unlearning_contract import Batch, LossRow, PlainLoss, nlls


class Assistant(PlainLoss):
    """What is forgotten is learned, and what is retained becomes a guess at every attended position."""

    def forget(self, model: nn.Module, reference: nn.Module, batch: Batch) -> Tensor:
        return torch.cat(nlls(model, batch)).mean()

    def retain(self, model: nn.Module, reference: nn.Module, batch: Batch) -> Tensor:
        log_p = model(batch.inputs).log_softmax(-1)
        rows = log_p if batch.mask is None else log_p[batch.mask]
        return (-math.log(rows.shape[-1]) - rows.mean(-1)).mean()


ROWS = {"uld": LossRow(ULD, {}, Assistant, retain="own")}
