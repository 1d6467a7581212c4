"""K-means against hand-worked centres, exhaustive search and its own fixpoint; distances by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lightning_cl.functional.prototypes import Metric, _lloyd, _starts, k_means, prototype_distances


def cost(points: Tensor, centres: Tensor) -> float:
    """The sum of squared distances from the nearest centres, term by term."""
    return sum(min(float((p - c).square().sum()) for c in centres) for p in points.double())


def blobs(seed: int, samples: int = 60, width: int = 3, centres: int = 4) -> Tensor:
    """Gaussian clusters that overlap."""
    generator = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(centres, width, generator=generator)
    return means[torch.arange(samples) % centres] + torch.randn(samples, width, generator=generator)


def test_hand_worked() -> None:
    """Two groups on a line, whichever points it starts from: their means."""
    points = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0], [100.0, 3.0], [102.0, 5.0]])
    for seed in range(8):
        centres = k_means(points, 2, seed=seed)
        torch.testing.assert_close(centres[centres[:, 0].argsort()], torch.tensor([[2.0, 1.0], [101.0, 4.0]]))


@pytest.mark.parametrize("seed", range(5))
def test_ends_in_a_minimum_of_lloyd(seed: int) -> None:
    """Each centre is the mean of the points that are nearest to it, and none is without points."""
    points = blobs(seed)
    centres = k_means(points, 7, seed=seed)
    nearest = torch.cdist(points.double(), centres.double()).argmin(1)
    assert centres.shape == (7, 3)
    for j, centre in enumerate(centres):
        torch.testing.assert_close(points[nearest == j].double().mean(0).float(), centre)


def test_best_of_a_few_starts_is_the_global_minimum() -> None:
    """Against every way to split seven points in two and in three."""
    points = blobs(3, samples=7, width=2, centres=3).double()
    for k in (2, 3):
        splits = [torch.tensor(split) for split in itertools.product(range(k), repeat=7)]
        groups = [[points[split == j] for j in range(k)] for split in splits if len(split.unique()) == k]
        best = min(sum(float((part - part.mean(0)).square().sum()) for part in parts) for parts in groups)
        found = min(cost(points, k_means(points, k, seed=seed).double()) for seed in range(10))
        assert found == pytest.approx(best, rel=1e-6)


def test_a_centre_without_points_goes_to_the_farthest() -> None:
    """By hand from three starts, the last one far from all: it goes to 10; the means 0.5, 5, 10 become 1, 3, 10."""
    points, starts = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]]), torch.tensor([[0.0], [3.0], [1000.0]])
    torch.testing.assert_close(_lloyd(points, starts), torch.tensor([[1.0], [3.0], [10.0]]))


def test_starts_follow_the_squared_distance() -> None:
    """With 0 first, 1 and 3 are 1 and 9 away: the second start is 3 in nine of ten."""
    points = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    seconds = [starts[1].item() for seed in range(1500) if (starts := _starts(points, 2, seed))[0] == 0]
    assert len(seconds) == pytest.approx(500, abs=80)
    assert seconds.count(3.0) / len(seconds) == pytest.approx(0.9, abs=0.05)
    assert seconds.count(0.0) == 0


def test_fewer_different_points_than_centres() -> None:
    """Each of them is a centre, once."""
    points = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [3.0, 4.0]])
    centres = k_means(points, 5)
    assert sorted(centres.tolist()) == [[1.0, 2.0], [3.0, 4.0]]
    assert k_means(points[:1], 5).tolist() == [[1.0, 2.0]]


def test_same_bits_for_the_same_points() -> None:
    """Whatever torch's own generator is at; the seed moves the starts."""
    points = blobs(1)
    first = k_means(points, 6)
    torch.rand(3)
    assert torch.equal(first, k_means(points.clone(), 6))
    assert len({tuple(k_means(points, 6, seed=seed).flatten().tolist()) for seed in range(6)}) > 1


def test_far_from_the_origin() -> None:
    """Two points 0.25 apart at 2048, which single-precision products of them would not tell apart."""
    points = torch.tensor([[2048.0], [2048.25], [2049.0], [2049.25]]).expand(4, 64)
    centres = k_means(points, 4)
    assert sorted(centres[:, 0].tolist()) == [2048.0, 2048.25, 2049.0, 2049.25]
    assert prototype_distances(points, points).argmin(1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("points", [torch.empty(0, 2), torch.tensor([[1.0], [torch.nan]]), torch.ones(3)])
def test_what_has_no_centres(points: Tensor) -> None:
    """No points, not-a-numbers, no rows."""
    with pytest.raises(ValueError, match="k-means needs rows of finite numbers"):
        k_means(points, 1)


def test_distances_by_hand() -> None:
    """3-4-5 triangle; a right and a straight angle; sums of sides."""
    points, prototypes = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0], [-4.0, 3.0], [-6.0, -8.0]])
    euclidean = prototype_distances(points, prototypes)
    torch.testing.assert_close(euclidean, torch.tensor([[5.0, 50**0.5, 15.0]]))
    cosine = prototype_distances(points, prototypes[1:], "cosine")
    torch.testing.assert_close(cosine, torch.tensor([[1.0, 2.0]]))
    manhattan = prototype_distances(points, prototypes, "manhattan")
    torch.testing.assert_close(manhattan, torch.tensor([[7.0, 8.0, 21.0]]))


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "manhattan"])
def test_a_row_depends_on_its_own_point(metric: Metric) -> None:
    """To the bit, alone and among others."""
    points, prototypes = blobs(0, samples=33, width=48), blobs(1, samples=9, width=48)
    together = prototype_distances(points, prototypes, metric)
    alone = torch.cat([prototype_distances(point[None], prototypes, metric) for point in points])
    assert torch.equal(together, alone)
