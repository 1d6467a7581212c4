"""Random masks: a published generator, the density, independence, and the same whatever the sharding."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from lightning_cl.functional.sparse_masks import global_indices, random_mask
from ranks import Ranks

SIZE = 40_000
_WORD = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """Steele, Lea and Flood's generator in whole numbers: what it returns from this state."""
    value = (state + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


def test_is_the_published_generator() -> None:
    """Each draw is 53 bits of SplitMix64, of the index and of all numbers of the key."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert splitmix64(1234567) == 6457827717110365317
    for density, key in ((0.5, (0,)), (0.1, (3, 0, 17)), (0.9, (2**40 + 1, 5, 2))):
        state = 0
        for number in key:
            state = splitmix64(state ^ number)
        indices = [*range(500), 2**33, 2**40 + 7]
        draws = [splitmix64(splitmix64(index) ^ state >> 1) >> 11 for index in indices]
        expected = [draw < round(density * 2**53) for draw in draws]
        assert random_mask(torch.tensor(indices), density, *key).tolist() == expected


@pytest.mark.parametrize("density", [0.01, 0.25, 0.5, 0.97])
def test_density_is_held(density: float) -> None:
    """Within four standard deviations of a binomial count, over the whole, over halves and over strides."""
    mask = random_mask(torch.arange(SIZE), density, 0, 1, 2)
    for part in (mask, mask[: SIZE // 2], mask[SIZE // 2 :], mask[::2], mask[::64], mask[1::64]):
        deviation = math.sqrt(len(part) * density * (1 - density))
        assert abs(int(part.sum()) - len(part) * density) < 4 * deviation


def test_none_and_all() -> None:
    """The ends of the range are exact."""
    assert not random_mask(torch.arange(SIZE), 0.0, 1).any()
    assert random_mask(torch.arange(SIZE), 1.0, 1).all()
    assert random_mask(torch.zeros(0, 3, dtype=torch.int64), 0.5, 1).shape == (0, 3)


def test_draws_of_other_keys_and_places_are_independent() -> None:
    """Another seed, tensor or reset, and any distance along the tensor, share as many coordinates as chance does."""
    density = 0.3
    mask = random_mask(torch.arange(SIZE), density, 7, 0, 0)
    others = [random_mask(torch.arange(SIZE), density, *key) for key in ((8, 0, 0), (7, 1, 0), (7, 0, 1), (0, 7, 0))]
    others += [mask.roll(distance) for distance in (1, 2, 3, 64, 100, 1024)]
    deviation = math.sqrt(SIZE * density**2 * (1 - density**2))
    for other in others:
        assert abs(int((mask & other).sum()) - SIZE * density**2) < 5 * deviation


def test_is_a_pure_function() -> None:
    """No global random numbers, the same whatever the shape, and a part is the part of the whole."""
    state = torch.get_rng_state()
    mask = random_mask(torch.arange(60).view(5, 12), 0.4, 3, 1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert torch.equal(random_mask(torch.arange(60), 0.4, 3, 1), mask.flatten())
    assert torch.equal(random_mask(torch.arange(20, 40), 0.4, 3, 1), mask.flatten()[20:40])


def test_more_density_adds_coordinates() -> None:
    """With the same key a higher density keeps what a lower one has."""
    low, high = (random_mask(torch.arange(SIZE), density, 5) for density in (0.2, 0.6))
    assert not (low & ~high).any()


def test_indices_of_a_plain_tensor() -> None:
    """The positions of its elements, row by row, also where the memory runs otherwise."""
    expected = torch.arange(6).view(2, 3)
    assert torch.equal(global_indices(torch.zeros(2, 3)), expected)
    assert torch.equal(global_indices(torch.zeros(3, 2).t()), expected)
    assert global_indices(torch.tensor(1.0)).tolist() == 0


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Ranks]:
    """Two nodes of two ranks."""
    ranks = Ranks(4)
    yield ranks
    ranks.close()


def indices_in_layouts() -> list[bool]:
    """Whether each layout's indices, given as the values of a sharded tensor, are those of its shards."""
    line = init_device_mesh("cpu", (4,))
    nodes = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "rank"))
    layouts = [
        (line, [Shard(0)], (8, 3)),
        (line, [Shard(0)], (5, 3)),  # shards of 2, 2, 1 and 0 rows
        (line, [Shard(0)], (2,)),
        (line, [Shard(1)], (3, 6)),
        (line, [Replicate()], (3, 2)),
        (nodes, [Replicate(), Shard(0)], (5, 2)),
        (nodes, [Replicate(), Shard(1)], (2, 7, 2)),
        (nodes, [Shard(1), Shard(0)], (3, 5)),
        (nodes, [Shard(0), Shard(0)], (7, 2)),
    ]
    same = []
    for mesh, placements, shape in layouts:
        whole = torch.arange(math.prod(shape)).view(shape)
        sharded = distribute_tensor(whole, mesh, placements)
        found = global_indices(distribute_tensor(torch.zeros(shape), mesh, placements))
        same.append(torch.equal(found, sharded.to_local()) and found.shape == sharded.to_local().shape)
    return same


def refused_layout() -> str:
    """What is said to a layout that holds no elements of its own."""
    mesh = init_device_mesh("cpu", (4,))
    partial = distribute_tensor(torch.zeros(4), mesh, [Replicate()]).redistribute(mesh, [Replicate()])
    try:
        global_indices(type(partial).from_local(torch.zeros(4), mesh, [Partial()]))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_indices_of_shards(four_ranks: Ranks) -> None:
    """Even, uneven and empty shards, other dimensions, replicas and two dimensions: each rank finds its own."""
    assert four_ranks.run(indices_in_layouts) == [[True] * 9] * 4


@pytest.mark.distributed
def test_other_layouts_are_refused(four_ranks: Ranks) -> None:
    """A sum that is still to be made has no elements of its own."""
    for message in four_ranks.run(refused_layout):
        assert "`density` below 1 needs weights sharded as by `fully_shard`" in message


def test_indices_fit_the_mask() -> None:
    """Masks of the rows of a tensor, joined, are the mask of the tensor."""
    whole: Tensor = random_mask(global_indices(torch.zeros(6, 4)), 0.5, 1)
    rows = [random_mask(torch.arange(row * 4, row * 4 + 4), 0.5, 1) for row in range(6)]
    assert torch.equal(whole, torch.stack(rows))
