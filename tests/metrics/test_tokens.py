"""Means over tokens, in batches of any size, on any number of ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_cl.metrics.tokens import Perplexity, TokenMean
from ranks import Ranks


def test_perplexity_is_that_of_torchmetrics() -> None:
    """However the tokens are batched, where the mean of the batches' perplexities is another number."""
    from torchmetrics.functional.text import perplexity

    logits, targets = torch.randn(1, 12, 7), torch.randint(0, 7, (1, 12))
    metric, means = Perplexity(), []
    for part in (slice(0, 1), slice(1, 4), slice(4, 12)):
        loss = cross_entropy(logits[0, part], targets[0, part])
        metric.update(loss, torch.tensor(len(targets[0, part])))
        means.append(loss.exp())
    assert metric.compute().item() == pytest.approx(perplexity(logits, targets).item(), rel=1e-6)
    assert metric.compute().item() != pytest.approx(torch.stack(means).mean().item(), rel=1e-3)


def test_a_batch_without_tokens_counts_for_nothing() -> None:
    """Its mean is NaN, and must not spread; of nothing at all the mean is NaN."""
    metric = TokenMean()
    assert metric.update(torch.tensor(float("nan")), torch.tensor(0)) is None
    assert metric.compute().isnan()
    metric.update(torch.tensor(3.0), torch.tensor(2))
    assert metric.compute() == 3


def test_many_tokens_are_added_exactly() -> None:
    """Sums of 2**26 tokens would lose the small ones in float32."""
    metric = TokenMean()
    metric.update(torch.tensor(1.0), torch.tensor(2**26))
    for _ in range(16):
        metric.update(torch.tensor(1.0), torch.tensor(1))
    assert metric.total == 2**26 + 16


def mean_of_rank(rank_values: list[list[tuple[float, int]]]) -> Tensor:
    """Return the synchronised perplexity of what this rank and the other one measured."""
    metric = Perplexity()
    for value, tokens in rank_values[torch.distributed.get_rank()]:
        metric.update(torch.tensor(value), torch.tensor(tokens))
    return metric.compute()


@pytest.mark.distributed
def test_ranks_with_unlike_shares() -> None:
    """The mean over all tokens, not over batches or ranks."""
    ranks = Ranks(2)
    shares = [[(1.0, 10), (2.0, 30)], [(5.0, 1)]]
    expected = torch.tensor((10 + 60 + 5) / 41).exp()
    torch.testing.assert_close(ranks.run(mean_of_rank, shares), [expected] * 2)
    ranks.close()
