"""PDU as a plain loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_cl.unlearning import PDU
from unlearning_contract import Batch, LossRow, PlainLoss
from unlearning_rows.undial import positions


class PrimalDual(PlainLoss):
    """Flat logits and a multiplier that is moved by hand."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.mu, self.steps = settings["mu"], 0

    def forget(self, model: nn.Module, reference: nn.Module, batch: Batch) -> Tensor:
        scores = model(batch.inputs)
        rows = [scores[place] for place, _ in positions(batch)]
        return torch.stack([(row.max() - row.sum() / len(row)) ** 2 for row in rows]).mean()

    def weigh(self, weight: float, term: Tensor) -> Tensor:
        return weight * self.mu * (term - self.settings["epsilon"])

    def after_step(self, retain_loss: float) -> None:
        self.steps += 1
        if self.steps > self.settings["warmup_steps"]:
            self.mu = max(0.0, self.mu + self.settings["eta"] * (retain_loss - self.settings["epsilon"]))


ROWS = {"pdu": LossRow(PDU, {"epsilon": 0.3, "eta": 0.5, "mu": 1.0, "warmup_steps": 2}, PrimalDual)}
