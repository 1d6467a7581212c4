"""WGA as a plain loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_cl.unlearning import WGA
from unlearning_contract import Batch, LossRow, PlainLoss, nlls


class Weighted(PlainLoss):
    """A weight for each token that the gradient does not see."""

    def forget(self, model: nn.Module, reference: nn.Module, batch: Batch) -> Tensor:
        tokens = torch.cat(nlls(model, batch))
        return torch.stack([-t * t.neg().exp().item() ** self.settings["beta"] for t in tokens]).mean()


ROWS = {"wga": LossRow(WGA, {"beta": 0.5}, Weighted)}
