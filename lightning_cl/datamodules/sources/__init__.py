"""Sources: map-style datasets that a command line can build, and the conversion of what users pass."""

from lightning_cl.datamodules.sources.arrays import ArraySource, DigitsSource
from lightning_cl.datamodules.sources.base import Source
from lightning_cl.datamodules.sources.convert import as_dataset
from lightning_cl.datamodules.sources.hub import HFSource
from lightning_cl.datamodules.sources.instructions import InstructionSource
from lightning_cl.datamodules.sources.packed import PackedTextSource
from lightning_cl.datamodules.sources.text import TextFileSource
from lightning_cl.datamodules.sources.tokens import ByteTokenizer, HashTokenizer

__all__ = [
    "ArraySource",
    "ByteTokenizer",
    "DigitsSource",
    "HFSource",
    "HashTokenizer",
    "InstructionSource",
    "PackedTextSource",
    "Source",
    "TextFileSource",
    "as_dataset",
]
