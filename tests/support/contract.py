"""The rows of the contract test: one file in ``rows/`` for each method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

import rows
from lightning_cl import ContinualCallback
from toys import ToyModule


@dataclass(frozen=True)
class Row:
    """A method, and the plain loop that ends where it must end.

    Args:
        method: The callback's class.
        settings: Its arguments.
        plain_loop: Called with ``batch_size`` and ``world_size``; returns the final weights.
        tolerance: Largest difference of a weight; 0 for the same bits.
        optimizer: Called with the parameters and ``lr``; the toy module's own, SGD with momentum, if ``None``.
        toy: The module: as users write them, or one with LoRA adapters.
    """

    method: type[ContinualCallback]
    settings: dict[str, Any]
    plain_loop: Callable[..., Tensor]
    tolerance: float = 1e-6
    optimizer: Callable[..., Optimizer] | None = None
    toy: type[ToyModule] = ToyModule

    def make(self) -> ContinualCallback:
        return self.method(**self.settings)

    def module(self, **settings: Any) -> ToyModule:
        return self.toy(optimizer=self.optimizer, **settings)


def methods_elsewhere() -> dict[type[ContinualCallback], str]:
    """Return the methods that the toy classifier cannot show, each with the file under ``tests`` that asks as much."""
    found: dict[type[ContinualCallback], str] = {}
    for module in iter_modules(rows.__path__):
        found |= getattr(import_module(f"rows.{module.name}"), "ELSEWHERE", {})
    return found


def all_rows() -> dict[str, Row]:
    """Return the rows of the other methods, those of each file in its ``ROWS``."""
    found: dict[str, Row] = {}
    for module in iter_modules(rows.__path__):
        found |= import_module(f"rows.{module.name}").ROWS
    return found
