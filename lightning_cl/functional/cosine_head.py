"""Scores by angles: Hou et al. 2019, "Learning a Unified Classifier Incrementally via Rebalancing", eq. 4 (CVPR)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear, normalize

__all__ = ["cosine_scores"]


def cosine_scores(features: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    r"""Return the scores of classes by the angles between features and class weights, [..., C].

    .. math:: z_c = \eta \cos(w_c, f) = \eta \, \frac{w_c^\top f}{\lVert w_c \rVert \lVert f \rVert}

    A class that was trained on more samples, or last, has no larger score by a longer weight. Vectors are normalised in
    float32 or above, and that of zeros has a cosine of 0 with all others.

    Args:
        features: f, [..., D].
        weight: The class weights w, [C, D].
        scale: :math:`\eta`, [1].

    Example:
        >>> import torch
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 100.0]])  # a long weight is no better than a short one
        >>> cosine_scores(torch.tensor([[3.0, 4.0]]), weight, torch.tensor([10.0]))
        tensor([[6., 8.]])
    """
    features, weight = (tensor.float() if tensor.itemsize < 4 else tensor for tensor in (features, weight))
    return scale.to(features.dtype) * linear(normalize(features, dim=-1), normalize(weight, dim=-1))
