"""Replay memory: a buffer of earlier samples, the policies that fill it, and the storages that hold it."""

from lightning_cl.memory.buffer import ReplayBuffer
from lightning_cl.memory.capacity import payload_bytes
from lightning_cl.memory.policies import (
    ClassBalanced,
    Herding,
    LossAware,
    NoRawData,
    Policy,
    Reservoir,
    Ring,
    TaskEndPolicy,
)
from lightning_cl.memory.recall import Collateral, PowerLaw, Recall, TaskUniform, Uniform, ViewBatch
from lightning_cl.memory.samples import Drawn, Samples
from lightning_cl.memory.storage import Columns, IndexStorage, MemoryStorage, MmapStorage, Storage

__all__ = [
    "ClassBalanced",
    "Collateral",
    "Columns",
    "Drawn",
    "Herding",
    "IndexStorage",
    "LossAware",
    "MemoryStorage",
    "MmapStorage",
    "NoRawData",
    "Policy",
    "PowerLaw",
    "Recall",
    "ReplayBuffer",
    "Reservoir",
    "Ring",
    "Samples",
    "Storage",
    "TaskEndPolicy",
    "TaskUniform",
    "Uniform",
    "ViewBatch",
    "payload_bytes",
]
