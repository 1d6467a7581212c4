"""Random labels as a plain loss, with the generator in Python's integers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_cl.unlearning import RandomLabel
from unlearning_contract import Batch, LossRow, PlainLoss
from unlearning_rows.undial import positions

_ALL = (1 << 64) - 1


def splitmix64(value: int) -> int:
    """The output of the generator for a state, from its paper."""
    value = (value + 0x9E3779B97F4A7C15) & _ALL
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _ALL
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _ALL
    return value ^ (value >> 31)


class Wrong(PlainLoss):
    """Every token of every sample has one other token, for good."""

    def start(self, seed: int) -> None:
        self.seed = seed

    def forget(self, model: nn.Module, reference: nn.Module, batch: Batch) -> Tensor:
        log_p, terms = model(batch.inputs).log_softmax(-1), []
        for place, token in positions(batch):
            key = splitmix64((int(batch.ids[place[0]]) + splitmix64(self.seed)) & _ALL)
            # the label of a position stands one further
            key = splitmix64((key + (place[1] + 1 if len(place) > 1 else 0)) & _ALL)
            allowed = self.settings.get("forgotten_classes") or []
            others = [c for c in range(log_p.shape[-1]) if c != token and c not in allowed]
            terms.append(-log_p[place][others[key % (1 << 63) % len(others)]])
        return torch.stack(terms).mean()


ROWS = {
    "random-label": LossRow(RandomLabel, {}, Wrong),
    "random-label-of-the-rest": LossRow(RandomLabel, {"forgotten_classes": [1]}, Wrong),
}
