"""Memory-mapped files that live as long as the arrays on them."""

from __future__ import annotations

import os
import sys
import weakref
from pathlib import Path

import numpy as np

from lightning_cl.memory.columns import Bytes

if sys.platform != "win32":
    import fcntl

__all__ = ["ScratchFolder"]


class ScratchFolder:
    """A folder ``directory/rank<rank>`` for one user at a time. What a killed run has left in it goes.

    Raises:
        ValueError: If the folder is in use, by this process or another; not on file systems that have no locks.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        self._path = directory / f"rank{rank}"
        self._path.mkdir(parents=True, exist_ok=True)
        self._count = 0
        self._lock = os.open(self._path / "lock", os.O_CREAT | os.O_RDWR)
        weakref.finalize(self, os.close, self._lock)
        if sys.platform != "win32":
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"`directory={str(directory)!r}` serves another buffer: give each its own.") from None
            except OSError:  # a file system without locks
                pass
        for old in self._path.glob("*.bin"):
            old.unlink()

    def allocate(self, count: int) -> Bytes:
        """Return ``count`` bytes of zeros in a file that goes with the last reference to them."""
        if not count:
            return np.zeros(0, dtype=np.uint8)  # an empty file cannot be mapped
        path = self._path / f"{self._count:06d}.bin"
        self._count += 1
        with open(path, "wb") as file:
            file.truncate(count)
            if sys.platform == "linux":
                os.posix_fallocate(file.fileno(), 0, count)  # a full disk is an error here; later it kills the process
        mapped = np.memmap(path, dtype=np.uint8, mode="r+", shape=(count,))
        weakref.finalize(mapped, path.unlink, missing_ok=True)
        return mapped
