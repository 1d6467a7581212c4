"""DPO as a plain loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_cl.unlearning import DPO
from unlearning_contract import Batch, LossRow, PlainLoss, nlls


class Preferred(PlainLoss):
    """The ratios of both answers, by their definition."""

    def forget(self, model: nn.Module, reference: nn.Module, batch: Batch) -> Tensor:
        beta = self.settings["beta"]
        ratios = []
        for answer in (batch.alternate, batch):
            assert answer is not None
            pairs = zip(nlls(model, answer), nlls(reference, answer), strict=True)
            ratios.append(torch.stack([torch.exp(before.sum() - now.sum()) for now, before in pairs]))
        preferred, rejected = ratios
        return 2 / beta * torch.log(1 + (rejected / preferred) ** beta).mean()


ROWS = {"dpo": LossRow(DPO, {"beta": 0.3}, Preferred, tokens=True)}
