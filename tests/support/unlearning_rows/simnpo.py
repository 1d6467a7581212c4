"""SimNPO as a plain loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_cl.unlearning import SimNPO
from unlearning_contract import Batch, LossRow, PlainLoss, nlls


class SimplePreference(PlainLoss):
    """The mean likelihood of each row's tokens, by its definition."""

    def forget(self, model: nn.Module, reference: nn.Module, batch: Batch) -> Tensor:
        beta, delta = self.settings["beta"], self.settings["delta"]
        terms = [torch.log(1 + torch.exp(beta * (delta - row.mean()))) for row in nlls(model, batch)]
        return 2 / beta * torch.stack(terms).mean()


ROWS = {"simnpo": LossRow(SimNPO, {"beta": 1.5, "delta": 0.2}, SimplePreference)}
