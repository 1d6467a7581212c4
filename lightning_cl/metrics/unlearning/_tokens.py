"""The supervised tokens of a batch and what the model says of them, by the one shift rule."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_cl.functional.unlearning import shifted
from lightning_cl.functional.unlearning.token_nll import IGNORED_LABEL

__all__ = ["Supervised", "mean_of_tokens", "supervised_tokens"]


class Supervised(NamedTuple):
    """Targets of a batch ``[B, S]``: which count, the float32 log-probability of each and all of its position."""

    mask: Tensor
    """bool [B, S]"""
    log_probs: Tensor
    """log p(target), [B, S], of no meaning where not supervised"""
    all_log_probs: Tensor
    """log p of every token, [B, S, V]"""
    targets: Tensor
    """int64 [B, S], 0 where not supervised"""


def supervised_tokens(logits: Tensor, labels: Tensor) -> Supervised:
    """Return the supervised tokens of logits ``[B, T, V]`` and labels ``[B, T]``, or ``[B, C]`` and ``[B]``."""
    logits, targets = shifted(logits.detach(), labels)
    mask = targets != IGNORED_LABEL
    targets = targets.masked_fill(~mask, 0)
    every = logits.float().log_softmax(dim=-1)
    own = every.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return Supervised(mask, own, every, targets)


def mean_of_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of each row's supervised values, [B]; NaN for a row without any."""
    return torch.where(mask, values, 0.0).sum(dim=1) / mask.sum(dim=1)
