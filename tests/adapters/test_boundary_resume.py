"""Checkpoints of shards written where a task's end has just reset what the optimizer knows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_cl import FSDP2Strategy
from lightning_cl.adapters import AdapterSlots, CoDyRA
from ranks import Ranks
from toys import LoraToy, toy_stream, trainer, weights


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for all tests of this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


class AdamWLora(LoraToy):
    """Its optimizer counts steps."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=0.01)


def fit(root: Path, method: type[AdapterSlots], name: str, sharded: bool, ckpt_path: str | None) -> Tensor:
    """Fit on this rank and return the whole weights; a run that is plain saves nothing."""
    saver = ModelCheckpoint(root / name, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    saves = [] if name == "plain" else [saver]
    module = AdamWLora()
    strategy = FSDP2Strategy(save_distributed_checkpoint=sharded, process_group_backend="gloo")
    settings: dict[str, Any] = {"devices": 2, "strategy": strategy, "enable_checkpointing": bool(saves)}
    fit = trainer(root, [method(capacity=8), *saves], **settings)
    fit.fit(module, datamodule=toy_stream(batch_size=4), ckpt_path=ckpt_path)
    return weights(module)


@pytest.mark.distributed
@pytest.mark.parametrize("method", [AdapterSlots, CoDyRA])
@pytest.mark.parametrize("sharded", [True, False], ids=["folder", "file"])
def test_a_checkpoint_at_a_boundary(
    method: type[AdapterSlots], sharded: bool, two_ranks: Ranks, tmp_path: Path
) -> None:
    """Saving it changes no bit of the run, and from it the run ends at the same bits."""
    plain = two_ranks.run(fit, tmp_path, method, "plain", sharded, None)[0]
    saving = two_ranks.run(fit, tmp_path, method, "saving", sharded, None)[0]
    assert torch.equal(plain, saving)
    path = str(tmp_path / "saving" / "step=6.ckpt")
    resumed = two_ranks.run(fit, tmp_path, method, "resumed", sharded, path)[0]
    assert torch.equal(resumed, plain)
