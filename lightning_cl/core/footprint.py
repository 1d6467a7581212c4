"""What a method takes in memory, said by the method itself: ``lightning-cl plan`` adds it up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Footprint"]


@dataclass(frozen=True)
class Footprint:
    """What a callback takes on one rank, at its largest from the second task on.

    Args:
        device: Bytes that it keeps on the device of the weights, all the time.
        host: Bytes that it keeps in the memory of the machine.
        disk: Bytes that it keeps in files.
        batch: Makes of a loader's batch the one that the training step gets, if that is another.
        task_end: Does on a batch what the callback does at a task's end, where that takes memory; what it allocates is
            counted. It returns what then takes the place of the state in ``device``.
    """

    device: int = 0
    host: int = 0
    disk: int = 0
    batch: Callable[[Any], Any] | None = None
    task_end: Callable[[], Any] | None = None
