"""Masks: what they hold exactly, and the k-th largest entry of whole and of sharded tensors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from lightning_cl.functional.masks import half_of_each, hold_gradient_, kth_largest, scale_update_, unit_importance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_held_and_free_coordinates_are_exact(dtype: torch.dtype) -> None:
    """Share 0 gives the old bits, share 1 the new ones, and one between a part of the way rounded once."""
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(30, 7, generator=generator).to(dtype) for _ in range(2))
    shares = torch.tensor([0.0, 0.3, 1.0])[torch.randint(3, (30, 7), generator=generator)]
    weight = after.clone()
    scale_update_(weight, before, shares)
    assert torch.equal(weight[shares == 0], before[shares == 0])
    assert torch.equal(weight[shares == 1], after[shares == 1])
    expected = (before.double() + 0.3 * (after.double() - before.double())).to(dtype)
    torch.testing.assert_close(weight[shares == 0.3], expected[shares == 0.3])


def test_shares_of_rows_and_of_whole_tensors() -> None:
    """They broadcast to the weight."""
    before, after = torch.zeros(2, 3), torch.ones(2, 3)
    weight = after.clone()
    scale_update_(weight, before, torch.tensor([[0.25], [1.0]]))
    assert weight.tolist() == [[0.25] * 3, [1.0] * 3]
    weight = after.clone()
    scale_update_(weight, before, 0.5)
    assert weight.tolist() == [[0.5] * 3] * 2
    gradient = torch.ones(2, 3)
    hold_gradient_(gradient, torch.tensor([[0.0], [1.0]]))
    assert gradient.tolist() == [[0.0] * 3, [1.0] * 3]


def _hard() -> list[torch.Tensor]:
    """Ties, zeros, subnormal numbers, one entry, infinity, digits of ones, and many orders of magnitude."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(3000, generator=generator).abs() * 10.0 ** torch.randint(-40, 38, (3000,), generator=generator)
    ties = torch.randint(0, 4, (50, 7), generator=generator).float()
    ones = torch.tensor([0x3F8FFFFF, 0x3F8FFC00, 0x3F8FFFFE, 0x3F8FFFFF], dtype=torch.int32).view(torch.float32)
    return [ones, wide, ties, torch.tensor([2.5]), torch.zeros(9), torch.tensor([torch.inf, 1e-44, 0.0, 3.0])]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_kth_largest_is_that_of_a_sort(share: float) -> None:
    """To the bit, from the largest to the smallest entry."""
    tensors = _hard()
    ranks = [max(1, int(share * tensor.numel())) for tensor in tensors]
    sorted_ = [tensor.flatten().sort(descending=True).values for tensor in tensors]
    expected = torch.stack([values[rank - 1] for values, rank in zip(sorted_, ranks, strict=True)])
    assert torch.equal(kth_largest(tensors, ranks), expected)


def test_shards_find_what_the_whole_tensor_gives() -> None:
    """Each part counts for itself, one of them being empty, and the sums of counts are exchanged."""
    tensors = [tensor.flatten() for tensor in _hard()]
    ranks = [(tensor.numel() + 1) // 2 for tensor in tensors]
    parts = [tensor.split([tensor.numel() // 3, tensor.numel() - tensor.numel() // 3]) for tensor in tensors]
    barrier, counted = Barrier(2, timeout=60), {}

    def run(rank: int) -> torch.Tensor:
        def total(counts: torch.Tensor) -> torch.Tensor:
            counted[rank] = counts
            barrier.wait()
            summed = counted[0] + counted[1]
            barrier.wait()
            return summed

        return kth_largest([part[rank].clone() for part in parts], ranks, total)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, kth_largest(tensors, ranks))


def test_more_entries_than_torch_quantile_takes() -> None:
    """17 million of them, where `torch.quantile` gives up."""
    values = torch.arange(17_000_000, dtype=torch.float32).flip(0)
    assert kth_largest([values], [5_000_000]).item() == 12_000_000


def test_half_of_each_group() -> None:
    """Half of even groups; of odd ones half are rounded up; the choice is the generator's."""
    sizes = [4, 3, 3, 1, 1, 1]
    choices = [half_of_each(sizes, torch.Generator().manual_seed(seed)) for seed in range(40)]
    for chosen in choices:
        assert all(
            len(set(part)) == len(part) and set(part) <= set(range(n)) for part, n in zip(chosen, sizes, strict=True)
        )
        assert len(chosen[0]) == 2
        assert [len(part) - n // 2 for part, n in zip(chosen, sizes, strict=True)].count(1) == 2
    assert {position for chosen in choices for position in chosen[0]} == {0, 1, 2, 3}
    assert all(any(len(chosen[group]) > sizes[group] // 2 for chosen in choices) for group in range(1, 6))
    assert choices[3] == half_of_each(sizes, torch.Generator().manual_seed(3))


def test_unit_importance_is_normalised_in_its_layer() -> None:
    """By hand; scale does not matter, and units that do not differ, or one alone, have none."""
    sums = torch.tensor([1.0, 2.0, 6.0])
    expected = ((sums - 3) / torch.tensor(7.0).sqrt()).tanh().abs()
    torch.testing.assert_close(unit_importance(sums), expected)
    torch.testing.assert_close(unit_importance(1000 * sums), expected)
    assert unit_importance(torch.full((3,), 4.0)).tolist() == [0.0] * 3
    assert unit_importance(torch.tensor([5.0])).tolist() == [0.0]
