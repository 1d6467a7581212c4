"""ROUGE-L, by torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_cl.core.checks import check_choice
from lightning_cl.core.imports import require

__all__ = ["rouge_l"]


def rouge_l(
    predictions: Sequence[str],
    targets: Sequence[str],
    *,
    value: Literal["recall", "precision", "fmeasure"] = "recall",
    stem: bool = True,
) -> Tensor:
    r"""Return ROUGE-L of each generated text against the true one.

    .. math:: \text{recall} = \frac{|\mathrm{LCS}|}{|\text{target}|}, \qquad
        \text{precision} = \frac{|\mathrm{LCS}|}{|\text{prediction}|}

    with LCS the longest common subsequence of words (Lin 2004), computed by
    :func:`torchmetrics.functional.text.rouge_score`. TOFU reports the recall and MUSE the F-measure, both of words
    stemmed by Porter's rules. How the texts were generated (greedy or not, at most how many tokens, which chat
    template) moves the number more than most methods do: keep it with the score.

    Args:
        predictions: Generated texts, N of them.
        targets: The true texts, N of them.
        value: Which of the three.
        stem: Compare the stems of the words; needs nltk.

    Returns:
        float32 ``[N]``, from 0 to 1, high = known.

    Raises:
        ValueError: If there is no text, the numbers of texts differ, or ``value`` is unknown.
        ImportError: If ``stem=True`` and nltk is not installed.

    Example:
        >>> rouge_l(["Ada was born in Rome"], ["She was born in Rome in 1950"], stem=False)  # was born in Rome
        tensor([0.5714])
    """
    check_choice("value", value, ("recall", "precision", "fmeasure"))
    if len(predictions) != len(targets) or len(targets) == 0:
        raise ValueError(
            f"`predictions` and `targets` must hold as many texts, at least one, got {len(predictions)} and"
            f" {len(targets)}."
        )
    if stem:
        require("nltk", extra="metrics")
    from torchmetrics.functional.text import rouge_score

    scores = [
        rouge_score(prediction, target, rouge_keys="rougeL", use_stemmer=stem)[f"rougeL_{value}"]
        for prediction, target in zip(predictions, targets, strict=True)
    ]
    return torch.stack(scores)
