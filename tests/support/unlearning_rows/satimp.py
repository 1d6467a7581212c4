"""SatImp as a plain loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_cl.unlearning import SatImp
from unlearning_contract import Batch, LossRow, PlainLoss, nlls


class SaturationAndImportance(PlainLoss):
    """A weight for each token that the gradient does not see."""

    def forget(self, model: nn.Module, reference: nn.Module, batch: Batch) -> Tensor:
        terms = []
        for token in torch.cat(nlls(model, batch)):
            p = token.neg().exp().item()
            terms.append(-token * p ** self.settings["beta1"] * (1 - p) ** self.settings["beta2"])
        return torch.stack(terms).mean()


ROWS = {"satimp": LossRow(SatImp, {"beta1": 0.5, "beta2": 0.2}, SaturationAndImportance)}
