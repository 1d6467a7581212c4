"""The files of a checkpoint: written beside their place, and put there in one step.

A sharded checkpoint is a folder::

    last.ckpt/
        checkpoint.json      names the folder that counts, with the size of every file in it
        shards-4fa1c09b/     torch.distributed.checkpoint's files, rest.pt, rank-00000.pt, ...

It grows as ``.partial/last.ckpt-4fa1c09b/`` beside its place, where Lightning takes nothing for a checkpoint. A first
checkpoint is put in place by renaming its folder. One that replaces another has its ``shards-*`` moved in beside the
old ones; then ``checkpoint.json`` is replaced, in one step, and the old shards are deleted. So at any moment the path
holds one complete checkpoint, the old or the new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from io import IOBase
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystem

__all__ = ["Manifest", "SystemErrors", "abandon", "begin", "commit", "locate", "read_manifest", "save", "swap"]

_MANIFEST = "checkpoint.json"
_FORMAT = 1
_WORK = ".partial"
# what may lie in the folder of a checkpoint, of this library or of Lightning, whole or half deleted
_OURS = re.compile(r"checkpoint\.json|shards-[0-9a-f]{8}|meta\.pt|\.metadata|__\d+_\d+\.distcp")


@dataclass(frozen=True)
class Manifest:
    """What ``checkpoint.json`` says.

    Args:
        shards: The folder that counts.
        world_size: The number of ranks that wrote it.
        files: The bytes of every file in it.
        format: The version of this layout.
    """

    shards: str
    world_size: int
    files: dict[str, int]
    format: int = _FORMAT


def save(value: Any, file: Path) -> None:
    """Write ``value`` by :func:`torch.save`, through to the disk."""
    with system_errors(), file.open("wb") as stream:
        torch.save(value, stream)
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """Raise what the system said, such as "No space left on device", where torch says "unexpected pos 704 vs 598"."""
    try:
        yield
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise OSError(cause.errno, cause.strerror) from error


class SystemErrors(FileSystem):
    """The files of :mod:`torch.distributed.checkpoint`, with :func:`system_errors`."""

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[IOBase]:
        """Open a file."""
        with system_errors(), super().create_stream(path, mode) as stream:
            yield stream


def begin(path: Path) -> Path:
    """Clear what earlier crashes left of writes to ``path``, and return an empty folder for its shards.

    Raises:
        ValueError: If ``path`` is a folder that holds something else than a checkpoint.
    """
    if (back := locate(path)) != path:
        os.rename(back, path)
    if path.is_dir() and not path.is_symlink():
        foreign = sorted(entry.name for entry in path.iterdir() if not _OURS.fullmatch(entry.name))
        if foreign:
            raise ValueError(
                f"{str(path)!r} is a folder with files that are no checkpoint: {foreign[:3]}. It is left as it is;"
                " write the checkpoint to another path."
            )
    work = path.parent / _WORK
    leftover = re.compile(re.escape(path.name) + "-([0-9a-f]{8}|replaced)")
    for entry in work.iterdir() if work.is_dir() else ():
        if leftover.fullmatch(entry.name):
            _remove(entry)
    token = secrets.token_hex(4)
    shards = work / f"{path.name}-{token}" / f"shards-{token}"
    shards.mkdir(parents=True)
    return shards


def commit(path: Path, shards: Path, files: Mapping[str, int], world_size: int) -> None:
    """Put the finished ``shards`` in the place ``path``; what stood there counts until this has happened."""
    partial = shards.parent
    with (partial / _MANIFEST).open("w") as stream:
        json.dump(asdict(Manifest(shards.name, world_size, dict(files))), stream)
        stream.flush()
        os.fsync(stream.fileno())
    _sync_folder(shards)
    _sync_folder(partial)
    if path.is_dir() and not path.is_symlink():
        os.rename(shards, path / shards.name)
        _sync_folder(path)
        os.replace(partial / _MANIFEST, path / _MANIFEST)
        _sync_folder(path)
        for entry in list(path.iterdir()):
            if entry.name not in (_MANIFEST, shards.name):
                _remove(entry)
    else:
        swap(partial, path)
    abandon(shards)


def abandon(shards: Path) -> None:
    """Delete a write that is over or has failed."""
    _remove(shards.parent)
    with contextlib.suppress(OSError):  # another checkpoint grows there
        shards.parent.parent.rmdir()


def swap(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``, also where one is a file and the other a folder; :func:`locate` bridges the gap."""
    aside = _aside(path)
    if os.path.lexists(path) and (new.is_dir() or (path.is_dir() and not path.is_symlink())):
        aside.parent.mkdir(exist_ok=True)
        os.rename(path, aside)
    os.replace(new, path)
    _sync_folder(path.parent)
    _remove(aside)


def locate(path: Path) -> Path:
    """Return where the checkpoint ``path`` stands.

    It is elsewhere only if a file was to replace a folder, or the reverse, and the process died between two renames.
    """
    aside = _aside(path)
    return aside if not os.path.lexists(path) and os.path.lexists(aside) else path


def read_manifest(path: Path) -> tuple[Path, Manifest]:
    """Return the folder of shards that counts, and the manifest, of a complete checkpoint.

    Raises:
        FileNotFoundError: If there is nothing at ``path``.
        ValueError: If what is there is no complete sharded checkpoint.
    """
    place = locate(path)
    if not place.exists():
        raise FileNotFoundError(
            f"There is no checkpoint at {str(path)!r}: check the path and that every node mounts it."
        )
    if place.is_file():
        raise ValueError(f"{str(path)!r} is a checkpoint in a single file, not the folder of a sharded one.")
    if not (place / _MANIFEST).is_file():
        if (place / "meta.pt").is_file():
            raise ValueError(
                f"{str(path)!r} was written by a strategy of Lightning, not by `fsdp2`: resume it with that strategy,"
                " or convert it by `python -m lightning.pytorch.utilities.consolidate_checkpoint`."
            )
        raise ValueError(f"{str(path)!r} is no complete checkpoint: it has no {_MANIFEST}. Resume from an earlier one.")
    try:
        manifest = Manifest(**json.loads((place / _MANIFEST).read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{str(place / _MANIFEST)!r} cannot be read ({error}). Resume from an earlier one.") from error
    if manifest.format != _FORMAT:
        raise ValueError(
            f"{str(path)!r} has the format {manifest.format}, this version of lightning_cl reads {_FORMAT}: resume with"
            " the version that wrote it."
        )
    shards = place / manifest.shards
    for name, size in manifest.files.items():
        file = shards / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} of {size} bytes"
            raise ValueError(
                f"{str(path)!r} is not complete: {manifest.shards}/{name} {state}. Copy it again, or resume from an"
                " earlier checkpoint."
            )
    return shards, manifest


def _aside(path: Path) -> Path:
    return path.parent / _WORK / f"{path.name}-replaced"


def _remove(entry: Path) -> None:
    """Delete a file or a folder as far as the system allows: what stays is deleted by the next write."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            entry.unlink()


def _sync_folder(folder: Path) -> None:
    """Bring renames in ``folder`` to the disk, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
