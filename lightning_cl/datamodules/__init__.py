"""Task streams: sources of data, scenarios that make tasks of them, and the datamodule that runs them in one fit."""

from lightning_cl.core.requests import ForgetRequest
from lightning_cl.datamodules.scenarios import (
    Blurry,
    ClassIncremental,
    DataIncremental,
    DomainIncremental,
    Joint,
    Mixture,
    Online,
    Permuted,
    Predefined,
    Recurring,
    Rehearsed,
    Rotated,
    Scenario,
    TaskIncremental,
)
from lightning_cl.datamodules.sources import (
    ArraySource,
    DigitsSource,
    HFSource,
    InstructionSource,
    PackedTextSource,
    TextFileSource,
)
from lightning_cl.datamodules.stream import TaskStreamDataModule
from lightning_cl.datamodules.unlearning import UnlearningDataModule

__all__ = [
    "ArraySource",
    "Blurry",
    "ClassIncremental",
    "DataIncremental",
    "DigitsSource",
    "DomainIncremental",
    "ForgetRequest",
    "HFSource",
    "InstructionSource",
    "Joint",
    "Mixture",
    "Online",
    "PackedTextSource",
    "Permuted",
    "Predefined",
    "Recurring",
    "Rehearsed",
    "Rotated",
    "Scenario",
    "TaskIncremental",
    "TaskStreamDataModule",
    "TextFileSource",
    "UnlearningDataModule",
]
