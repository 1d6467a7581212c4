"""Statistics of batch normalisation that stand still while a request is served."""

from __future__ import annotations

from torch import nn

__all__ = ["FrozenStatistics"]


class FrozenStatistics:
    """Batch normalisations that compute in evaluation mode: batches to forget say nothing of the data that remain."""

    def __init__(self) -> None:
        self._frozen: list[nn.Module] = []

    def freeze(self, module: nn.Module) -> None:
        """Let those in training mode stand still."""
        norms = (part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm))
        self._frozen = [norm for norm in norms if norm.training]
        for norm in self._frozen:
            norm.eval()

    def thaw(self) -> None:
        """Let them go on."""
        for norm in self._frozen:
            norm.train()
        self._frozen = []
