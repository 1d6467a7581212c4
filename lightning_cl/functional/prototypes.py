"""Exact k-means, and which prototype is nearest: Lloyd 1982 from the starts of Arthur and Vassilvitskii 2007."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

__all__ = ["Metric", "k_means", "prototype_distances"]

Metric = Literal["euclidean", "cosine", "manhattan"]


def k_means(points: Tensor, k: int, *, seed: int = 0) -> Tensor:
    r"""Return centres :math:`\mu` where Lloyd's algorithm ends: in a local minimum of the mean squared distance.

    .. math:: \frac{1}{N} \sum_{n=1}^{N} \min_{j} \| x_n - \mu_j \|^2

    It starts from k-means++: the first centre is a random point, each further one a point with a chance
    in proportion to its squared distance from those chosen so far. A centre that loses all its points goes to the point
    that is farthest from its own centre. Computed in float64, in an order of its own, so that equal points give equal
    bits.

    Args:
        points: [N, D], at least one, all finite.
        k: Centres, from 1.
        seed: Seeds the choice of the starts.

    Returns:
        [K, D] in float32, ordered as they were chosen; fewer than k, if there are fewer different points.

    Raises:
        ValueError: Without points, or if one is not finite.

    Example:
        >>> k_means(torch.tensor([[0.0], [2.0], [10.0], [14.0]]), k=2).sort(dim=0).values
        tensor([[ 1.],
                [12.]])
    """
    if points.ndim != 2 or not len(points) or not bool(points.isfinite().all()):
        raise ValueError(f"k-means needs rows of finite numbers, got {list(points.shape)} of {points.dtype}.")
    points = points.double()
    return _lloyd(points, _starts(points, k, seed)).float()


def prototype_distances(points: Tensor, prototypes: Tensor, metric: Metric = "euclidean") -> Tensor:
    r"""Return the distance of each point from each prototype, of which the nearest has the least.

    .. math:: \| x - p \|_2 \quad (\text{``euclidean''}), \qquad 1 - \frac{x \cdot p}{\|x\| \|p\|} \quad
        (\text{``cosine''}), \qquad \sum_d |x_d - p_d| \quad (\text{``manhattan''})

    A row depends on its own point alone, to the bit: no product of matrices, which rounds by the size of a batch.

    Args:
        points: x, [N, D].
        prototypes: p, [P, D].
        metric: Which distance.

    Returns:
        [N, P] in float32.

    Example:
        >>> points, prototypes = torch.tensor([[9.0, 1.0]]), torch.tensor([[1.0, 0.0], [8.0, 6.0]])
        >>> prototype_distances(points, prototypes)
        tensor([[8.0623, 5.0990]])
        >>> prototype_distances(points, prototypes, "cosine")
        tensor([[0.0061, 0.1386]])
    """
    points, prototypes = points.float(), prototypes.to(points.device).float()
    if metric == "manhattan":
        return torch.cdist(points, prototypes, p=1)
    if metric == "euclidean":
        return _squared_distances(points, prototypes).sqrt()
    # half the squared distance on the sphere, which keeps the digits of small angles
    return _squared_distances(normalize(points, dim=1), normalize(prototypes, dim=1)) / 2


def _squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    # not by products, which lose the last digits where the distance is small
    return torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").square()


def _lloyd(points: Tensor, centres: Tensor) -> Tensor:
    """Return where centres end that move to the means of their points until that makes no difference."""
    last = float("inf")
    while True:
        distances, nearest = _squared_distances(points, centres).min(dim=1)
        total = float(distances.sum())
        # it falls in every round but for rounding, and ends the rounds even then
        if not total < last:
            return centres
        last = total
        members = one_hot(nearest, len(centres)).to(points.dtype)
        counts = members.sum(0)
        # a product, because sums by index come in another order each time on a GPU
        centres = members.T @ points / counts.clamp(min=1)[:, None]
        empty = (counts == 0).nonzero()[:, 0]
        centres[empty] = points[distances.argsort(descending=True, stable=True)[: len(empty)]]


def _starts(points: Tensor, k: int, seed: int) -> Tensor:
    """Return the starts of k-means++, as many of them as there are different points."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    distances = _squared_distances(points, points[chosen])[:, 0]
    while len(chosen) < k and bool(distances.any()):
        heights = distances.cumsum(0)
        # in (0, 1], so that a point at distance 0 is never met
        height = (1 - torch.rand((), generator=generator, dtype=torch.float64).item()) * heights[-1]
        chosen.append(min(int(torch.searchsorted(heights, height)), len(points) - 1))
        distances = torch.minimum(distances, _squared_distances(points, points[chosen[-1:]])[:, 0])
    return points[chosen].clone()
