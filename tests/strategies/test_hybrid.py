"""Hybrid sharding: shards inside a node, replicas across nodes; here two nodes of two ranks each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from lightning_cl import EWC, FSDP2Strategy
from ranks import Ranks
from toys import ToyModule, fit_stream, toy_stream, trainer


def fit_on_this_rank(root: Path, nodes: int, saved: str, ckpt_path: Path | None = None) -> dict[str, Any]:
    """Fit the toy stream with EWC as a rank of one or two nodes, with a global batch of 8."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    devices = ranks // nodes
    as_torchrun = {"LOCAL_RANK": rank % devices, "GROUP_RANK": rank // devices, "LOCAL_WORLD_SIZE": devices}
    os.environ.update({name: str(value) for name, value in as_torchrun.items()})
    module = ToyModule()
    strategy = FSDP2Strategy(wrap=["Linear"], hybrid=nodes > 1)
    callbacks = [EWC(20.0), ModelCheckpoint(root / saved, filename="{step}", every_n_train_steps=1, save_top_k=-1)]
    fit = trainer(root, callbacks, strategy=strategy, devices=devices, num_nodes=nodes)
    fit.fit(module, datamodule=toy_stream(batch_size=8 // ranks), ckpt_path=ckpt_path)
    parameters = list(module.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters)
    return {
        "weights": torch.cat([parameter.full_tensor().detach().flatten() for parameter in parameters]),  # type: ignore[attr-defined]
        "mesh": strategy.shard_mesh.mesh.tolist(),
        "placements": parameters[0].placements,  # type: ignore[attr-defined]
        "local": parameters[0].to_local().detach(),  # type: ignore[attr-defined]
    }


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, Ranks]]:
    """Groups of two and four processes."""
    made = {size: Ranks(size) for size in (2, 4)}
    yield made
    for ranks in made.values():
        ranks.close()


def expected(root: Path) -> Tensor:
    """Where one process ends."""
    return fit_stream(root, [EWC(20.0)])


@pytest.mark.distributed
def test_two_nodes_of_two_end_where_one_process_ends(groups: dict[int, Ranks], tmp_path: Path) -> None:
    """Ranks of a node hold different rows; the same rank of another node holds the same ones."""
    first, second, third, fourth = groups[4].run(fit_on_this_rank, tmp_path, 2, "straight")
    assert first["mesh"] == [[0, 1], [2, 3]]
    assert first["placements"] == (Replicate(), Shard(0))
    assert torch.equal(first["local"], third["local"])
    assert torch.equal(second["local"], fourth["local"])
    assert not torch.equal(first["local"], second["local"])
    for result in (first, second, third, fourth):
        torch.testing.assert_close(result["weights"], expected(tmp_path), rtol=0, atol=1e-6)


@pytest.mark.distributed
def test_hybrid_runs_resume_as_others_and_the_reverse(groups: dict[int, Ranks], tmp_path: Path) -> None:
    """From replicas to plain shards on half the ranks, and from plain shards to replicas, in the second task."""
    groups[4].run(fit_on_this_rank, tmp_path, 2, "hybrid")
    plain = groups[2].run(fit_on_this_rank, tmp_path, 1, "plain", tmp_path / "hybrid" / "step=8.ckpt")
    back = groups[4].run(fit_on_this_rank, tmp_path, 2, "back", tmp_path / "plain" / "step=10.ckpt")
    for result in (*plain, *back):
        torch.testing.assert_close(result["weights"], expected(tmp_path), rtol=0, atol=1e-6)
