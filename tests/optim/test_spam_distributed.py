"""SPAM on two ranks under FSDP2: the steps and the mask of one process, its shards, and its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_cl import FSDP2Strategy
from lightning_cl.optim import SPAM
from ranks import Ranks
from toys import ToyModule, toy_stream, trainer
from traffic import Traffic

GLOBAL_BATCH = 8
SETTINGS: dict[str, Any] = {
    "reset_interval": 5,
    "warmup_steps": 3,
    "clip_delay": 2,
    "threshold": 3.0,
    "weight_decay": 0.1,
}
FORMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "sparse": {"density": 0.5},
    "foreach": {"foreach": True},
    "8 bits": {"state_dtype": "8bit"},
    "capturable": {"capturable": True},
}


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """A group of two processes for all tests of this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(autouse=True)
def one_rank_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent process is no rank."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def full(value: Tensor) -> Tensor:
    """The whole tensor."""
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


# ---------------------------------------------------------------------- fully_shard, by hand


def network() -> nn.Sequential:
    """With rows that no two ranks share evenly, a matrix for 8 bits, and a tensor of a single row."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 5), nn.Linear(5, 1))


def take_steps(sharded: bool, settings: dict[str, Any]) -> dict[str, Any]:
    """Twelve steps over two resets on given gradients; the weights, the state, and what ranks said to each other."""
    model = network()
    if sharded:
        for layer in (*model, model):
            fully_shard(layer)
    optimizer = SPAM(model.parameters(), lr=0.01, **{**SETTINGS, **settings})
    generator = torch.Generator().manual_seed(4)
    seen = []
    for step in range(12):
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator) * (100 if step in (4, 9) else 1)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.grad = gradient
        with Traffic() as traffic:
            optimizer.step()
        seen += traffic.seen
    local_numbers = sum(
        value.numel() for state in optimizer.state.values() for key, value in local_state(state).items() if "exp" in key
    )
    state = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    return {
        "weights": {name: full(parameter) for name, parameter in model.named_parameters()},
        "state": {name: {key: full(value) for key, value in one.items()} for name, one in state["state"].items()},
        "traffic": len(seen),
        "numbers": local_numbers,
    }


def local_state(state: dict[str, Any]) -> dict[str, Tensor]:
    """The shards of this rank."""
    return {key: value.to_local() if isinstance(value, DTensor) else value for key, value in state.items()}


@pytest.mark.distributed
@pytest.mark.parametrize("form", FORMS)
def test_shards_take_the_steps_of_the_whole(form: str, two_ranks: Ranks) -> None:
    """To the last bit, with uneven and empty shards, and without a word between the ranks: so the masks agree too."""
    alone = take_steps(False, FORMS[form])
    first, second = two_ranks.run(take_steps, True, FORMS[form])
    for rank in (first, second):
        assert rank["traffic"] == 0
        for name, value in alone["weights"].items():
            assert torch.equal(rank["weights"][name], value), name
    for name, state in alone["state"].items():
        assert state.keys() == first["state"][name].keys()
        for key, value in state.items():
            assert torch.equal(first["state"][name][key], value), (name, key)
    assert first["numbers"] + second["numbers"] == alone["numbers"], "no rank keeps what is another's"
    assert abs(first["numbers"] - second["numbers"]) < 0.2 * alone["numbers"]
    start = dict(network().named_parameters())
    stayed = [(value == start[name]).flatten() for name, value in alone["weights"].items()]
    rested = torch.cat(stayed).float().mean().item()
    assert rested == 0 if form != "sparse" else 0.05 < rested < 0.25  # in none of three masks: an eighth


# ---------------------------------------------------------------------- in a Trainer


class Sharded(ToyModule):
    """The toy module with SPAM; ``eps`` keeps the order of sums in a batch from showing."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings

    def configure_optimizers(self) -> SPAM:
        return SPAM(self.parameters(), lr=0.02, eps=1e-3, **{**SETTINGS, **self.settings})


def fit_on_this_rank(root: Path, settings: dict[str, Any], form: dict[str, Any] | None, ckpt_path: Path | None) -> Any:
    """Fit twelve steps of the toy stream on all ranks of the group, with a checkpoint at every step."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    strategy = "auto" if form is None else FSDP2Strategy(**form)
    saver = ModelCheckpoint(root / f"of-{ranks}", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    module = Sharded(settings)
    fit = trainer(root, [saver], strategy=strategy, devices=ranks)
    fit.fit(module, datamodule=toy_stream(batch_size=GLOBAL_BATCH // ranks), ckpt_path=ckpt_path)
    return torch.cat([full(parameter).flatten() for parameter in module.parameters()])


@pytest.mark.distributed
@pytest.mark.parametrize("density", [1.0, 0.5])
def test_two_ranks_are_one_process_and_leave_it_their_checkpoint(
    density: float, tmp_path: Path, two_ranks: Ranks
) -> None:
    """Under our strategy; one process, and two, go on from a step inside of the warm-up with what two ranks saved."""
    settings, form = {"density": density}, {"save_distributed_checkpoint": False}
    alone = fit_on_this_rank(tmp_path, settings, None, None)
    first, second = two_ranks.run(fit_on_this_rank, tmp_path, settings, form, None)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-6)
    saved = tmp_path / "of-2" / "step=6.ckpt"
    again, _ = two_ranks.run(fit_on_this_rank, tmp_path / "again", settings, form, saved)
    assert torch.equal(again, first)
    on_one = fit_on_this_rank(tmp_path / "one", settings, None, saved)
    torch.testing.assert_close(on_one, alone, rtol=0, atol=1e-6)
    # and the other way
    on_two, _ = two_ranks.run(fit_on_this_rank, tmp_path / "two", settings, form, tmp_path / "of-1" / "step=6.ckpt")
    torch.testing.assert_close(on_two, alone, rtol=0, atol=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("settings", [{"density": 0.5}, {"state_dtype": "bfloat16"}], ids=str)
def test_two_ranks_go_on_from_shards(settings: dict[str, Any], tmp_path: Path, two_ranks: Ranks) -> None:
    """A folder of shards brings back the same bits."""
    straight, _ = two_ranks.run(fit_on_this_rank, tmp_path, settings, {}, None)
    again, _ = two_ranks.run(fit_on_this_rank, tmp_path / "again", settings, {}, tmp_path / "of-2" / "step=7.ckpt")
    assert torch.equal(again, straight)
