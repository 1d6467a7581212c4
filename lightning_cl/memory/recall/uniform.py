"""Uniform recall."""

from __future__ import annotations

from typing import ClassVar

import torch
from typing_extensions import override

from lightning_cl.memory.hashing import Int64Array
from lightning_cl.memory.recall.base import LocalSamples, Recall
from lightning_cl.memory.recall.chances import distinct

__all__ = ["Uniform"]


class Uniform(Recall):
    """Every sample that a rank keeps is as likely as any other; none comes twice in a draw."""

    name: ClassVar[str] = "uniform"

    @override
    def choose(self, samples: LocalSamples, size: int, generator: torch.Generator, *, task: int) -> Int64Array:
        return distinct(len(samples), min(size, len(samples)), generator)
