r"""Forgetting with group-sparse adapters: a bounded ascent, a group lasso, and prototypes of classes.

Zhao et al. 2024 (GS-LoRA), arXiv:2403.11530, eqs. 4 to 8; the prototypes are those of GS-LoRA++, arXiv:2501.09705.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, relu

from lightning_cl.functional.unlearning.token_nll import check_above_zero, connected_zero, supervised_nll

__all__ = ["add_group_lasso_", "bounded_cross_entropy", "group_lasso", "prototype_divergence", "squared_norm"]


def bounded_cross_entropy(logits: Tensor, labels: Tensor, *, bound: float | None = None) -> Tensor:
    r"""Return the forget term: ascent on the cross-entropy of the batch, until that reaches a bound.

    .. math:: \max\left(0, \mathrm{BND} - \frac{1}{n} \sum_b \sum_{t \in S_b} \ell_{bt}\right),
        \qquad \ell_{bt} = -\log p(y_{b,t+1})

    The hinge is on the **mean** of the batch; :func:`~lightning_cl.functional.unlearning.gradient_ascent` has it on
    every token. The bound is on the scale of the logits: a head whose logits are cosines times 64 has cross-entropies
    of about 100, and the paper bounds them at 105 to 110.

    Args:
        logits: Scores, [B, T, V] or [B, C].
        labels: As in :func:`~lightning_cl.functional.unlearning.shifted`.
        bound: BND in nats, above 0; :math:`2 \ln C` if ``None``, where the true class has the C-th part of a guess.

    Returns:
        A scalar, float32; 0 with a graph if nothing is supervised.

    Raises:
        ValueError: If the bound is not above 0, or the shapes do not fit.

    Example:
        >>> logits, labels = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([0])
        >>> bounded_cross_entropy(logits, labels)
        tensor(2.0289)
        >>> bounded_cross_entropy(logits, labels, bound=0.5)  # forgotten far enough
        tensor(0.)
    """
    height = 2 * math.log(logits.shape[-1]) if bound is None else bound
    check_above_zero("bound", height)
    nll = supervised_nll(logits, labels)
    return relu(height - nll.mean()) if nll.numel() else connected_zero(logits)


def squared_norm(weights: Sequence[Tensor]) -> Tensor:
    """Return the squared norm of all values of some tensors, or of this rank's shards of them; a float32 scalar.

    Example:
        >>> squared_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(25.)
    """
    return torch.stack([weight.float().square().sum() for weight in weights]).sum()


def group_lasso(squared_norms: Tensor) -> Tensor:
    r"""Return the sum over groups of their norms, with a gradient of 0 where a group is zero.

    .. math:: \sum_g \sqrt{\lVert A_g \rVert_F^2 + \lVert B_g \rVert_F^2}

    Args:
        squared_norms: What is under the root, [G], summed over the ranks that share a group.

    Example:
        >>> norms = torch.tensor([25.0, 0.0], requires_grad=True)
        >>> group_lasso(norms)
        tensor(5., grad_fn=<SumBackward0>)
        >>> group_lasso(norms).backward(); norms.grad
        tensor([0.1000, 0.0000])
    """
    positive = squared_norms > 0
    # the root of a harmless 1 where there is nothing: its own gradient at zero is infinite, and times 0 NaN
    return torch.where(positive, torch.where(positive, squared_norms, 1).sqrt(), 0).sum()


@torch.no_grad()
def add_group_lasso_(
    gradients: Sequence[Tensor], weights: Sequence[Tensor], squared_norm: Tensor, strength: float
) -> None:
    r"""Add :math:`\alpha w / \lVert g \rVert`, the gradient of the lasso for one group, to gradients in place.

    Args:
        gradients: To add to, one for each weight, or shards.
        weights: Those of the group, or this rank's shards of them.
        squared_norm: :math:`\lVert g \rVert^2` of the whole group; nothing is added where it is 0.
        strength: :math:`\alpha`.

    Example:
        >>> gradient = torch.zeros(2)
        >>> add_group_lasso_([gradient], [torch.tensor([3.0, 4.0])], torch.tensor(25.0), strength=0.1)
        >>> gradient
        tensor([0.0600, 0.0800])
    """
    factor = torch.where(squared_norm > 0, strength / squared_norm.clamp(min=torch.finfo(torch.float32).tiny).sqrt(), 0)
    for gradient, weight in zip(gradients, weights, strict=True):
        gradient.add_((weight.float() * factor).to(gradient.dtype))


def prototype_divergence(features: Tensor, labels: Tensor, prototypes: Tensor, classes: Tensor) -> Tensor:
    r"""Return the mean over samples of the divergence of their features from the prototype of their class.

    .. math:: \frac{1}{n} \sum_b \mathrm{KL}\left(\mathrm{softmax}(p_{y_b}) \,\|\, \mathrm{softmax}(f_b)\right)

    GS-LoRA++ minimises it on retained samples, and its hinge :math:`\max(0, \mathrm{BND} - \cdot)` on forgotten ones.

    Args:
        features: f, [B, D].
        labels: y, int64 [B]; a sample whose class has no prototype is left out.
        prototypes: p, [P, D]; no gradient goes there.
        classes: The class of each prototype, int64 [P], ascending.

    Returns:
        A scalar, float32; 0 with a graph if no sample has a prototype.

    Example:
        >>> features, labels = torch.tensor([[0.0, 0.0], [5.0, 1.0]]), torch.tensor([3, 8])
        >>> prototype_divergence(features, labels, torch.tensor([[2.0, 0.0]]), torch.tensor([3]))
        tensor(0.3278)
    """
    known = torch.isin(labels, classes)
    if not bool(known.any()):
        return connected_zero(features)
    place = torch.searchsorted(classes, labels[known])
    wanted = log_softmax(prototypes[place].detach().float(), dim=-1)
    return kl_div(log_softmax(features[known].float(), dim=-1), wanted, reduction="batchmean", log_target=True)
