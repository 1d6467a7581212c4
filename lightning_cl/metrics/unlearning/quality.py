"""The unlearned model beside the retrained one, and what is left of it elsewhere: one number for a model."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_cl.core.checks import check_count, check_positive
from lightning_cl.core.imports import require
from lightning_cl.metrics.unlearning.membership import check_scores

__all__ = ["KolmogorovSmirnov", "class_margins", "forget_quality", "klom", "model_utility", "recovery_ratio"]


class KolmogorovSmirnov(NamedTuple):
    """Result of the two-sample Kolmogorov-Smirnov test."""

    log10_p: float
    """Base-10 logarithm of the p-value, at most 0; 0 = the two samples cannot be told apart."""
    statistic: float
    """D, the largest distance between the two distribution functions, from 0 to 1; it does not grow with N."""


def forget_quality(scores: Tensor, retrained_scores: Tensor) -> KolmogorovSmirnov:
    r"""Test whether per-sample scores of the unlearned model are distributed like the retrained model's.

    .. math:: D = \sup_x |F_\text{unlearned}(x) - F_\text{retrained}(x)|, \qquad
        \mathrm{FQ} = \log_{10} P(D' \ge D \mid \text{same distribution})

    Maini et al. 2024 (TOFU), arXiv:2401.06121, on the truth ratio of each forget sample. The two-sided p-value is exact
    (scipy). It says how sure one can be of a difference, not how large it is: with N = 400 the same model has a far
    smaller p than with N = 40, so report D beside it. The test looks at distributions only: scores in the wrong order,
    or of other samples, are not noticed. Any monotone map, such as :math:`1/R`, leaves it as it is.

    Args:
        scores: Of the unlearned model, ``[N]``.
        retrained_scores: Of the model retrained without the forget samples, ``[M]``, by the same definition.

    Returns:
        log10 p, high = like the retrained model, and D, low = like it. A p below the smallest float is given as that
        float: -307.7.

    Raises:
        ValueError: If scores are empty, NaN or not ``[N]``, or the sizes are too large for an exact p.
        ImportError: If scipy is not installed.

    Example:
        >>> result = forget_quality(torch.arange(4.0), torch.arange(4.0) + 10)  # p = 2 / C(8, 4)
        >>> round(10**result.log10_p * 70, 6), result.statistic
        (2.0, 1.0)
    """
    check_scores("scores", scores)
    check_scores("retrained_scores", retrained_scores)
    stats = require("scipy.stats", extra="metrics")
    samples = [values.detach().double().cpu().numpy() for values in (scores, retrained_scores)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            result = stats.ks_2samp(*samples, method="exact")
        except RuntimeWarning as fallback:
            raise ValueError(
                f"No exact p-value for {len(scores)} and {len(retrained_scores)} scores: {fallback} Give as many of one"
                " as of the other, or fewer."
            ) from None
    return KolmogorovSmirnov(math.log10(max(float(result.pvalue), sys.float_info.min)), float(result.statistic))


def model_utility(scores: Sequence[float]) -> float:
    r"""Return the harmonic mean of scores on what the model is to keep.

    .. math:: \mathrm{MU} = \frac{n}{\sum_{i=1}^{n} 1 / s_i}

    Maini et al. 2024 (TOFU), arXiv:2401.06121: of nine scores there, probability, ROUGE-L and truth ratio on the
    retain set, on real authors and on world facts. A single 0 makes it 0.

    Args:
        scores: From 0 to 1 by their definitions, all with high = good.

    Returns:
        From 0 to the largest score, high = good.

    Raises:
        ValueError: If there is no score, or one is NaN or below 0.

    Example:
        >>> model_utility([0.5, 1.0])
        0.6666666666666666
    """
    if len(scores) == 0:
        raise ValueError("`scores` holds no score, so there is no mean.")
    values = [float(score) for score in scores]
    for value in values:
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"`scores` must be finite and at least 0, got {values}.")
    return 0.0 if 0.0 in values else len(values) / sum(1 / value for value in values)


def recovery_ratio(*, clean: float, corrupted: float, unlearned: float) -> float:
    r"""Return which part of what a corruption destroyed came back by unlearning it.

    .. math:: R = \frac{a_\text{unlearned} - a_\text{corrupted}}{a_\text{clean} - a_\text{corrupted}}

    Made from the three accuracies that RESTOR reports (Rezaei et al. 2024, arXiv:2411.00204): of the model before it
    learned wrong facts, after, and after unlearning them. 0 = nothing restored, 1 = all; it may lie outside.

    Args:
        clean: Score of the model that never saw the corruption.
        corrupted: Score of the model that learned it.
        unlearned: Score of that model after unlearning.

    Raises:
        ValueError: If a score is not finite, or ``clean`` equals ``corrupted``: nothing was destroyed.

    Example:
        >>> recovery_ratio(clean=0.75, corrupted=0.25, unlearned=0.5)
        0.5
    """
    if not all(math.isfinite(score) for score in (clean, corrupted, unlearned)):
        raise ValueError(f"Scores must be finite, got clean={clean}, corrupted={corrupted}, unlearned={unlearned}.")
    if clean == corrupted:
        raise ValueError(f"`clean` and `corrupted` are both {clean}: nothing was destroyed that could come back.")
    return (unlearned - corrupted) / (clean - corrupted)


def class_margins(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Return the margin of each sample's own class.

    .. math:: m = z_y - \log \sum_{c \ne y} e^{z_c} = \log \frac{p_y}{1 - p_y}

    Args:
        logits: ``[B, C]`` with C of at least 2.
        labels: int64 ``[B]``, from 0 to C - 1.

    Returns:
        float32 ``[B]``, high = sure of the label.

    Raises:
        ValueError: If the shapes do not fit or a label is no class.

    Example:
        >>> class_margins(torch.tensor([[0.8, 0.2]]).log(), torch.tensor([0]))  # log(0.8 / 0.2)
        tensor([1.3863])
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.shape[1] < 2:
        raise ValueError(
            "`logits` must be Tensor[B, C] with C of at least 2 and `labels` Tensor[B], got shapes"
            f" {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    if ((labels < 0) | (labels >= logits.shape[1])).any():
        raise ValueError(f"`labels` must be from 0 to {logits.shape[1] - 1}.")
    scores = logits.detach().float()
    own = labels.unsqueeze(1)
    return scores.gather(1, own).squeeze(1) - scores.scatter(1, own, -torch.inf).logsumexp(dim=1)


def klom(
    retrained_margins: Tensor,
    unlearned_margins: Tensor,
    *,
    bins: int = 20,
    clip: float = 100.0,
    floor: float = 1e-5,
) -> Tensor:
    r"""Return KLoM: for each sample, how far the margins of unlearned models are from those of retrained ones.

    .. math:: \mathrm{KLoM}(x) = D_\mathrm{KL}\!\left(
        \hat{P}\big[m_x(\text{retrained})\big] \,\Big\|\, \hat{P}\big[m_x(\text{unlearned})\big] \right)

    Georgiev et al. 2024, arXiv:2410.23232. The distributions are histograms over the models, both on the same equal
    bins from the smallest to the largest margin of the sample; every margin is in a bin, the largest too. Bins that
    the unlearned models leave empty count with ``floor``. It needs many models of each kind (about 100 in the paper):
    with few of them histograms hardly overlap, and it measures their number. The order of the arguments is that of
    the divergence, and of the published numbers.

    Args:
        retrained_margins: :func:`class_margins` by models retrained with other seeds, ``[N, S]`` for S samples.
        unlearned_margins: The same by unlearned models, ``[M, S]``.
        bins: Bins of a histogram.
        clip: Margins are cut to ``[-clip, clip]`` first.
        floor: Smallest probability of a bin under the unlearned models.

    Returns:
        float64 ``[S]``, 0 = indistinguishable; at most ``-log(floor)``. It may be slightly below 0 by the floor.

    Raises:
        ValueError: If the shapes do not fit, a margin is NaN, or a setting is out of range.

    Example:
        >>> margins = torch.tensor([[0.0], [1.0]])
        >>> klom(margins, margins), klom(margins, torch.zeros(2, 1))  # 0.5 log(0.5 / 1) + 0.5 log(0.5 / 1e-5)
        (tensor([0.], dtype=torch.float64), tensor([5.0633], dtype=torch.float64))
    """
    check_count("bins", bins)
    check_positive("clip", clip)
    check_positive("floor", floor)
    shapes = retrained_margins.shape, unlearned_margins.shape
    if any(len(shape) != 2 or 0 in shape for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(
            "`retrained_margins` must be Tensor[N, S] and `unlearned_margins` Tensor[M, S], one row for each model, got"
            f" shapes {tuple(shapes[0])} and {tuple(shapes[1])}."
        )
    if retrained_margins.isnan().any() or unlearned_margins.isnan().any():
        raise ValueError("Margins hold NaN: a model that gives no number has no margin.")
    both = torch.cat([retrained_margins, unlearned_margins]).detach().double().clamp(-clip, clip)
    low, high = both.amin(0), both.amax(0)
    width = torch.where(high > low, high - low, 1.0)
    place = ((both - low) / width * bins).long().clamp(max=bins - 1)
    counts = torch.nn.functional.one_hot(place, bins).double()
    p, q = counts[: len(retrained_margins)].mean(0), counts[len(retrained_margins) :].mean(0).clamp(min=floor)
    return torch.where(p > 0, p * (p / q).log(), 0.0).sum(dim=1)
