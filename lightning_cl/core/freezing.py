"""Freezing of parameters for a fit."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import LightningModule

__all__ = ["FrozenForFit"]


class FrozenForFit:
    """What was frozen for a fit, and trains again after it."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def freeze(self, pl_module: LightningModule, names: Iterable[str]) -> None:
        """Freeze those of the named parameters that train; before the strategy wraps the module."""
        wanted = set(names)
        self._names = {name for name, p in pl_module.named_parameters() if name in wanted and p.requires_grad}
        self._set(pl_module, trainable=False)

    def thaw(self, pl_module: LightningModule) -> None:
        """Let what was frozen train again."""
        self._set(pl_module, trainable=True)
        self._names = set()

    def _set(self, pl_module: LightningModule, *, trainable: bool) -> None:
        for name, parameter in pl_module.named_parameters():
            if name in self._names:
                parameter.requires_grad_(trainable)
