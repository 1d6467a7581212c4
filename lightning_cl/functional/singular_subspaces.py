r"""Leading singular directions of weights, and how many of them to protect (Nayak et al. 2025, arXiv:2504.07097)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from lightning_cl.functional.subspaces import Subspace, exact_dtype

__all__ = ["add_similarity_", "leading_subspaces", "normalised_importance", "protected_rank"]


@torch.no_grad()
def add_similarity_(total: Tensor, inputs: Tensor, outputs: Tensor, present: Tensor | None = None) -> Tensor:
    """Add the sum of cosine similarities of rows of ``inputs`` and ``outputs``, and their number, to ``total``.

    Args:
        total: The two numbers, ``[2]``; returned.
        inputs: ``[..., d]``.
        outputs: Of the same shape.
        present: Boolean ``[n, T]``; positions of inputs ``[n, T, d]`` that are False do not count.

    Example:
        >>> add_similarity_(torch.zeros(2), torch.eye(2), torch.tensor([[5.0, 0.0], [5.0, 0.0]]))
        tensor([1., 2.])
    """
    if present is not None and inputs.ndim > 2 and inputs.shape[:2] == present.shape:
        inputs, outputs = inputs[present], outputs[present]
    similarity = cosine_similarity(inputs.to(total.dtype), outputs.to(total.dtype), dim=-1)
    return total.add_(torch.stack([similarity.sum(), total.new_tensor(similarity.numel())]))


def normalised_importance(similarity: Mapping[str, float]) -> dict[str, float]:
    r"""Return :math:`I_l = s_l / \bar s`, of mean 1 over the layers; similarities below 0 count as 0.

    Example:
        >>> normalised_importance({"a": 0.1, "b": 0.3, "c": -0.5})
        {'a': 0.75, 'b': 2.25, 'c': 0.0}
    """
    positive = {name: max(value, 0.0) for name, value in similarity.items()}
    mean = sum(positive.values()) / max(len(positive), 1)
    return {name: value / mean if mean > 0 else 1.0 for name, value in positive.items()}


def protected_rank(shape: tuple[int, int], importance: float, min_ratio: float, target_ratio: float) -> int:
    r"""Return how many directions of a weight to protect.

    .. math:: k_l = \min(r_l, 1) \, \min(n, d) \text{ rounded}, \qquad r_l = r_{min} + I_l \, (r_{target} - r_{min}) .

    Args:
        shape: n and d of the weight.
        importance: :math:`I_l`, 1 in the mean over layers.
        min_ratio: :math:`r_{min}`, what a layer of no importance keeps (mrr in the paper).
        target_ratio: :math:`r_{target}`, what is kept in the mean (trr in the paper).

    Example:
        >>> [protected_rank((10, 20), importance, 0.1, 0.8) for importance in (0.0, 1.0, 2.0)]
        [1, 8, 10]
    """
    ratio = min(min_ratio + importance * (target_ratio - min_ratio), 1.0)
    return round(ratio * min(shape))


def leading_subspaces(weight: Tensor, rank: int) -> tuple[Subspace, Subspace]:
    r"""Return the spaces of the leading left and right singular vectors of a weight, of dimensions n and d.

    With their projections :math:`U U^\top` and :math:`V V^\top`, an update :math:`\Delta W` keeps
    :math:`\Delta W - U U^\top \Delta W V V^\top`.

    Args:
        weight: ``[n, d]``; decomposed in float64 where the device has it.
        rank: How many vectors, at most min(n, d).

    Example:
        >>> left, right = leading_subspaces(torch.diag(torch.tensor([1.0, 5.0, 3.0])), rank=1)
        >>> right.component(torch.ones(1, 1, 3, dtype=torch.float64))
        tensor([[[0., 1., 0.]]], dtype=torch.float64)
    """
    left, _, right = torch.linalg.svd(weight.to(exact_dtype(weight.device)), full_matrices=False)
    return Subspace.spanned_by([left[:, :rank]]), Subspace.spanned_by([right[:rank].T])
