"""Gradient ascent as a plain loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_cl.unlearning import GradientAscent
from unlearning_contract import Batch, LossRow, PlainLoss, nlls


class Ascent(PlainLoss):
    """A hinge on every token, or none."""

    def forget(self, model: nn.Module, reference: nn.Module, batch: Batch) -> Tensor:
        bound = self.settings["bound"]
        if bound == "uniform":
            bound = math.log(8 if batch.labels.ndim == 2 else 4)
        tokens = torch.cat(nlls(model, batch))
        return -tokens.mean() if bound is None else sum((bound - t).clamp(min=0) for t in tokens) / len(tokens)


ROWS = {
    "gradient-ascent": LossRow(GradientAscent, {"bound": "uniform"}, Ascent),
    "gradient-ascent-alone": LossRow(GradientAscent, {"bound": 1.2}, Ascent, retain=None),
}
