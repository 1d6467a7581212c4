r"""The negative log-likelihood of supervised tokens, and how it is reduced: what all forget losses are made of.

Two shapes are understood, and :func:`shifted` is the one place that tells them apart.

- Sequences: logits [B, T, V] with labels [B, T] in the convention of Hugging Face, unshifted and -100 where nothing is
  to be predicted. The label at t + 1 is predicted by the logits at t, so the first label never counts.
- Classes: logits [B, C] with labels [B]. A row is one token, predicted in place; -100 leaves it out.

A token is **supervised** where its label is not -100. Whatever the dtype of the logits, the sums are float32.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn.functional import cross_entropy

__all__ = [
    "IGNORED_LABEL",
    "Reduction",
    "connected_zero",
    "mean_over_rows",
    "shifted",
    "supervised_nll",
    "supervised_rows",
    "token_nll",
]

Reduction = Literal["token_mean", "sequence_sum", "sequence_mean"]
IGNORED_LABEL = -100


def shifted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores that predict something, [B, S, V], and what they predict, [B, S].

    Args:
        logits: Scores, [B, T, V], or of classes, [B, C].
        labels: Unshifted tokens, int64 [B, T], or classes, [B]; -100 where nothing is to be predicted.

    Returns:
        For sequences S is T - 1: the scores without their last position, the labels without their first one. For
        classes S is 1. Views, not copies.

    Raises:
        ValueError: If the shapes do not fit together.

    Example:
        >>> import torch
        >>> scores, targets = shifted(torch.zeros(1, 3, 5), torch.tensor([[-100, 4, 2]]))
        >>> scores.shape, targets
        (torch.Size([1, 2, 5]), tensor([[4, 2]]))
    """
    if labels.ndim not in (1, 2) or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"Logits of shape {list(logits.shape)} do not fit labels of shape {list(labels.shape)}: [B, T, V] goes with"
            " [B, T], [B, C] with [B]."
        )
    if labels.ndim == 1:
        return logits[:, None], labels[:, None]
    return logits[:, :-1], labels[:, 1:]


def supervised_rows(labels: Tensor) -> Tensor:
    """Return which rows have at least one supervised token, bool [B].

    Args:
        labels: Unshifted tokens, int64 [B, T], or classes, [B].

    Example:
        >>> import torch
        >>> supervised_rows(torch.tensor([[7, -100, 3], [7, -100, -100]]))
        tensor([ True, False])
    """
    supervised = labels != IGNORED_LABEL
    return supervised if labels.ndim == 1 else supervised[:, 1:].any(1)


def supervised_nll(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Return :math:`-\log p(y)` of every supervised token of the batch, row by row, float32 [n].

    Without any it is empty, with a graph: its sum is a zero that can be sent backward.

    Args:
        logits: Scores, [B, T, V] or [B, C].
        labels: As in :func:`shifted`.

    Example:
        >>> import torch
        >>> supervised_nll(torch.zeros(1, 3, 4), torch.tensor([[-100, -100, 2]]))
        tensor([1.3863])
    """
    logits, targets = shifted(logits, labels)
    supervised = targets != IGNORED_LABEL
    # selected first: less memory, no index of -100, and no gradient from what scores at other positions may hold
    return cross_entropy(logits[supervised].float(), targets[supervised], reduction="none")


def token_nll(logits: Tensor, labels: Tensor, *, reduction: Reduction) -> Tensor:
    r"""Return the negative log-likelihood :math:`\ell_{bt} = -\log p(y_{b,t+1} \mid y_{b,\le t})`, reduced.

    With :math:`S_b` the supervised tokens of row b and :math:`n_b` their number,

    .. math:: \frac{\sum_b \sum_{t \in S_b} \ell_{bt}}{\sum_b n_b} \; (\text{``token\_mean''}), \qquad
        \sum_{t \in S_b} \ell_{bt} \; (\text{``sequence\_sum''}), \qquad
        \frac{1}{n_b} \sum_{t \in S_b} \ell_{bt} \; (\text{``sequence\_mean''})

    The token mean weighs long rows more, and its denominator is that of the batch it is given; of the other two a row's
    value depends on nothing but that row.

    Args:
        logits: Scores, [B, T, V] or [B, C].
        labels: As in :func:`shifted`.
        reduction: ``"token_mean"``, ``"sequence_sum"`` or ``"sequence_mean"``.

    Returns:
        A scalar for ``"token_mean"``, [B] for the other two, float32. Rows without a supervised token are 0, and so is
        the mean of none, with a graph.

    Raises:
        ValueError: For an unknown reduction, and for shapes that do not fit.

    Example:
        >>> import torch
        >>> logits, labels = torch.zeros(2, 3, 4), torch.tensor([[-100, 0, 1], [-100, -100, 3]])
        >>> token_nll(logits, labels, reduction="sequence_sum")
        tensor([2.7726, 1.3863])
        >>> token_nll(logits, labels, reduction="sequence_mean")
        tensor([1.3863, 1.3863])
    """
    nll = supervised_nll(logits, labels)
    if reduction == "token_mean":
        return nll.sum() / max(nll.numel(), 1)
    if reduction not in ("sequence_sum", "sequence_mean"):
        raise ValueError(
            f"`reduction` must be one of 'token_mean', 'sequence_sum', 'sequence_mean', got {reduction!r}."
        )
    supervised = shifted(logits, labels)[1] != IGNORED_LABEL
    sums = nll.new_zeros(supervised.shape).masked_scatter(supervised, nll).sum(1)
    return sums if reduction == "sequence_sum" else sums / supervised.sum(1).clamp(min=1)


def mean_over_rows(values: Tensor, supervised: Tensor | None) -> Tensor:
    """Return the mean of a value per row, over the rows with something supervised; of none a zero with a graph.

    Args:
        values: [B].
        supervised: Which rows count, bool [B], as of :func:`supervised_rows`; all if ``None``.

    Example:
        >>> import torch
        >>> mean_over_rows(torch.tensor([2.0, 7.0, 4.0]), torch.tensor([True, False, True]))
        tensor(3.)
    """
    if supervised is not None:
        values = values[supervised]
    return values.sum() / max(values.numel(), 1)


def connected_zero(scores: Tensor) -> Tensor:
    """Return a float32 zero that depends on ``scores``, with a gradient of 0 whatever they hold.

    A rank without anything supervised must still go backward, or the others wait for its gradients.

    Example:
        >>> import torch
        >>> scores = torch.tensor([torch.inf, torch.nan], requires_grad=True)
        >>> connected_zero(scores).backward()
        >>> scores.grad
        tensor([0., 0.])
    """
    return scores.flatten()[:0].float().sum()


def check_above_zero(name: str, value: float) -> None:
    """Raise ``ValueError`` unless a setting of a loss is above 0."""
    if not value > 0:
        raise ValueError(f"`{name}` must be above 0, got {value!r}.")


def check_not_negative(name: str, value: float) -> None:
    """Raise ``ValueError`` if a setting of a loss is below 0."""
    if not value >= 0:
        raise ValueError(f"`{name}` must be at least 0, got {value!r}.")
