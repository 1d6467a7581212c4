"""Token ids of documents on disk: written once by whoever comes first, found by what they were made of."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from lightning_cl.datamodules.sources.documents import Documents
from lightning_cl.datamodules.sources.tokens import ByteTokenizer, PretrainedTokenizer

__all__ = ["GrowingArray", "batches", "cached_folder", "default_cache", "ids_dtype", "token_folder"]

_log = logging.getLogger("lightning.pytorch")  # whose messages are shown
_VERSION = 1  # of the format below
_BATCH_ITEMS = 1000
_BATCH_CHARACTERS = 2**20
_Item = TypeVar("_Item")


def default_cache() -> Path:
    """Return the user's folder for caches, as torch hub and others find it."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lightning_cl" / "tokens"


def token_folder(
    cache: Path, documents: Documents[str], tokenizer: ByteTokenizer | PretrainedTokenizer, max_tokens: int | None
) -> Path:
    """Return the folder with the tokens of documents, which is written if it is not there.

    It holds ``tokens.npy``, uint16 or uint32 ids ``[tokens]``, and ``offsets.npy``, int64 ``[documents + 1]``, where
    each document begins, and the number of tokens at the end.

    Args:
        cache: Folder of all such folders.
        documents: The texts; those without a character are left out.
        tokenizer: Makes the ids.
        max_tokens: Stop after so many tokens, within a document.

    Raises:
        ValueError: If there is no text.
    """
    about = {"documents": documents.identity, "tokenizer": tokenizer.identity, "max_tokens": max_tokens}

    def write(folder: Path) -> None:
        _write(folder, documents, tokenizer, max_tokens)

    return cached_folder(cache, documents.name, about, write)


def cached_folder(cache: Path, name: str, about: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """Return a folder of a cache, which is written if it is not there.

    The folder gets its name when it is complete, so an interrupted writer leaves nothing that could be taken for it. Of
    several processes one writes and the others wait; on a file system without locks each writes, and the first one
    wins.

    Args:
        cache: Folder of all such folders.
        name: What is tokenized, for messages.
        about: All that the content depends on, as plain values; stands in the folder as ``about.json``.
        write: Writes the content into a folder.
    """
    about = {"version": _VERSION, **about}
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    complete = cache / key
    if complete.is_dir():
        return complete
    cache.mkdir(parents=True, exist_ok=True)
    with _lock(cache / f"{key}.lock") as alone:
        if complete.is_dir():
            return complete
        if alone:
            for leftover in cache.glob(f"{key}.*.partial"):
                shutil.rmtree(leftover)
        partial = cache / f"{key}.{uuid.uuid4().hex}.partial"
        partial.mkdir()
        try:
            _log.info(f"Making tokens of {name} in {cache}")
            (partial / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
            write(partial)
            try:
                partial.rename(complete)
            except OSError:
                if not complete.is_dir():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return complete


def batches(items: Iterable[_Item], size: Callable[[_Item], int]) -> Iterator[list[_Item]]:
    """Yield lists of items that are tokenized at once: of bounded number, and of bounded ``size`` (characters)."""
    batch: list[_Item] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += size(item)
        if len(batch) == _BATCH_ITEMS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def ids_dtype(tokenizer: ByteTokenizer | PretrainedTokenizer) -> type[np.unsignedinteger[Any]]:
    """Return the smallest type that holds the ids on disk."""
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


def _write(
    folder: Path, documents: Documents[str], tokenizer: ByteTokenizer | PretrainedTokenizer, max_tokens: int | None
) -> None:
    """Write the arrays batch by batch; the memory in use is that of a batch, or of the longest document."""
    dtype = ids_dtype(tokenizer)
    with GrowingArray(folder / "tokens.npy", dtype) as tokens, GrowingArray(folder / "offsets.npy", np.int64) as ends:
        ends.append(np.zeros(1, np.int64))
        for texts in batches(filter(None, documents.read()), len):
            ids, lengths = tokenizer.encode_documents(texts)
            batch_ends = tokens.length + np.cumsum(lengths)
            if max_tokens is not None and batch_ends[-1] >= max_tokens:
                ids = ids[: max_tokens - tokens.length]
                batch_ends = np.append(batch_ends[: np.searchsorted(batch_ends, max_tokens)], max_tokens)
            tokens.append(ids)
            ends.append(batch_ends)
            if tokens.length == max_tokens:
                break
        if not tokens.length:
            raise ValueError(f"{documents.name} holds no text.")


class GrowingArray:
    """A one-dimensional ``.npy`` file that is appended to; its header is right, and its data on disk, at the end."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.length = 0
        self._file = path.open("wb")
        self._write_header()

    def __enter__(self) -> GrowingArray:
        return self

    def append(self, values: np.ndarray) -> None:
        """Write values behind the others."""
        self._file.write(values.astype(self.dtype).data)
        self.length += len(values)

    def __exit__(self, *_: Any) -> None:
        # as long as the first header: numpy leaves room for the largest number
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _write_header(self) -> None:
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self._file, header)


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Wait for the file's lock, which ends with its holder; false on a file system without locks."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
