"""The checksum of frozen weights: the same however they are cut, another for every change."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lightning_cl.strategies import fingerprint as module
from lightning_cl.strategies.fingerprint import check_fingerprint, fingerprint
from ranks import Ranks

BLOCK = module._BLOCK_BYTES


@pytest.fixture(scope="module")
def three() -> Iterator[Ranks]:
    """Three ranks."""
    ranks = Ranks(3)
    yield ranks
    ranks.close()


def base() -> dict[str, Tensor]:
    """Tensors of many dtypes: larger than blocks, fewer rows than ranks, rows of odd bytes, no rows, no dimension."""
    generator = torch.Generator().manual_seed(5)
    large = torch.randn(1001, 300, generator=generator)
    return {
        "float": large,
        "bfloat": large[:, :7].to(torch.bfloat16),
        "half": large[:2].half(),
        "packed": torch.randint(0, 256, (600_001, 1), dtype=torch.uint8, generator=generator),
        "packed in bfloat": torch.randint(0, 256, (5002,), dtype=torch.uint8, generator=generator).view(torch.bfloat16),
        "double": large[:50].double(),
        "bool": large[:, 0] > 0,
        "eighth": large[:33, :3].to(torch.float8_e4m3fn),
        "empty": torch.zeros(0, 4),
        "step": torch.tensor(7, dtype=torch.int64),
    }


def cut(layout: str) -> dict[str, int]:
    """Return the fingerprint of the base in a layout over three ranks."""
    tensors = base()
    line = init_device_mesh("cpu", (3,))
    plane = init_device_mesh("cpu", (3, 1))
    kinds = {
        "rows": (line, [Shard(0)]),
        "columns": (line, [Shard(1)]),
        "copies": (line, [Replicate()]),
        "hybrid": (plane, [Replicate(), Shard(0)]),
    }
    if layout == "plain":
        return fingerprint(tensors)
    mesh, placements = kinds[layout]
    whole = [Replicate()] * mesh.ndim
    return fingerprint(
        {
            name: distribute_tensor(tensor, mesh, placements if tensor.ndim == 2 else whole, src_data_rank=None)
            for name, tensor in tensors.items()
        }
    )


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["plain", "rows", "columns", "copies", "hybrid"])
def test_is_the_same_however_tensors_are_cut(three: Ranks, layout: str):
    """Plain, sharded by rows or columns, or replicated on three ranks: every rank gets what one process gets."""
    alone = fingerprint(base())
    assert three.run(cut, layout) == [alone] * 3


def frozen_module() -> dict[str, int]:
    """Return the fingerprint of a module sharded by FSDP2."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1)).requires_grad_(False)
    fully_shard(net[0])
    fully_shard(net)
    assert all(isinstance(p, DTensor) for p in net.parameters())
    return fingerprint(dict(net.named_parameters()))


@pytest.mark.distributed
def test_reads_the_parameters_of_a_sharded_module(three: Ranks):
    """Parameters as `fully_shard` leaves them, with fewer rows than ranks, have the fingerprint of the whole module."""
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1))
    assert three.run(frozen_module) == [fingerprint(dict(whole.named_parameters()))] * 3


def unreduced() -> str:
    """Return the error for a tensor with values to be summed."""
    tensor = DTensor.from_local(torch.ones(3), init_device_mesh("cpu", (3,)), [Partial()])
    try:
        fingerprint({"x": tensor})
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.distributed
def test_refuses_values_still_to_be_summed(three: Ranks):
    """A partial sum is no weight."""
    assert "still to be summed" in three.run(unreduced)[0]


def test_is_the_sum_of_the_docstring():
    """The sum over words equals the formula, term by term in Python's integers, in whole and in partial blocks."""
    words = 2 * module._BLOCK + 5
    tensor = torch.randint(-(2**31), 2**31, (words,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    in_block = module._odd(0, module._BLOCK, salt=0, device=torch.device("cpu")).tolist()
    of_block = module._odd(0, 3, salt=1, device=torch.device("cpu")).tolist()
    expected = sum(
        of_block[place // module._BLOCK] * in_block[place % module._BLOCK] * word
        for place, word in enumerate(tensor.tolist())
    )
    assert (int(module._share(tensor)) - expected) % 2**64 == 0
    assert all(weight % 2 for weight in in_block + of_block)
    assert len(set(in_block + of_block)) == module._BLOCK + 3


def test_shows_every_changed_byte():
    """One bit in the first, the last or any byte near the edges of words and blocks changes the checksum."""
    data = torch.randint(0, 256, (2 * BLOCK + 7,), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    places = [0, 1, 2, 3, 4, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, len(data) - 2, len(data) - 1]
    seen = {fingerprint({"x": data})["x"]}
    for place in places:
        for bit in (1, 128):
            changed = data.clone()
            changed[place] ^= bit
            seen.add(fingerprint({"x": changed})["x"])
    assert len(seen) == 1 + 2 * len(places)


def test_shows_what_keeps_the_multiset_of_values():
    """Permuted rows, swapped blocks, pairs of flipped signs: same values or same parity, another checksum."""
    rows = torch.randn(400, 1000, generator=torch.Generator().manual_seed(3))
    swapped = rows.view(torch.uint8).reshape(-1).clone()
    swapped[:BLOCK], swapped[BLOCK : 2 * BLOCK] = swapped[BLOCK : 2 * BLOCK].clone(), swapped[:BLOCK].clone()
    signs = rows.clone()
    signs[3, 4:6] *= -1
    variants = [
        rows,
        rows.flip(0),
        rows[torch.randperm(400)],
        rows.view(1000, 400).T.contiguous().view(400, 1000),
        swapped.view(torch.float32).view(400, 1000),
        signs,
        -rows,
    ]
    assert len({fingerprint({"x": variant})["x"] for variant in variants}) == len(variants)


def test_shows_dtype_and_shape():
    """The same bytes under another dtype or shape are another tensor; strides are none of its business."""
    zeros = torch.zeros(4, 6)
    others = [zeros.view(6, 4), zeros.to(torch.int32), zeros.half(), zeros.view(4, 6, 1), torch.zeros(0)]
    assert len({fingerprint({"x": other})["x"] for other in [zeros, *others]}) == 6
    strided = torch.arange(24.0).view(6, 4).T
    assert fingerprint({"x": strided}) == fingerprint({"x": strided.contiguous()})


def test_reads_a_view_at_an_odd_byte():
    """Bytes that start anywhere in their storage count as a copy of them does."""
    data = torch.randint(0, 256, (2 * BLOCK + 50,), dtype=torch.uint8)[3:-1]
    assert fingerprint({"x": data}) == fingerprint({"x": data.clone()})


def test_does_not_change_from_release_to_release():
    """Checkpoints of today are checked by versions of tomorrow: these numbers never change."""
    tensors = {"none": torch.zeros(0), "some": torch.arange(100, dtype=torch.float32)}
    assert fingerprint(tensors) == {"none": 1900709990928278930, "some": 6118308771620051612}
    assert fingerprint({}) == {}


def test_check_names_what_differs():
    """A changed, a missing and a new tensor are named, at most three of them, with the way out."""
    saved = {"a": 1, "b": 2, "c": 3, "d": 4}
    check_fingerprint(saved, dict(reversed(saved.items())), "last.ckpt")
    with pytest.raises(
        ValueError, match=r"(?s)last\.ckpt was trained on another frozen base.*: b \(other values"
    ) as info:
        check_fingerprint(saved, {"a": 1, "b": 3, "c": 3, "e": 5}, "last.ckpt")
    assert "d (not in this module), e (not in the checkpoint)." in str(info.value)
    assert "the same pretrained files" in str(info.value)
    with pytest.raises(ValueError, match=r"a .*, b .*, c .* and 1 more"):
        check_fingerprint(saved, {}, "last.ckpt")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_is_the_same_on_a_gpu():
    """Many blocks at once on a GPU have the checksum that the CPU computes block by block."""
    large = {"large": torch.randint(0, 256, (70 * BLOCK + 9,), dtype=torch.uint8)[5:], **base()}
    assert fingerprint({name: tensor.cuda() for name, tensor in large.items()}) == fingerprint(large)
