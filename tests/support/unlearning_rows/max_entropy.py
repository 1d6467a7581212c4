"""Maximum entropy as a plain loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_cl.unlearning import MaximumEntropy
from unlearning_contract import Batch, LossRow, PlainLoss
from unlearning_rows.undial import positions


class Uniform(PlainLoss):
    """Token by token, the divergence of uniform from the model."""

    def forget(self, model: nn.Module, reference: nn.Module, batch: Batch) -> Tensor:
        scores, terms = model(batch.inputs), []
        for place, _ in positions(batch):
            p = scores[place].softmax(0)
            terms.append((torch.log(1 / (len(p) * p)) / len(p)).sum())
        return torch.stack(terms).mean()


ROWS = {"max-entropy": LossRow(MaximumEntropy, {}, Uniform)}
