"""Means over the tokens of a loader, whatever the sizes of its batches and of its ranks' shares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

__all__ = ["Perplexity", "TokenMean"]


class TokenMean(Metric):
    """The mean over tokens of what is given as means over the tokens of batches, NaN without a token.

    Sums are kept in float64, and those of all ranks are added before the division.

    Example:
        >>> mean = TokenMean()
        >>> mean.update(torch.tensor(1.0), tokens=torch.tensor(30))
        >>> mean.update(torch.tensor(5.0), tokens=torch.tensor(10))
        >>> mean.compute()
        tensor(2.)
    """

    full_state_update = False
    total: Tensor
    tokens: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(self, value: Tensor, tokens: Tensor) -> None:
        """Add the mean of a batch, scalar, over so many of its tokens; a batch without tokens may hold NaN."""
        self.total += torch.where(tokens > 0, value.detach().double() * tokens, 0.0)
        self.tokens += tokens

    @override
    def compute(self) -> Tensor:
        """Return the mean, scalar float32."""
        return (self.total / self.tokens).float()


class Perplexity(TokenMean):
    r"""The exponential of the mean negative log-likelihood of all tokens, not the mean of the batches' perplexities.

    .. math:: \mathrm{PPL} = \exp\!\left(-\frac{1}{N} \sum_{i=1}^{N} \log p(x_i \mid x_{<i})\right)

    Example:
        >>> perplexity = Perplexity()
        >>> perplexity.update(torch.tensor(2.0).log(), tokens=torch.tensor(10))
        >>> perplexity.update(torch.tensor(8.0).log(), tokens=torch.tensor(10))
        >>> perplexity.compute()
        tensor(4.)
    """

    @override
    def compute(self) -> Tensor:
        """Return the perplexity, scalar float32."""
        return (self.total / self.tokens).exp().float()
