"""A reservoir for data that must not be copied."""

from __future__ import annotations

from typing import ClassVar

from lightning_cl.memory.policies.reservoir import Reservoir

__all__ = ["NoRawData"]


class NoRawData(Reservoir):
    """Keep a uniform sample of identities, and refuse to store what they stand for.

    The choice is that of ``"reservoir"``. A storage that keeps inputs is refused when the buffer is made, and columns
    of inputs when they are inserted; what a method notes beside a sample, such as class scores, is in columns whose
    names begin with ``"@"`` and may stay. So inputs reach neither memory nor files nor checkpoints: with
    ``storage="index"`` they are read from the dataset again.
    """

    name: ClassVar[str] = "no_raw_data"
    stores_inputs: ClassVar[bool] = False
