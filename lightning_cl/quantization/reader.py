"""Checkpoints in Hugging Face's layout, read tensor by tensor without mapping files into memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_cl.core.imports import require

__all__ = ["DTYPES", "INDEX", "SINGLE", "CheckpointReader"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Old checkpoints hold what the model computes from its config; transformers leaves it out as well.
_COMPUTED = "*rotary_emb.inv_freq"


class _Entry(NamedTuple):
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


class CheckpointReader:
    """The tensors of a checkpoint: a folder with ``model.safetensors``, or with shards and their index.

    Only the headers are read at first. Tensors are read with plain file reads into fresh memory: pages of a memory map
    would count, and stay, in the resident memory of the process.

    Args:
        path: A folder, or the name of a model on the Hugging Face hub, taken from the local cache or downloaded.
        ignore: Patterns (as in :mod:`fnmatch`) of tensors that the model need not take, such as ``"lm_head.*"`` for a
            classifier on a language model's checkpoint.

    Raises:
        ValueError: If there are no safetensors under ``path``, or a file is damaged.

    Example:
        >>> import json, tempfile
        >>> header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
        >>> folder = Path(tempfile.mkdtemp())
        >>> file = len(header).to_bytes(8, "little") + header + torch.tensor([1.0, 2.0]).numpy().tobytes()
        >>> (folder / "model.safetensors").write_bytes(file)
        77
        >>> CheckpointReader(folder).read("w")
        tensor([1., 2.])
    """

    def __init__(self, path: str | Path, *, ignore: Sequence[str] = ()) -> None:
        self.path = str(path)
        self.ignore = (*ignore, _COMPUTED)
        self._entries: dict[str, _Entry] = {}
        files = _files_in(Path(path)) if Path(path).is_dir() else _files_on_hub(self.path)
        for file in files:
            self._entries |= _entries_of(file)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of the tensors, ignored ones left out, of a module ``prefix`` or of all."""
        inside = f"{prefix}." if prefix else ""
        return [
            name
            for name in self._entries
            if name.startswith(inside) and not any(fnmatch(name, pattern) for pattern in self.ignore)
        ]

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a tensor."""
        return torch.Size(self._entries[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor in the file."""
        return self._entries[name].dtype

    def nbytes(self, name: str) -> int:
        """Return the size of a tensor in the file, in bytes."""
        return _size(self._entries[name])

    def read(self, name: str) -> Tensor:
        """Return a tensor, on the CPU."""
        entry = self._entries[name]
        with open(entry.file, "rb", buffering=0) as file:
            return _read(file.fileno(), entry, entry.begin, entry.shape)

    def rows(self, name: str, portion: int) -> Iterator[Tensor]:
        """Yield a matrix in portions of so many rows."""
        entry = self._entries[name]
        count, *rest = entry.shape
        stride = _size(entry) // count if count else 0
        with open(entry.file, "rb", buffering=0) as file:
            for first in range(0, count, portion):
                shape = (min(portion, count - first), *rest)
                yield _read(file.fileno(), entry, entry.begin + first * stride, shape)

    def read_ahead(self, names: Sequence[str]) -> None:
        """Let the system read these tensors into its cache, while others are worked on."""
        for name in names:
            entry = self._entries[name]
            with open(entry.file, "rb", buffering=0) as file:
                if hasattr(os, "posix_fadvise"):  # Linux
                    os.posix_fadvise(file.fileno(), entry.begin, _size(entry), os.POSIX_FADV_WILLNEED)


def _size(entry: _Entry) -> int:
    return torch.Size(entry.shape).numel() * entry.dtype.itemsize


def _read(descriptor: int, entry: _Entry, begin: int, shape: tuple[int, ...]) -> Tensor:
    buffer = torch.empty(torch.Size(shape).numel() * entry.dtype.itemsize, dtype=torch.uint8)
    view, done = buffer.numpy().data, 0
    while done < len(view):  # the system returns at most 2 GiB at a time
        count = os.preadv(descriptor, [view[done:]], begin + done)
        if count == 0:
            raise ValueError(f"{entry.file} ends in the middle of a tensor: it was not written, or copied, completely.")
        done += count
    return buffer.view(entry.dtype).reshape(shape)


def _files_in(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text("utf-8"))["weight_map"].values()))
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ValueError(f"{folder / INDEX} names {missing[:3]}, which are missing: the checkpoint is incomplete.")
        return [folder / name for name in names]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    raise ValueError(
        f"{folder} has neither {SINGLE} nor {INDEX}. Checkpoints of other formats: load them in `transformers`, and"
        " save them by `save_pretrained`, which writes safetensors."
    )


def _files_on_hub(name: str) -> list[Path]:
    cached_file = require("transformers.utils", extra="llm").cached_file
    try:
        try:
            index = Path(cached_file(name, INDEX))
        except OSError:  # a checkpoint in one file has no index
            return [Path(cached_file(name, SINGLE))]
        files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        return [Path(cached_file(name, file)) for file in files]
    except OSError as error:
        raise ValueError(
            f"{name!r} is no folder, and its safetensors cannot be had from the hub: {error}\nOn a machine without a"
            " network give the path of a folder, or download the model into the hub's cache beforehand."
        ) from error


def _entries_of(file: Path) -> dict[str, _Entry]:
    # the format: the length of the header (8 bytes, little endian), the header (JSON), the data
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        size = file.stat().st_size
        if not 0 < length <= size - 8:
            raise ValueError(f"{file} is not a safetensors file.")
        header = json.loads(stream.read(length))
    entries = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{file} holds {name!r} as {entry['dtype']}, which cannot be read here.")
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        entries[name] = _Entry(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), begin)
        if end > size:
            raise ValueError(f"{file} is shorter than its header says: it was not written, or copied, completely.")
    return entries
