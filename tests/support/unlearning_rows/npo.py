"""NPO as a plain loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_cl.unlearning import NPO
from unlearning_contract import Batch, LossRow, PlainLoss, nlls


class Preference(PlainLoss):
    """A ratio of likelihoods for each row, by its definition."""

    def forget(self, model: nn.Module, reference: nn.Module, batch: Batch) -> Tensor:
        beta = self.settings["beta"]
        terms = []
        for now, before in zip(nlls(model, batch), nlls(reference, batch), strict=True):
            ratio = torch.exp(before.sum() - now.sum())
            terms.append(2 / beta * torch.log(1 + ratio**beta))
        return torch.stack(terms).mean()


ROWS = {"npo": LossRow(NPO, {"beta": 0.5}, Preference)}
