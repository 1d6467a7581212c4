"""Modules whose weights come block by block, so that no rank ever holds the whole model, and parts that start apart."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import nn

__all__ = ["LazyWeights", "StartsItself"]


@runtime_checkable
class LazyWeights(Protocol):
    """A LightningModule that stands on the meta device until its strategy asks for one block after the other.

    Between two calls the strategy shards the block that was filled and frees the rest of it.
    """

    def fill_weights(self, name: str, block: nn.Module, device: torch.device) -> None:
        """Bring what ``block`` holds on the meta device to ``device``, with values.

        Args:
            name: Name of the block in the module, ``""`` for what no block holds.
            block: The submodule; what an earlier call filled is left alone.
            device: Where the values go.
        """


@runtime_checkable
class StartsItself(Protocol):
    """A part of an adapter that does not begin with what its library draws for it."""

    def start(self) -> None:
        """Give values to its parameters, which have memory but none yet; called after the library's own start."""
