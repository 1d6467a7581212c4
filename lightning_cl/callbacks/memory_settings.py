"""The settings of a memory, as the signatures of its methods take them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict

from lightning_cl.core.batches import BatchAdapter
from lightning_cl.memory import Policy, Recall

__all__ = ["KeepingSettings", "MemorySettings", "StorageSettings"]


class KeepingSettings(TypedDict, total=False):
    """Settings of :class:`StoredSamples` for how samples are kept, and not for what comes back."""

    storage: Literal["memory", "mmap", "index"]
    directory: str | Path | None
    in_memory: int | str
    logits: str | None
    transform: Callable[[Any], Any] | None
    batch_adapter: BatchAdapter | None
    seed: int


class StorageSettings(KeepingSettings, total=False):
    """Settings of :class:`StoredSamples` that its subclasses take as they are."""

    batch_size: int | None
    recall: str | Recall


class MemorySettings(StorageSettings, total=False):
    """The same for those that work with any policy."""

    policy: str | Policy
    features: str | None
