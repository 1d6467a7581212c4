"""Manual optimization of a sharded module: backward passes inside of a step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_cl import FSDP2Strategy
from ranks import Ranks
from toys import ToyModule, toy_data, trainer, weights


class ByHand(ToyModule):
    """Two backward passes a step; the parts are called by themselves, or through the module."""

    def __init__(self, calls_itself: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.calls_itself = calls_itself

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        inputs, labels = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for half in (slice(0, None, 2), slice(1, None, 2)):
            scores = self(inputs[half]) if self.calls_itself else self.model(inputs[half])
            self.manual_backward(cross_entropy(scores, labels[half]) / 2)
        optimizer.step()


def fit(root: Path, calls_itself: bool, **settings: Any) -> Tensor:
    """Fit ten steps on batches that are the same for every rank; return the full weights."""
    module = ByHand(calls_itself)
    loader = DataLoader(toy_data(), batch_size=8)
    run = trainer(root, max_steps=10, limit_val_batches=0, use_distributed_sampler=False, **settings)
    run.fit(module, loader, loader)
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in module.parameters()]
    return torch.cat([parameter.detach().flatten() for parameter in full])


def fit_on_this_rank(root: Path, calls_itself: bool) -> Tensor | str:
    """Fit sharded; return the weights, or the error."""
    try:
        return fit(root, calls_itself, strategy=FSDP2Strategy(), devices=2)
    except ValueError as error:
        return str(error)


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """Two processes for this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.mark.distributed
def test_two_ranks_end_where_one_process_ends(two_ranks: Ranks, tmp_path: Path) -> None:
    """What the root holds, all of this module, gets its gradients in every backward."""
    expected = fit(tmp_path, calls_itself=True)
    for found in two_ranks.run(fit_on_this_rank, tmp_path, True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (expected - weights(ByHand())).abs().max() > 1e-2


@pytest.mark.distributed
def test_parts_that_are_called_by_themselves_are_refused(two_ranks: Ranks, tmp_path: Path) -> None:
    """Their gradients would be lost, and the model would not train."""
    for error in two_ranks.run(fit_on_this_rank, tmp_path, False):
        assert "`training_step` of ByHand must call the module (`self(batch)`)" in error
