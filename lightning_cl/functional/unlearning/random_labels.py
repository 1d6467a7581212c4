r"""Labels drawn at random for what is to be forgotten (Graves et al. 2021, arXiv:2010.10981).

A sample's wrong label is a pure function of a seed and the sample's identity: the same in every epoch, on every rank
and after a resume, with nothing stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_cl.functional.unlearning.token_nll import IGNORED_LABEL

__all__ = ["random_labels"]

# SplitMix64 (Steele, Lea and Flood 2014) in signed integers, whose products wrap around
_GOLDEN, _FIRST, _SECOND = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def random_labels(labels: Tensor, sample_ids: Tensor, *, classes: Tensor, seed: int) -> Tensor:
    r"""Return for every label another one, uniform over the other ``classes``.

    Where whole classes are forgotten, leave them out of ``classes``: their samples then get one of the remaining.

    Args:
        labels: True labels, [B], or those of tokens, [B, T]; -100 stays -100.
        sample_ids: Identities of the samples, int64 [B].
        classes: Labels to draw from, int64 [C] without repetition.
        seed: Another seed gives other labels.

    Returns:
        Labels of the shape of ``labels``.

    Raises:
        ValueError: If the shapes do not fit, or no class but the true one is left to draw.

    Example:
        >>> labels, ids = torch.tensor([0, 1, 1, -100]), torch.tensor([7, 8, 9, 10])
        >>> random_labels(labels, ids, classes=torch.tensor([0, 1]), seed=0).tolist()
        [1, 0, 0, -100]
    """
    if sample_ids.shape != labels.shape[:1]:
        raise ValueError(f"`sample_ids` of shape {tuple(sample_ids.shape)} do not fit {len(labels)} samples.")
    classes = classes.to(labels.device).sort().values
    supervised = labels != IGNORED_LABEL
    # where the true label stands among the candidates, if it does
    place = torch.searchsorted(classes, labels.clamp(min=0)).clamp(max=max(len(classes) - 1, 0))
    among = classes[place] == labels if len(classes) else torch.zeros_like(supervised)
    choices = len(classes) - among.long()
    if bool((supervised & (choices < 1)).any()):
        raise ValueError("`classes` leaves no label to draw but the true one. At least one other is needed.")
    drawn = _keys(sample_ids.to(labels.device), labels[0].numel() if labels.ndim > 1 and len(labels) else 1, seed)
    drawn = drawn.view(labels.shape) % choices.clamp(min=1)
    drawn = drawn + (among & (drawn >= place))
    return torch.where(supervised, classes[drawn.clamp(max=max(len(classes) - 1, 0))], labels)


def _keys(sample_ids: Tensor, positions: int, seed: int) -> Tensor:
    """Return numbers from 0 to 2**63 - 1 for every position of every sample, int64 [B, positions]."""
    keys = _mixed(sample_ids + _mixed(torch.tensor(seed, device=sample_ids.device)))
    keys = _mixed(keys[:, None] + torch.arange(positions, device=sample_ids.device))
    return keys & ((1 << 63) - 1)


def _mixed(values: Tensor) -> Tensor:
    values = values + _GOLDEN
    values = (values ^ _shifted(values, 30)) * _FIRST
    values = (values ^ _shifted(values, 27)) * _SECOND
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    # without the copies of the sign bit that a signed integer's own shift brings in
    return (values >> bits) & ((1 << (64 - bits)) - 1)
