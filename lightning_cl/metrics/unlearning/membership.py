"""Membership inference: can it be told from the outside that a sample was learned? High scores mean *non-member*."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from lightning_cl.metrics.unlearning._tokens import Supervised, mean_of_tokens, supervised_tokens

__all__ = ["Membership", "loss_score", "membership_auc", "min_k_plus_plus_score", "min_k_score", "zlib_score"]


class Membership(NamedTuple):
    """What a membership attack achieves, and what it achieves against the model that never saw the samples."""

    auc: float
    """1: forget samples are still told from held-out ones as members; 0.5: they are not; 0: over-forgotten."""
    retrained_auc: float | None
    """The same against the retrained model; ``None`` if it was not given. Rarely 0.5: it is what to compare with."""

    @property
    def difference(self) -> float | None:
        """``auc - retrained_auc``: 0 is as good as retraining, above 0 still known, below 0 conspicuously gone."""
        return None if self.retrained_auc is None else self.auc - self.retrained_auc


def loss_score(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Return the mean negative log-likelihood of each row; high = non-member.

    .. math:: s = -\frac{1}{n} \sum_t \log p(y_t \mid x, y_{<t})

    Yeom et al. 2018 (LOSS), arXiv:1709.01604.

    Args:
        logits: ``[B, T, V]`` with labels ``[B, T]`` that are not shifted yet, or ``[B, C]`` with labels ``[B]``.
        labels: int64, -100 where not supervised.

    Returns:
        float32 ``[B]``, at least 0; NaN for rows without a supervised token.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> loss_score(torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log(), torch.tensor([0, 0]))
        tensor([0.6931, 0.1054])
    """
    tokens = supervised_tokens(logits, labels)
    return -mean_of_tokens(tokens.log_probs, tokens.mask)


def zlib_score(logits: Tensor, labels: Tensor, texts: Sequence[str]) -> Tensor:
    r"""Return the loss over the size of the compressed text, which discounts texts that are easy for anyone.

    .. math:: s = \frac{-\frac{1}{n} \sum_t \log p(y_t \mid x, y_{<t})}{|\mathrm{zlib}(y)|}

    Carlini et al. 2021, arXiv:2012.07805; high = non-member.

    Args:
        logits: As for :func:`loss_score`.
        labels: As for :func:`loss_score`.
        texts: The supervised text of each row; its UTF-8 bytes are compressed at zlib's default level.

    Returns:
        float32 ``[B]``, at least 0; NaN for rows without a supervised token.

    Raises:
        ValueError: If the shapes do not fit, or ``texts`` has another length.

    Example:
        >>> zlib_score(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([0]), ["yes"])  # 0.6931 / 11 bytes
        tensor([0.0630])
    """
    if len(texts) != len(labels):
        raise ValueError(f"`texts` holds {len(texts)} texts for {len(labels)} rows.")
    sizes = [len(zlib.compress(text.encode("utf-8"))) for text in texts]
    loss = loss_score(logits, labels)
    return loss / torch.tensor(sizes, device=loss.device)


def min_k_score(logits: Tensor, labels: Tensor, *, k: float = 0.4) -> Tensor:
    r"""Return the mean negative log-likelihood of the least likely tokens; high = non-member.

    .. math:: s = -\frac{1}{|M|} \sum_{t \in M} \log p(y_t \mid x, y_{<t})

    where M holds the :math:`\max(1, \lfloor nk \rfloor)` supervised tokens of the lowest log-probability. Shi et al.
    2024 (Min-K% Prob), arXiv:2310.16789, with its sign turned round: there high = member.

    Args:
        logits: As for :func:`loss_score`.
        labels: As for :func:`loss_score`.
        k: Share of the tokens, above 0 and up to 1; with 1 it is :func:`loss_score`.

    Returns:
        float32 ``[B]``, at least 0; NaN for rows without a supervised token.

    Raises:
        ValueError: If the shapes do not fit, or ``k`` is out of its range.

    Example:
        >>> logits = torch.tensor([[[0.5, 0.5], [0.9, 0.1], [0.5, 0.5]]]).log()
        >>> min_k_score(logits, torch.tensor([[-100, 0, 1]]), k=0.5)  # the token of probability 0.1
        tensor([2.3026])
    """
    tokens = supervised_tokens(logits, labels)
    return _lowest(tokens.log_probs, tokens, k)


def min_k_plus_plus_score(logits: Tensor, labels: Tensor, *, k: float = 0.4) -> Tensor:
    r"""Return Min-K%++: log-probabilities relative to those of the other tokens; high = non-member.

    .. math:: z_t = \frac{\log p(y_t \mid \cdot) - \mu_t}{\sigma_t}, \qquad s = -\frac{1}{|M|} \sum_{t \in M} z_t

    with :math:`\mu_t, \sigma_t` the mean and the standard deviation of :math:`\log p(v \mid \cdot)` for v drawn from
    p, and M the :math:`\max(1, \lfloor nk \rfloor)` supervised tokens of the lowest z. Zhang et al. 2025,
    arXiv:2404.02936, with its sign turned round. The variance is held at 1e-6 or more, as in published numbers.

    Args:
        logits: As for :func:`loss_score`.
        labels: As for :func:`loss_score`.
        k: Share of the tokens, above 0 and up to 1.

    Returns:
        float32 ``[B]``, of any sign; NaN for rows without a supervised token.

    Raises:
        ValueError: If the shapes do not fit, or ``k`` is out of its range.

    Example:
        >>> logits = torch.tensor([[0.7, 0.3]]).log()
        >>> min_k_plus_plus_score(logits, torch.tensor([1]))  # of two outcomes: sqrt(0.7 / 0.3)
        tensor([1.5275])
    """
    tokens = supervised_tokens(logits, labels)
    p = tokens.all_log_probs.exp()
    # a token of probability 0 has no part in the mean; 0 * -inf would be NaN
    finite = tokens.all_log_probs.clamp(min=torch.finfo(torch.float32).min)
    mean = (p * finite).sum(-1)
    variance = (p * (finite - mean.unsqueeze(-1)).square().clamp(max=torch.finfo(torch.float32).max)).sum(-1)
    return _lowest((tokens.log_probs - mean) / variance.clamp(min=1e-6).sqrt(), tokens, k)


def _lowest(values: Tensor, tokens: Supervised, k: float) -> Tensor:
    """Return minus the mean of the lowest share of each row's supervised values, [B]."""
    if not 0 < k <= 1:
        raise ValueError(f"`k` must be above 0 and at most 1, got {k!r}.")
    ordered = values.masked_fill(~tokens.mask, torch.inf).sort(dim=1).values
    count = tokens.mask.sum(dim=1)
    taken = torch.minimum((count * k).long().clamp(min=1), count)
    chosen = torch.arange(values.shape[1], device=values.device) < taken.unsqueeze(1)
    return -mean_of_tokens(ordered, chosen)


def membership_auc(
    forget_scores: Tensor,
    holdout_scores: Tensor,
    *,
    retrained_forget_scores: Tensor | None = None,
    retrained_holdout_scores: Tensor | None = None,
) -> Membership:
    r"""Return how well a score tells forget samples (members) from held-out ones, beside the retrained model's.

    .. math:: \mathrm{AUC} = P(s_\text{holdout} > s_\text{forget}) + \tfrac{1}{2} P(s_\text{holdout} = s_\text{forget})

    The two sets should differ in nothing but having been learned. Where they do not (a split by date, say), even a
    model that saw neither is far from 0.5: give the scores of the retrained model, and compare with its AUC, not with
    0.5.

    Args:
        forget_scores: Scores of the samples that were to be forgotten, ``[N]``, high = non-member.
        holdout_scores: Scores of samples of the same kind that were never learned, ``[M]``.
        retrained_forget_scores: The first by the model retrained without the forget samples.
        retrained_holdout_scores: The second by that model.

    Returns:
        The AUC from 0 to 1 of the unlearned and, if given, of the retrained model.

    Raises:
        ValueError: If scores are empty, NaN or not ``[N]``, or one of the retrained model's two is missing.

    Example:
        >>> forget, holdout = torch.tensor([0.1, 0.2, 0.9]), torch.tensor([0.5, 1.0, 0.9])
        >>> result = membership_auc(forget, holdout, retrained_forget_scores=holdout, retrained_holdout_scores=holdout)
        >>> round(result.auc, 3), result.retrained_auc, round(result.difference, 3)
        (0.833, 0.5, 0.333)
    """
    auc = _auc(forget_scores, holdout_scores, "forget_scores", "holdout_scores")
    if retrained_forget_scores is None and retrained_holdout_scores is None:
        return Membership(auc, None)
    if retrained_forget_scores is None or retrained_holdout_scores is None:
        raise ValueError("`retrained_forget_scores` and `retrained_holdout_scores` go together: give both or neither.")
    names = "retrained_forget_scores", "retrained_holdout_scores"
    return Membership(auc, _auc(retrained_forget_scores, retrained_holdout_scores, *names))


def _auc(members: Tensor, others: Tensor, members_name: str, others_name: str) -> float:
    for name, scores in ((members_name, members), (others_name, others)):
        check_scores(name, scores)
    both = torch.cat([members.detach().double().cpu(), others.detach().double().cpu()])
    is_holdout = torch.arange(len(both)) >= len(members)
    # torchmetrics puts scores outside of [0, 1] through a sigmoid, which ties large ones; ranks are inside
    distinct, ranks = both.unique(return_inverse=True)
    return float(binary_auroc(ranks.double() / len(distinct), is_holdout.long()))


def check_scores(name: str, scores: Tensor) -> None:
    """Refuse what is no non-empty vector of numbers."""
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"`{name}` must be Tensor[N] with at least one score, got shape {tuple(scores.shape)}.")
    if scores.isnan().any():
        raise ValueError(f"`{name}` holds {int(scores.isnan().sum())} NaN: leave samples without a score out.")
