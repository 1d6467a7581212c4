r"""Gradient ascent on what is to be forgotten, bounded, and gradient difference, which descends on the rest.

Liu et al. 2022 ("Continual learning and private unlearning"), arXiv:2203.12817; as losses of language models Jang et
al. 2022, arXiv:2210.01504 (ascent), and Maini et al. 2024, arXiv:2401.06121 (TOFU, gradient difference). The bound is
the hinge of Zhao et al. 2024 (GS-LoRA), arXiv:2403.11530, there on the mean of the batch, here on every token.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor
from torch.nn.functional import relu

from lightning_cl.functional.unlearning.token_nll import check_above_zero, supervised_nll, token_nll

__all__ = ["Bound", "grad_diff", "gradient_ascent"]

Bound = float | Literal["uniform"] | None


def gradient_ascent(logits: Tensor, labels: Tensor, *, bound: Bound = "uniform") -> Tensor:
    r"""Return the loss whose descent is gradient ascent, a mean over the supervised tokens of the batch.

    .. math:: \frac{1}{n} \sum_{b} \sum_{t \in S_b} \max(0, \kappa - \ell_{bt}), \qquad \ell_{bt} = -\log p(y_{b,t+1})

    A token whose negative log-likelihood has reached the bound :math:`\kappa` has gradient 0; below it, the gradient is
    exactly that of ascent. Without a bound it is :math:`-\frac{1}{n} \sum \ell`, which has no minimum: the model is
    destroyed sooner or later, and only the number of steps decides when.

    Args:
        logits: Scores, [B, T, V] or [B, C].
        labels: As in :func:`~lightning_cl.functional.unlearning.shifted`.
        bound: :math:`\kappa`, above 0, in nats; ``"uniform"``: the logarithm of the number of classes, which is what a
            guess costs; ``None`` for none.

    Returns:
        A scalar, float32; 0 with a graph if nothing is supervised.

    Raises:
        ValueError: If the bound is not above 0, or the shapes do not fit.

    Example:
        >>> import torch
        >>> logits, labels = torch.tensor([[2.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 0])
        >>> gradient_ascent(logits, labels)  # the second sample is forgotten already
        tensor(0.2831)
        >>> gradient_ascent(logits, labels, bound=None)
        tensor(-2.5668)
    """
    if bound is None:
        return -token_nll(logits, labels, reduction="token_mean")
    height = math.log(logits.shape[-1]) if bound == "uniform" else bound
    check_above_zero("bound", height)
    nll = supervised_nll(logits, labels)
    return relu(height - nll).sum() / max(nll.numel(), 1)


def grad_diff(
    forget_logits: Tensor,
    forget_labels: Tensor,
    retain_logits: Tensor,
    retain_labels: Tensor,
    *,
    bound: Bound = "uniform",
    forget_weight: float = 1.0,
    retain_weight: float = 1.0,
) -> Tensor:
    r"""Return the loss of gradient difference: ascent on the forget batch, descent on the retain batch.

    .. math:: \gamma \, \frac{1}{n_f} \sum_{f} \max(0, \kappa - \ell) + \alpha \, \frac{1}{n_r} \sum_{r} \ell

    with a mean over supervised tokens for each of the two batches, so their lengths do not weigh them.

    Args:
        forget_logits: Scores of the forget batch, [B, T, V] or [B, C].
        forget_labels: As in :func:`~lightning_cl.functional.unlearning.shifted`.
        retain_logits: Scores of the retain batch.
        retain_labels: Its labels.
        bound: :math:`\kappa` of :func:`gradient_ascent`; ``None`` is the form of the papers.
        forget_weight: :math:`\gamma`.
        retain_weight: :math:`\alpha`.

    Returns:
        A scalar, float32.

    Raises:
        ValueError: If the bound is not above 0, or shapes do not fit.

    Example:
        >>> import torch
        >>> forget, retain = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> grad_diff(forget, torch.tensor([0]), retain, torch.tensor([1]))
        tensor(0.6931)
    """
    ascent = gradient_ascent(forget_logits, forget_labels, bound=bound)
    descent = token_nll(retain_logits, retain_labels, reduction="token_mean")
    return forget_weight * ascent + retain_weight * descent
