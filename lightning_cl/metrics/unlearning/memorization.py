"""How much of a text, or of a label, a model still gives back: one number for each sample."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from lightning_cl.core.checks import check_choice
from lightning_cl.metrics.unlearning._tokens import mean_of_tokens, supervised_tokens

__all__ = ["exact_memorization", "extraction_strength", "probability", "truth_ratio", "truth_ratio_score"]


def probability(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Return the length-normalised probability of each answer.

    .. math:: P(y \mid x)^{1/n} = \exp\!\left(-\frac{1}{n} \sum_{t=1}^{n} -\log p(y_t \mid x, y_{<t})\right)

    Maini et al. 2024 (TOFU), arXiv:2401.06121. ``n`` counts the supervised tokens *after* the shift; code
    that divides by the labels before it is off where the first token of a row has a label.

    Args:
        logits: ``[B, T, V]`` with labels ``[B, T]`` that are not shifted yet, or ``[B, C]`` with labels ``[B]``.
        labels: int64, -100 where not supervised.

    Returns:
        float32 ``[B]``, from 0 to 1, high = known; NaN for rows without a supervised token.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.8, 0.2], [0.4, 0.6]]).log()
        >>> probability(logits, torch.tensor([0, 1]))
        tensor([0.8000, 0.6000])
    """
    tokens = supervised_tokens(logits, labels)
    return mean_of_tokens(tokens.log_probs, tokens.mask).exp()


def truth_ratio(
    right_nll: Tensor, wrong_nll: Tensor, *, mean: Literal["geometric", "arithmetic"] = "geometric"
) -> Tensor:
    r"""Return how much likelier wrong answers are than a paraphrase of the right one.

    .. math::
        R_\text{geometric} = \frac{\exp\big(-\frac{1}{J} \sum_j \ell_j\big)}{\exp(-\tilde{\ell})}, \qquad
        R_\text{arithmetic} = \frac{\frac{1}{J} \sum_j \exp(-\ell_j)}{\exp(-\tilde{\ell})}

    Maini et al. 2024 (TOFU), arXiv:2401.06121, where :math:`\ell` is the mean negative log-likelihood over an
    answer's tokens. The paper prints the arithmetic mean; its code takes the geometric one for the forget quality,
    which most published numbers rest on. The two are different numbers: name the one you report. Nothing is added to
    the denominator, because the ratio is taken in logarithms.

    Args:
        right_nll: :math:`\tilde{\ell}` of the paraphrased right answer, ``[B]``: ``token_nll(...,
            reduction="sequence_mean")``.
        wrong_nll: :math:`\ell_j` of the J wrong answers, ``[B, J]``.
        mean: Over the wrong answers.

    Returns:
        float64 ``[B]``, above 0. A model that knows the answer is near 0, one that never saw it near 1.

    Raises:
        ValueError: If the shapes do not fit or ``mean`` is unknown.

    Example:
        >>> import torch
        >>> right, wrong = -torch.tensor([0.5]).log(), -torch.tensor([[0.4, 0.1]]).log()
        >>> truth_ratio(right, wrong), truth_ratio(right, wrong, mean="arithmetic")  # 0.2 / 0.5 and 0.25 / 0.5
        (tensor([0.4000], dtype=torch.float64), tensor([0.5000], dtype=torch.float64))
    """
    check_choice("mean", mean, ("geometric", "arithmetic"))
    if right_nll.ndim != 1 or wrong_nll.ndim != 2 or len(wrong_nll) != len(right_nll) or wrong_nll.shape[1] == 0:
        raise ValueError(
            "`right_nll` must be Tensor[B] and `wrong_nll` Tensor[B, J] with J of at least 1, got shapes"
            f" {tuple(right_nll.shape)} and {tuple(wrong_nll.shape)}."
        )
    right, wrong = right_nll.detach().double(), wrong_nll.detach().double()
    if mean == "geometric":
        return (right - wrong.mean(dim=1)).exp()
    return (right.unsqueeze(1) - wrong).exp().mean(dim=1)


def truth_ratio_score(ratio: Tensor, kind: Literal["forget", "retain"]) -> Tensor:
    r"""Turn truth ratios into the numbers from 0 to 1 that TOFU averages.

    .. math:: s_\text{forget} = \min(R, 1/R), \qquad s_\text{retain} = \max(0, 1 - R)

    Args:
        ratio: ``[B]``, of :func:`truth_ratio`.
        kind: ``"forget"``: high = right and wrong answers are alike to the model, which hides it; ``"retain"``: high =
            the model tells right from wrong.

    Returns:
        ``[B]``, from 0 to 1.

    Raises:
        ValueError: If ``kind`` is unknown or a ratio is below 0.

    Example:
        >>> import torch
        >>> ratio = torch.tensor([0.5, 4.0])
        >>> truth_ratio_score(ratio, "forget"), truth_ratio_score(ratio, "retain")
        (tensor([0.5000, 0.2500]), tensor([0.5000, 0.0000]))
    """
    check_choice("kind", kind, ("forget", "retain"))
    if (ratio < 0).any():
        raise ValueError("`ratio` must be at least 0; it is a quotient of probabilities, not its logarithm.")
    return ratio.minimum(1 / ratio) if kind == "forget" else (1 - ratio).clamp(min=0)


def exact_memorization(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Return the share of an answer's tokens that greedy decoding gets right after the true prefix.

    .. math:: \mathrm{EM} = \frac{1}{n} \sum_{t=1}^{n} \mathbb{1}\left[\arg\max_v p(v \mid x, y_{<t}) = y_t\right]

    Tirumala et al. 2022, arXiv:2205.10770. All supervised tokens count, the last one (mostly the end of
    the text) too.

    Args:
        logits: As for :func:`probability`.
        labels: As for :func:`probability`.

    Returns:
        float32 ``[B]``, from 0 to 1, high = known; NaN for rows without a supervised token. For a classifier it is 1
        or 0, whose mean is the accuracy.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> import torch
        >>> logits = torch.eye(4)[[1, 2, 0, 0]].unsqueeze(0)  # says 1, 2, 0 after the first three tokens
        >>> exact_memorization(logits, torch.tensor([[-100, 1, 2, 3]]))
        tensor([0.6667])
    """
    tokens = supervised_tokens(logits, labels)
    return mean_of_tokens((tokens.all_log_probs.argmax(-1) == tokens.targets).float(), tokens.mask)


def extraction_strength(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Return the share of an answer that the model completes by itself once the rest was given.

    .. math:: \mathrm{ES} = 1 - \frac{1}{n} \min\left\{ k \;\middle|\; \arg\max p(\cdot \mid x, y_{<t}) = y_t
        \text{ for all } t > k \right\}

    Wang et al. 2025, arXiv:2406.09179. From one forward pass over the true text, which greedy decoding from
    position k on agrees with as long as it is right. A wrong last token gives k = n and so a true 0, where code that
    stops its search at n - 1 gives 1/n.

    Args:
        logits: As for :func:`probability`.
        labels: As for :func:`probability`.

    Returns:
        float32 ``[B]``, from 0 (nothing) to 1 (all of it from the prompt alone), high = known; NaN for rows without a
        supervised token.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> import torch
        >>> logits = torch.eye(4)[[0, 2, 3, 0]].unsqueeze(0)  # says 0, 2, 3: only the first is wrong
        >>> extraction_strength(logits, torch.tensor([[-100, 1, 2, 3]]))
        tensor([0.6667])
    """
    tokens = supervised_tokens(logits, labels)
    hits = (tokens.all_log_probs.argmax(-1) == tokens.targets) | ~tokens.mask
    # supervised tokens that are followed by no miss, themselves included
    suffix = hits.flip(1).int().cumprod(dim=1).flip(1).bool()
    return mean_of_tokens(suffix.float(), tokens.mask)
