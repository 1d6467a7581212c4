"""Sums over ranks into shards of every layout, and what stands in the graph in place of a shard."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_cl.functional import LayerTape, sharding, squared_sums_by_loop
from lightning_cl.functional.sharding import ShardedSums, UnshardedWeights, check_layout, root_mean_squares
from ranks import Ranks
from traffic import Traffic


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Ranks]:
    """Two nodes of two ranks."""
    ranks = Ranks(4)
    yield ranks
    ranks.close()


def meshes() -> tuple[DeviceMesh, DeviceMesh]:
    """All ranks in a line, and nodes by ranks."""
    return init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "rank"))


def value_of(rank: int, shape: tuple[int, ...]) -> Tensor:
    """A tensor of small whole numbers, so that sums are exact in any order."""
    return torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(100 * rank + len(shape))).double()


def add_in_layouts(bucket: int) -> dict[str, Any]:
    """Add a tensor of each rank twice, in each layout, to totals of ones; return the full totals, and the traffic."""
    sharding._BUCKET = bucket
    line, nodes = meshes()
    layouts = [
        (line, [Shard(0)], (8, 3)),
        (line, [Shard(0)], (5, 3)),  # shards of 2, 2, 1 and 0 rows
        (line, [Shard(0)], (2,)),
        (line, [Shard(1)], (3, 6)),
        (nodes, [Replicate(), Shard(0)], (5, 2)),
        (nodes, [Replicate(), Shard(1)], (2, 7, 2)),
        (line, [Replicate()], (3,)),
    ]
    rank = torch.distributed.get_rank()
    totals = [distribute_tensor(torch.ones(shape).double(), mesh, kinds) for mesh, kinds, shape in layouts]
    totals.append(distribute_tensor(torch.ones(4, 4), line, [Shard(0)]))  # of another dtype
    sums = ShardedSums()
    with Traffic() as traffic:
        for total in [*totals, *totals]:
            sums.add(total, value_of(rank, tuple(total.shape)).to(total.dtype))
        sums.flush()
    assert all(isinstance(total, DTensor) for total in totals)
    return {
        "totals": [total.full_tensor() for total in totals],
        "sizes": root_mean_squares({str(number): total for number, total in enumerate(totals)}),
        "seen": traffic.seen,
    }


@pytest.mark.distributed
@pytest.mark.parametrize("bucket", [1, 30, 1 << 23])
def test_every_layout_gets_the_sum_over_ranks(bucket: int, four_ranks: Ranks) -> None:
    """Uneven and empty shards, other dimensions, replicas; reduced one by one or together."""
    results = four_ranks.run(add_in_layouts, bucket)
    for number, total in enumerate(results[0]["totals"]):
        shape = tuple(total.shape)
        expected = 1 + 2 * sum(value_of(rank, shape) for rank in range(4))
        assert torch.equal(total.double(), expected)
        for result in results:
            assert torch.equal(result["totals"][number], total)
            assert result["sizes"][str(number)] == pytest.approx(float(expected.square().mean().sqrt()))
    reduced = [one for one in results[0]["seen"] if one.kind == "reduce-scatter"]
    assert len(reduced) == {1: 14, 30: 12, 1 << 23: 6}[bucket]


class Outside(nn.Module):
    """Uses the weight of a layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
        self.head = nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(self.block(inputs), self.head.weight)


def squares_on_nodes() -> dict[str, Tensor]:
    """Sharded inside nodes and replicated across them: squares by a loop and by a tape, against whole weights."""
    model, rank = Outside(), torch.distributed.get_rank()
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    used = {name: p for name, p in model.named_parameters() if name != "head.bias"}
    expected = squared_sums_by_loop((model(row).sin().sum() for row in inputs.split(1)), used)
    _, nodes = meshes()
    for block in (model.block, model):
        fully_shard(block, mesh=nodes)
    parameters = {name: p for name, p in model.named_parameters() if name in used}
    row = inputs[rank : rank + 1]
    with UnshardedWeights(model, parameters) as unsharded:
        assert unsharded["head.weight"] is None
        by_loop = squared_sums_by_loop((model(row).sin().sum() for _ in range(1)), parameters, unsharded=unsharded)
        squared_sums_by_loop([model(row).sin().sum()], parameters, by_loop, unsharded=unsharded, idle=True)
    with LayerTape(model, ["block.0.weight", "block.0.bias"]) as tape:
        by_tape = tape.squared_sums(model(row).sin().sum(), batch_size=1)
        tape.squared_sums(model(row).sin().sum(), batch_size=1, into=by_tape, idle=True)
    for found in (by_loop, by_tape):
        for name, value in found.items():
            assert isinstance(value, DTensor)
            assert value.placements == (Replicate(), Shard(0))
            torch.testing.assert_close(value.full_tensor(), expected[name])
    # the graph was left alone: the gradients of training come as ever
    model(row).sum().backward()
    assert all(p.grad is not None for p in parameters.values())
    return expected


@pytest.mark.distributed
def test_sharded_inside_nodes_and_replicated_across(four_ranks: Ranks) -> None:
    """A loop reaches what no layer is called for; a rank without a sample adds nothing."""
    assert four_ranks.run(squares_on_nodes)[0]["head.weight"].any()


def whole_gradients() -> int:
    """Return how many gradients of weights are held when the backward pass of a loop reaches the first layer."""
    sharding._BUCKET = 1
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), *(nn.Linear(64, 64) for _ in range(4)))
    for block in (*model, model):
        fully_shard(block)
    gc.freeze()
    parameters, counts = dict(model.named_parameters()), []

    def look(_: Tensor) -> None:
        tensors = [thing for thing in gc.get_objects() if type(thing) is Tensor]
        counts.append(sum(tensor.untyped_storage().nbytes() >= 4 * 64 * 64 for tensor in tensors))

    with UnshardedWeights(model, parameters) as unsharded:
        loss = model(torch.randn(1, 4)).sum()
        first = unsharded["0.weight"]
        assert first is not None
        handle = first.register_hook(look)
        squared_sums_by_loop([loss], parameters, unsharded=unsharded)
        handle.remove()
    gc.unfreeze()
    return counts[0]


@pytest.mark.distributed
def test_a_loop_holds_one_gradient_at_a_time(four_ranks: Ranks) -> None:
    """Those of all layers together would not fit where the model had to be sharded."""
    assert max(four_ranks.run(whole_gradients)) <= 1


def refusals() -> list[str]:
    """The messages for what is split by more than ``fully_shard``."""
    _, nodes = meshes()
    messages = []
    for placed in (
        distribute_tensor(torch.ones(4, 4), nodes, [Shard(0), Shard(1)]),
        distribute_tensor(torch.ones(4, 4), nodes["rank"], [Shard(0)]),
    ):
        try:
            check_layout({"plain": torch.ones(1), "layer.weight": placed})
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.mark.distributed
def test_other_layouts_are_refused(four_ranks: Ranks) -> None:
    """Tensor parallelism would count samples several times."""
    split, partial = four_ranks.run(refusals)[0]
    assert split.startswith("'layer.weight' is placed as (Shard(dim=0), Shard(dim=1))")
    assert partial.startswith("'layer.weight' lies on 2 of 4 ranks")
    assert "without tensor parallelism" in split
