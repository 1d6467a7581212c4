"""The collectives, in one process and on ranks, and state on shards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import Parameter

from lightning_cl.core import distributed
from lightning_cl.core.shards import PerRank, gathered, of_all_ranks
from lightning_cl.core.state import ParameterState, local, shard, sum_over_shards
from ranks import Ranks

CPU = torch.device("cpu")


def test_one_process_needs_no_group() -> None:
    """Every collective is the identity."""
    rows = torch.tensor([[1, 2], [3, 4]])
    joined, owners = distributed.gather_rows(rows)
    assert not distributed.is_distributed()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert torch.equal(joined, rows)
    assert owners.tolist() == [0, 0]
    assert distributed.gather_on_rank_zero("state") == ["state"]
    assert distributed.sum_over_ranks_(torch.tensor(3.0)) == 3.0
    assert distributed.copy_of_rank_zero_(torch.tensor(4.0)) == 4.0
    assert distributed.max_over_ranks(3, CPU) == 3


@pytest.fixture(scope="module")
def three_ranks() -> Iterator[Ranks]:
    """Three processes for all tests of this file."""
    ranks = Ranks(3)
    yield ranks
    ranks.close()


def collect() -> dict[str, Any]:
    """Call each collective with values that differ between ranks: rank r has r rows of value r."""
    rank = distributed.rank()
    rows, owners = distributed.gather_rows(torch.full((rank, 2), float(rank)))
    labels, _ = distributed.gather_rows(torch.arange(3 - rank))
    return {
        "world": distributed.world_size(),
        "rows": rows,
        "owners": owners,
        "labels": labels,
        "first": distributed.gather_on_rank_zero({"rank": rank}),
        "sum": distributed.sum_over_ranks_(torch.tensor([float(rank), 1.0])),
        "copy": distributed.copy_of_rank_zero_(torch.tensor([float(rank) + 7])),
        "max": distributed.max_over_ranks(10 - rank, CPU),
    }


@pytest.mark.distributed
def test_ranks_agree_in_rank_order(three_ranks: Ranks) -> None:
    """Ragged and empty parts come in the order of the ranks, with their owners, alike everywhere."""
    results = three_ranks.run(collect)
    for result in results:
        assert result["world"] == 3
        assert result["rows"].tolist() == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]
        assert result["owners"].tolist() == [1, 2, 2]
        assert result["labels"].tolist() == [0, 1, 2, 0, 1, 0]
        assert result["sum"].tolist() == [3.0, 3.0]
        assert result["copy"].tolist() == [7.0]
        assert result["max"] == 10
    assert results[0]["first"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
    assert results[1]["first"] is None


WHOLE = torch.arange(10.0).reshape(5, 2)


def hold_shards() -> dict[str, Any]:
    """Keep a state of one sharded, one replicated and one plain parameter, save it, restore it."""
    whole = WHOLE.clone()
    mesh = init_device_mesh("cpu", (3,))
    parameters = {
        "sharded": Parameter(distribute_tensor(torch.zeros_like(whole), mesh, [Shard(0)])),
        "replicated": Parameter(distribute_tensor(torch.zeros(2), mesh, [Replicate()])),
        "plain": Parameter(torch.zeros(2)),
    }
    state = ParameterState()
    state.load_state_dict({"sharded": whole, "replicated": torch.ones(2), "plain": torch.ones(2)})
    state.place(parameters, "The state")
    again = ParameterState()
    again.load_state_dict(state.state_dict())
    again.place(parameters, "The state")
    terms = {name: value.sum() for name, value in state.items()}
    return {
        "mine": state["sharded"],
        "local": local(parameters["sharded"]).shape,
        "cut": shard(whole, parameters["sharded"]),
        "kept": state.state_dict()["sharded"].to_local().data_ptr() == state["sharded"].data_ptr(),
        "saved": gathered({"nested": [state.state_dict()]})["nested"][0]["sharded"],
        "again": again["sharded"],
        "total": float(sum_over_shards(terms, parameters)),
    }


@pytest.mark.distributed
def test_state_is_kept_on_shards_and_saved_whole(three_ranks: Ranks) -> None:
    """Each rank holds its rows (here 2, 2 and 1 of 5); gathered, all are there; sums count nothing twice."""
    for result, rows in zip(three_ranks.run(hold_shards), (WHOLE[:2], WHOLE[2:4], WHOLE[4:]), strict=True):
        assert result["mine"].shape == result["local"]
        assert torch.equal(result["mine"], rows)
        assert torch.equal(result["cut"], rows)
        assert torch.equal(result["again"], rows)
        assert result["kept"]
        assert torch.equal(result["saved"], WHOLE)
        assert result["total"] == 45.0 + 2.0 + 2.0


def own_and_common() -> Any:
    """Gather a tree with what each rank has of its own."""
    own = PerRank({"rank": distributed.rank()})
    return gathered({"common": (1, "text"), "own": [own]}), of_all_ranks(own)


@pytest.mark.distributed
def test_what_each_rank_has_is_listed_on_the_first(three_ranks: Ranks) -> None:
    """The rest of a tree stays as it is; a value that was never saved is a list of one."""
    (first, mine), (second, _), _ = three_ranks.run(own_and_common)
    assert first == {"common": (1, "text"), "own": [[{"rank": 0}, {"rank": 1}, {"rank": 2}]]}
    assert second == {"common": (1, "text"), "own": [None]}
    assert mine == [{"rank": 0}]
