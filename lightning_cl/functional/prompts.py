r"""Which prompts a sample gets: keys and attention over a pool, and rows that start orthogonal to those before them.

L2P (Wang et al. 2022, arXiv:2112.08654), DualPrompt (Wang et al. 2022, arXiv:2204.04799) and CODA-Prompt (Smith et al.
2023, arXiv:2211.13218). A row of every result depends on its own query alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

__all__ = [
    "component_weights",
    "key_distance",
    "key_similarities",
    "orthonormalise_",
    "prompt_orthogonality",
    "selection_penalty",
]


def key_similarities(queries: Tensor, keys: Tensor) -> Tensor:
    r"""Return the cosine of each query with each key, :math:`q \cdot k / (\|q\| \|k\|)`.

    Args:
        queries: [B, D].
        keys: [M, D].

    Returns:
        [B, M] in float32, from -1 to 1.

    Example:
        >>> key_similarities(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, -2.0]]))
        tensor([[ 0.6000, -0.8000]])
    """
    return normalize(queries.float(), dim=-1) @ normalize(keys.float(), dim=-1).T


def selection_penalty(counts: Tensor) -> Tensor:
    r"""Return the factors :math:`h_m` on the distances of keys that earlier tasks chose often (L2P, equation 4).

    .. math:: h_m = \frac{c_m + 1}{\sum_j (c_j + 1)}

    The 1, which the paper does not have, keeps keys apart that were never chosen: their distances would all become 0.

    Args:
        counts: How often each of the M keys was chosen, [M].

    Returns:
        Positive factors [M] in float32 that sum to 1; equal ones without counts, which change no choice.

    Example:
        >>> selection_penalty(torch.tensor([0, 5, 1]))
        tensor([0.1111, 0.6667, 0.2222])
    """
    smoothed = counts.float() + 1
    return smoothed / smoothed.sum()


def key_distance(similarities: Tensor, chosen: Tensor) -> Tensor:
    r"""Return what pulls the chosen keys to a query, :math:`\sum_{m \in K_x} (1 - \cos(q(x), k_m))` (L2P, equation 5).

    Args:
        similarities: From :func:`key_similarities`, [B, M].
        chosen: Indices of the chosen keys, int64 [B, K].

    Returns:
        One sum for each sample, [B], from 0 to 2 K. Its gradient reaches the chosen keys only.

    Example:
        >>> key_distance(torch.tensor([[0.5, 1.0, -1.0]]), torch.tensor([[0, 2]]))
        tensor([2.5000])
    """
    return (1 - similarities.gather(1, chosen)).sum(1)


def component_weights(queries: Tensor, attention: Tensor, keys: Tensor) -> Tensor:
    r"""Return the weights of prompt components, :math:`\alpha_m = \cos(q \odot A_m, K_m)` (CODA-Prompt).

    Args:
        queries: q, [B, D].
        attention: A, the features of the query that each component looks at, [M, L, D] for L layers.
        keys: K, [M, L, D].

    Returns:
        [B, M, L] in float32, from -1 to 1; they need not sum to 1.

    Example:
        >>> component_weights(torch.tensor([[3.0, 4.0]]), torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 1.0]]]))
        tensor([[[0.7071]]])
    """
    attention = attention.float()
    directions = normalize(keys.float(), dim=-1)
    dots = torch.einsum("bd,mld->bml", queries.float(), attention * directions)
    lengths = torch.einsum("bd,mld->bml", queries.float().square(), attention.square())
    # before the root, whose slope at 0 has no end
    return dots / lengths.clamp(min=1e-24).sqrt()


@torch.no_grad()
def orthonormalise_(rows: Tensor, start: int) -> None:
    r"""Make rows from ``start`` on orthogonal to all before them and to each other, of length 1, in place.

    Gram-Schmidt in float64: from each new row its part in the span of the rows before is taken. The rows before
    ``start`` stay, whether they are orthogonal or not.

    Args:
        rows: [N, ...], N at most the number of entries of a row.
        start: The first new row.

    Example:
        >>> rows = torch.tensor([[2.0, 0.0, 0.0], [1.0, 3.0, 0.0]])
        >>> orthonormalise_(rows, start=1)
        >>> rows
        tensor([[2., 0., 0.],
                [0., 1., 0.]])
    """
    flat = rows.flatten(1).double()
    # an orthonormal basis of what the old rows span, whatever their angles
    _, values, right = torch.linalg.svd(flat[:start], full_matrices=False)
    basis = right[values > values.amax() * 1e-10] if start else flat[:0]
    for row in range(start, len(flat)):
        new = flat[row]
        # twice, because what rounding leaves of the first time may be all that a row near the span has
        for _ in range(2):
            new = new - basis.T @ (basis @ new)
        flat[row] = normalize(new, dim=0)
        basis = torch.cat([basis, flat[row : row + 1]])
    rows[start:] = flat[start:].to(rows.dtype).view_as(rows[start:])


def prompt_orthogonality(rows: Tensor) -> Tensor:
    r"""Return how far rows are from orthonormal, the mean of the squared entries of :math:`R R^T - I`.

    Args:
        rows: R, [M, ...].

    Returns:
        A scalar; 0 for orthonormal rows.

    Example:
        >>> prompt_orthogonality(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        tensor(0.5000)
    """
    flat = rows.flatten(1).float()
    return (flat @ flat.T - torch.eye(len(flat), device=flat.device)).square().mean()
