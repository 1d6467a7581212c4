"""Checkpoints in Hugging Face's layout, written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from lightning_cl.quantization.reader import DTYPES, INDEX, SINGLE

__all__ = ["CheckpointWriter", "Planned"]

_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Planned(NamedTuple):
    """A tensor that will be written: its name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class CheckpointWriter:
    """Writes safetensors files whose tensors come one after the other, so that they never are in memory together.

    Files get their names when all of them are complete: an interrupted write leaves nothing that could be loaded.

    Args:
        folder: Created if missing.
        planned: All tensors, in the order in which they will come.
        shard_bytes: A file that would grow beyond it is split, unless it holds a single tensor.
    """

    def __init__(self, folder: Path, planned: list[Planned], shard_bytes: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._shards = list(_split(planned, shard_bytes))
        total = len(self._shards)
        self._names = (
            [SINGLE] if total == 1 else [f"model-{n:05}-of-{total:05}.safetensors" for n in range(1, total + 1)]
        )
        self._waiting = [(shard, planned) for shard, tensors in enumerate(self._shards) for planned in tensors][::-1]
        self._file: BinaryIO | None = None
        self._shard = -1

    def __enter__(self) -> CheckpointWriter:
        return self

    def write(self, name: str, value: Tensor) -> None:
        """Write the next tensor.

        Raises:
            ValueError: If it is another than the one that was planned.
        """
        shard, planned = self._waiting.pop()
        if (name, value.dtype, tuple(value.shape)) != planned:
            raise ValueError(f"{name!r} ({value.dtype}, {tuple(value.shape)}) came where {planned} was planned.")
        if shard != self._shard:
            self._open(shard)
        assert self._file is not None
        self._file.write(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if kind is None and not self._waiting:
            self._publish()
            return
        for name in self._names:
            self._partial(name).unlink(missing_ok=True)
        if kind is None:
            raise ValueError(f"{len(self._waiting)} tensors that were planned did not come.")

    def _open(self, shard: int) -> None:
        if self._file is not None:
            self._file.close()
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        begin = 0
        for planned in self._shards[shard]:
            end = begin + planned.nbytes
            entry = {"dtype": _CODES[planned.dtype], "shape": list(planned.shape), "data_offsets": [begin, end]}
            header[planned.name] = entry
            begin = end
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._shard = shard
        self._file = open(self._partial(self._names[shard]), "wb")  # noqa: SIM115  # closed by the next, or at the end
        self._file.write(len(encoded).to_bytes(8, "little") + encoded)

    def _partial(self, name: str) -> Path:
        return self._folder / f"{name}.partial"

    def _publish(self) -> None:
        (self._folder / INDEX).unlink(missing_ok=True)
        (self._folder / SINGLE).unlink(missing_ok=True)
        for name in self._names:
            self._partial(name).replace(self._folder / name)
        if len(self._shards) > 1:
            files = {p.name: n for n, tensors in zip(self._names, self._shards, strict=True) for p in tensors}
            size = sum(planned.nbytes for tensors in self._shards for planned in tensors)
            index = {"metadata": {"total_size": size}, "weight_map": files}
            self._partial(INDEX).write_text(json.dumps(index, indent=1), "utf-8")
            self._partial(INDEX).replace(self._folder / INDEX)


def _split(planned: list[Planned], shard_bytes: int) -> Iterator[list[Planned]]:
    shard: list[Planned] = []
    size = 0
    for tensor in planned:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    yield shard
