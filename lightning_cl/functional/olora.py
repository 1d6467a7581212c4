r"""Orthogonality between the factor A of a LoRA and those of earlier tasks.

Wang et al. 2023, arXiv:2310.14152, eq. 7 and 8: with the new factor :math:`A` ``[r, d]`` and the old ones stacked in
:math:`P` ``[R, d]``, the penalty is taken of :math:`O = A P^\top`. Each row of its gradient needs only that row of
:math:`A`, so with :math:`P` whole all of this runs on the rows that a rank holds; only the value must be summed over
ranks by the caller.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_cl.functional.low_rank import wide

__all__ = ["OrthogonalityForm", "orthogonality_gradient_", "orthogonality_penalty"]

OrthogonalityForm = Literal["squared", "absolute", "cosine"]


@torch.no_grad()
def orthogonality_penalty(new: Tensor, past: Tensor, form: OrthogonalityForm = "squared") -> Tensor:
    r"""Return the penalty of some rows :math:`a_i` of the new factor against all rows :math:`p_j` of the old ones.

    .. math::
        \text{squared: } \sum_{i,j} (a_i \cdot p_j)^2, \qquad
        \text{absolute: } \sum_{i,j} |a_i \cdot p_j|, \qquad
        \text{cosine: } \sum_i \frac{1}{R} \sum_j \cos^2(a_i, p_j).

    The last is a sum over i too, so that rows on several ranks add up; divided by their number it is from 0 to 1. A row
    of zeros has the cosine 0 with every other.

    Args:
        new: Rows of :math:`A`, ``[n, d]``.
        past: :math:`P`, ``[R, d]``, without rows that no task uses.
        form: Of the penalty.

    Returns:
        A float32 scalar (float64 for float64 rows).

    Example:
        >>> new, past = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0], [0.0, -1.0]])
        >>> orthogonality_penalty(new, past), orthogonality_penalty(new, past, "absolute")
        (tensor(52.), tensor(10.))
        >>> orthogonality_penalty(new, past, "cosine")
        tensor(0.5000)
    """
    new, past = wide(new), wide(past)
    if form == "cosine":
        cosines = normalize(new, dim=1) @ normalize(past, dim=1).mT
        return cosines.square().sum() / max(len(past), 1)
    products = new @ past.mT
    return products.square().sum() if form == "squared" else products.abs().sum()


@torch.no_grad()
def orthogonality_gradient_(
    gradient: Tensor, new: Tensor, past: Tensor, strength: float, form: OrthogonalityForm = "squared"
) -> None:
    r"""Add the gradient of ``strength`` times :func:`orthogonality_penalty` in ``new`` to a gradient, in place.

    .. math::
        \text{squared: } 2 A P^\top P, \qquad
        \text{absolute: } \operatorname{sign}(A P^\top) P, \qquad
        \text{cosine, row } i \text{: } \frac{2}{R \lVert a_i \rVert}
            \left( \hat a_i \hat P^\top \hat P - \lVert \hat a_i \hat P^\top \rVert^2 \hat a_i \right)

    where a hat is a row divided by its norm. The sum is formed in float32 and rounded once where gradients are of half
    precision. The gradient of a row of zeros is 0 under ``"cosine"``.

    Args:
        gradient: Rows of the gradient, ``[n, d]``, changed in place.
        new: The rows of :math:`A` that it belongs to, ``[n, d]``.
        past: :math:`P`, ``[R, d]``, without rows that no task uses.
        strength: :math:`\lambda`.
        form: Of the penalty.

    Example:
        >>> gradient = torch.zeros(1, 2)
        >>> orthogonality_gradient_(gradient, torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]]), strength=0.5)
        >>> gradient
        tensor([[12.,  0.]])
    """
    new, past = wide(new), wide(past)
    if form == "squared":
        gradient.add_((new @ past.mT) @ past, alpha=2 * strength)
    elif form == "absolute":
        gradient.add_((new @ past.mT).sign() @ past, alpha=strength)
    else:
        directions, past = normalize(new, dim=1), normalize(past, dim=1)
        cosines = directions @ past.mT
        turned = cosines @ past - cosines.square().sum(1, keepdim=True) * directions
        norms = new.norm(dim=1, keepdim=True)
        turned = torch.where(norms > 0, turned / norms, 0.0)
        gradient.add_(turned, alpha=2 * strength / max(len(past), 1))
