r"""Unlearning from logit difference: an assistant remembers what the model shall forget, and is subtracted from it.

Ji et al. 2024 (ULD), arXiv:2406.08607, eqs. 3 to 5. Which tokens the assistant may change is the relative threshold of
contrastive decoding (Li et al. 2022, arXiv:2210.15097), with the number of tokens that the authors' code keeps in any
case.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from lightning_cl.functional.unlearning.max_entropy import divergence_from_uniform
from lightning_cl.functional.unlearning.token_nll import connected_zero

__all__ = ["logit_difference", "uniform_divergence"]


def uniform_divergence(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Return the mean over positions of :math:`\mathrm{KL}(U \,\|\, p)`, the assistant's loss on retained data.

    .. math:: \frac{1}{|P|} \sum_{(b,t) \in P} \left(-\ln V - \frac{1}{V} \sum_v \log p_{btv}\right)

    It is 0 where the assistant knows nothing, so that it takes nothing from the model there. Tokens that a mask has
    closed are left out of V.

    Args:
        logits: Scores, [B, T, V] or [B, C].
        mask: P: attention mask, [B, T]; all positions if ``None``.

    Returns:
        A scalar, float32; 0 with a graph if P is empty.

    Example:
        >>> uniform_divergence(torch.tensor([[[0.0, 0.0], [2.0, 0.0]]]))
        tensor(0.2169)
        >>> uniform_divergence(torch.tensor([[[0.0, 0.0], [2.0, 0.0]]]), mask=torch.tensor([[1, 0]]))
        tensor(0.)
    """
    chosen = logits.flatten(0, -2) if mask is None else logits[mask.bool()]
    if not chosen.numel():
        return connected_zero(logits)
    return divergence_from_uniform(chosen).mean()


def logit_difference(
    base: Tensor, assistant: Tensor, *, weight: float = -0.8, threshold: float = 0.01, exclude: bool = True
) -> Tensor:
    r"""Return the log-probabilities of a model from which what an assistant knows is taken away.

    .. math:: \log \mathrm{softmax}\left(z_v + w \, a_v\right) \text{ for } v \in K, \qquad
        K = \left\{v : p_v \ge \tau \max_u p_u\right\} \cup \mathrm{top}_{\lfloor \tau V \rfloor}(p)

    with p the softmax of z. Tokens that the model itself finds hopeless are not in K: the assistant, which knows little
    of language, must not lift them.

    Args:
        base: z, the scores of the model, [..., V].
        assistant: a, those of the assistant, [..., V].
        weight: w; below 0 takes away, 0 is the model itself within K.
        threshold: :math:`\tau`, above 0 and at most 1: 1 keeps all tokens.
        exclude: Whether the tokens outside K are impossible, as in generation; else they have the score of the model,
            without the assistant, as for the probability of a given text.

    Returns:
        Log-probabilities, float32 [..., V].

    Raises:
        ValueError: For a threshold out of range, and different shapes.

    Example:
        >>> base, assistant = torch.tensor([4.0, 3.0, -9.0]), torch.tensor([5.0, 0.0, -5.0])
        >>> logit_difference(base, assistant).exp()  # the first token was the secret
        tensor([0.0474, 0.9526, 0.0000])
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"`threshold` must be above 0 and at most 1, got {threshold!r}.")
    if base.shape != assistant.shape:
        raise ValueError(
            f"The scores of the model have shape {list(base.shape)}, those of the assistant {list(assistant.shape)}:"
            " both must have the same vocabulary."
        )
    scores = base.float()
    least = scores.amax(-1, keepdim=True) + math.log(threshold)
    if kept := int(threshold * scores.shape[-1]):
        least = torch.minimum(least, scores.topk(kept).values[..., -1:])
    inside = scores >= least
    outside = torch.full_like(scores, -torch.inf) if exclude else scores
    return log_softmax(torch.where(inside, scores + weight * assistant.float(), outside), dim=-1)
