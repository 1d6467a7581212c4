"""RMU as a plain loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_cl.unlearning import RMU
from unlearning_contract import Batch, LossRow, PlainLoss


class Steered(PlainLoss):
    """Row by row, and position by position, the distance of what the second module returns."""

    def start(self, seed: int) -> None:
        direction = torch.rand(8, generator=torch.Generator().manual_seed(seed))
        self.control = self.settings["coefficient"] * direction / direction.square().sum().sqrt()

    def forget(self, model: nn.Module, reference: nn.Module, batch: Batch) -> Tensor:
        return self.distance(batch, model[:2](batch.inputs), self.control.expand(*batch.inputs.shape[:2], 8))

    def retain(self, model: nn.Module, reference: nn.Module, batch: Batch) -> Tensor:
        return self.distance(batch, model[:2](batch.inputs), reference[:2](batch.inputs))

    def distance(self, batch: Batch, found: Tensor, wanted: Tensor) -> Tensor:
        """The mean over rows of the mean over a row's positions."""
        if batch.mask is None:
            return (found - wanted[:, 0] if wanted.ndim > found.ndim else found - wanted).square().mean()
        rows = []
        for row, length in enumerate(batch.mask.sum(1).tolist()):
            rows.append((found[row, :length] - wanted[row, :length]).square().sum() / (8 * length))
        return torch.stack(rows).mean()


ROWS = {"rmu": LossRow(RMU, {"layer": "model.1", "coefficient": 3.0}, Steered, retain="own", unused_parameters=True)}
