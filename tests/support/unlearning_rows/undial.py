"""UNDIAL as a plain loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from lightning_cl.unlearning import UNDIAL
from unlearning_contract import Batch, LossRow, PlainLoss


def positions(batch: Batch) -> list[tuple[tuple[int, ...], int]]:
    """Where a supervised token is predicted, and which."""
    if batch.labels.ndim == 1:
        return [((row,), int(label)) for row, label in enumerate(batch.labels)]
    shifted = batch.labels[:, 1:]
    return [((row, t), int(shifted[row, t])) for row, t in (shifted != -100).nonzero().tolist()]


class Distilled(PlainLoss):
    """Token by token, the cross-entropy to the reference with less of the true one."""

    def forget(self, model: nn.Module, reference: nn.Module, batch: Batch) -> Tensor:
        now, before, terms = model(batch.inputs), reference(batch.inputs), []
        for place, token in positions(batch):
            target = before[place] - self.settings["beta"] * one_hot(torch.tensor(token), before.shape[-1])
            terms.append(-(target.softmax(0) * now[place].log_softmax(0)).sum())
        return torch.stack(terms).mean()


ROWS = {"undial": LossRow(UNDIAL, {"beta": 3.0}, Distilled, retain=None)}
