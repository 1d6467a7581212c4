"""CE-U as a plain loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_cl.unlearning import CEU
from unlearning_contract import Batch, LossRow, PlainLoss
from unlearning_rows.undial import positions


class WithoutTruth(PlainLoss):
    """Token by token, what the model says beside the true one, as a constant."""

    def forget(self, model: nn.Module, reference: nn.Module, batch: Batch) -> Tensor:
        scores, terms, seen = model(batch.inputs), [], {}
        for place, token in positions(batch):
            seen[place[0]] = seen.get(place[0], 0) + 1
            if batch.labels.ndim > 1 and seen[place[0]] <= self.settings["skip"]:
                continue
            p = scores[place].softmax(0).detach().clone()
            p[token] = 0.0
            terms.append(-((p / p.sum()) * scores[place].log_softmax(0)).sum())
        return torch.stack(terms).mean()


ROWS = {"ceu": LossRow(CEU, {"skip": 1}, WithoutTruth, retain=None)}
