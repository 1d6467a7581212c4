"""What a method takes in memory, said by the method itself: ``lightning-cl plan`` adds it up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Footprint"]


@dataclass(frozen=True)
class Footprint:
    """Bytes that a callback takes on one rank, at its largest from the second task on.

    Args:
        device: What it keeps on the device of the weights, all the time.
        host: What it keeps in the memory of the machine.
        disk: What it keeps in files.
        task_end: What it takes on the device while a task ends, on top of ``device`` and of what a step takes.
        batch: The batch that a training step gets from it, if that is another than the loader's.
    """

    device: int = 0
    host: int = 0
    disk: int = 0
    task_end: int = 0
    batch: Any = None
