"""Small networks for the examples and the benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["MLP", "TextClassifierNetwork"]


class MLP(nn.Sequential):
    """A multilayer perceptron with ReLU between its layers; inputs are flattened.

    Args:
        num_inputs: Features of a sample, after flattening.
        num_outputs: Outputs, such as classes.
        hidden: Widths of the hidden layers.

    Example:
        >>> MLP(64, 10, hidden=[32])(torch.zeros(2, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_inputs: int, num_outputs: int, hidden: Sequence[int] = (256, 256)) -> None:
        widths = [num_inputs, *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for width, following in pairwise(widths):
            layers += [nn.Linear(width, following), nn.ReLU()]
        super().__init__(*layers, nn.Linear(widths[-1], num_outputs))


class TextClassifierNetwork(nn.Module):
    """The mean of the token embeddings of a text, then a perceptron with one hidden layer.

    Args:
        vocabulary_size: Token ids below it are valid; 0 is padding.
        num_outputs: Classes.
        width: Width of the embeddings and of the hidden layer.
    """

    def __init__(self, vocabulary_size: int, num_outputs: int, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, width, padding_idx=0)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, num_outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [B, num_outputs] of token ids [B, T], padded by 0."""
        present = (tokens != 0).unsqueeze(-1)
        mean = (self.embedding(tokens) * present).sum(1) / present.sum(1).clamp(min=1)
        logits: Tensor = self.head(torch.relu(self.hidden(mean)))
        return logits
