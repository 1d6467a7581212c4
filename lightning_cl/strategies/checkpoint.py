"""Checkpoints of sharded runs: one folder that all ranks write, or one file, never half of either.

What a run saves is in three parts: the tensors of model and optimizers, shards of callbacks (Fisher information,
anchors), and what each rank has of its own (:class:`~lightning_cl.core.shards.PerRank`: its share of a memory, its
random numbers). Nothing is gathered, and another number of ranks can read it.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors
from torch.distributed.device_mesh import DeviceMesh

from lightning_cl.strategies.checkpoint_files import SystemErrors, abandon, begin, commit, read_manifest, save, swap
from lightning_cl.strategies.checkpoint_ranks import cpu_group, on_all_ranks, together
from lightning_cl.strategies.checkpoint_tree import Parts, check_same, empty_shards, joined, taken_apart

__all__ = ["PendingWrite", "is_complete", "read_common", "read_rest", "read_tensors", "write_file", "write_folder"]

_REST = "rest.pt"
_SHARDS = "shards_of_rest"  # beside the names of `tensors` in the files of torch.distributed.checkpoint


class PendingWrite:
    """A checkpoint on its way to the disk. It counts once :meth:`wait` has returned.

    One is under way at a time: the next write or read waits for it, and raises its error if nobody has seen it.
    """

    _under_way: ClassVar[PendingWrite | None] = None

    def __init__(self, work: Callable[[], None], *, asynchronous: bool) -> None:
        self._work: Callable[[], None] | None = work
        self._error: Exception | None = None
        self._thread: Thread | None = None
        if asynchronous:
            PendingWrite._under_way = self
            # a daemon: a process that fails must not wait at its end for ranks that are gone
            self._thread = Thread(target=self._run, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._run()
            self.wait()

    def wait(self) -> None:
        """Wait until all ranks have written and the checkpoint stands at its path.

        Raises:
            RuntimeError: If it could not be written (``ValueError`` if it never can be); the previous one stands.
        """
        if self._thread is not None:
            self._thread.join()
        if PendingWrite._under_way is self:
            PendingWrite._under_way = None
        if self._error is not None:
            raise self._error

    @property
    def done(self) -> bool:
        """Whether :meth:`wait` would return, or raise, at once."""
        return self._thread is None or not self._thread.is_alive()

    @classmethod
    def settle(cls) -> None:
        """Wait for the write under way, if there is one."""
        if cls._under_way is not None:
            cls._under_way.wait()

    def _run(self) -> None:
        assert self._work is not None
        try:
            self._work()
        except Exception as error:
            self._error = error
        self._work = None  # frees the copies


def write_folder(
    path: str | os.PathLike[str], tensors: Mapping[str, Any], rest: Any, *, asynchronous: bool = False
) -> PendingWrite:
    """Write a sharded checkpoint; all ranks call it, with a folder that all of them see.

    Whatever happens during the write, ``path`` holds one complete checkpoint if it held one before: the old one until
    the new one is on the disk in full.

    Args:
        path: The folder. A checkpoint that stands there is replaced.
        tensors: Nested state dicts of model and optimizers, with the same keys on all ranks.
        rest: Nested dicts, lists and tuples. DTensors in them are written as shards, a
            :class:`~lightning_cl.core.shards.PerRank` by each rank; of all else rank 0's counts.
        asynchronous: Copy everything to the CPU, return, and write in another thread. Later changes are not seen.

    Returns:
        The write, over and done unless ``asynchronous``.

    Raises:
        RuntimeError: On all ranks if any could not write; from :meth:`PendingWrite.wait` if ``asynchronous``.
        ValueError: If ``path`` holds something else than a checkpoint, or ``rest`` holds shards that cannot be kept.
    """
    PendingWrite.settle()
    group = cpu_group("background" if asynchronous else "foreground")

    def contents() -> _Contents:
        return _Contents(tensors, taken_apart(rest))

    work = _FolderWrite(_local(path), _staged(contents) if asynchronous else contents, group, asynchronous)
    return PendingWrite(work.run, asynchronous=asynchronous)


def write_file(path: str | os.PathLike[str], checkpoint: Any) -> None:
    """Write a checkpoint in a single file, in one step; all ranks call it, and rank 0's ``checkpoint`` is written.

    Args:
        path: The file. A checkpoint that stands there, in a file or a folder, counts until the new one is on the disk.
        checkpoint: Whatever :func:`torch.save` takes.

    Raises:
        RuntimeError: On all ranks if it could not be written.
        ValueError: If ``path`` is a folder that holds something else than a checkpoint.
    """
    PendingWrite.settle()
    place = _local(path)

    def write() -> None:
        if dist.is_initialized() and dist.get_rank() != 0:
            return
        shards = begin(place)
        try:
            file = shards.parent / place.name
            save(checkpoint, file)
            swap(file, place)
        finally:
            abandon(shards)

    if dist.is_initialized():
        on_all_ranks(write, cpu_group("foreground"), partial(_not_written, place))
        return
    try:
        write()
    except OSError as error:
        raise RuntimeError(_not_written(place, f"{type(error).__name__}: {error}")) from error


def is_complete(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` is the folder of a sharded checkpoint with all of its files in full length."""
    try:
        read_manifest(_local(path))
    except (ValueError, OSError):
        return False
    return True


def read_rest(path: str | os.PathLike[str], mesh: DeviceMesh, *, weights_only: bool | None = None) -> Any:
    """Return what was given as ``rest`` to :func:`write_folder`; all ranks call it, and their number may be another.

    Args:
        path: The folder.
        mesh: Where DTensors are laid out: sharded over its last dimension, along the tensor's dimension that was
            sharded before, replicated over the others, on its devices.
        weights_only: As in :func:`torch.load`.

    Returns:
        The tree of rank 0, with a list of the values of all ranks that wrote, in rank order, for every ``PerRank``.
        Their tensors are mapped from the files: copy what is to outlive the checkpoint.

    Raises:
        FileNotFoundError: If there is no checkpoint at ``path``.
        ValueError: If it is not complete, or holds what ``weights_only`` forbids.
        RuntimeError: If a file cannot be read.
    """
    PendingWrite.settle()
    group = cpu_group("foreground")
    shards, world_size = _opened(path, group)
    loaded: list[tuple[Parts, list[list[Any]]]] = []

    def load_own() -> None:
        parts = Parts(**_load(shards / _REST, weights_only, mmap=False))
        ranks = range(world_size) if parts.values_at else ()
        loaded.append((parts, [_load(shards / _of_rank(rank), weights_only, mmap=True) for rank in ranks]))

    on_all_ranks(load_own, group)
    ((parts, values),) = loaded
    tensors = empty_shards(parts, mesh)
    if tensors:
        _read({_SHARDS: {str(index): tensor for index, tensor in enumerate(tensors)}}, shards, group, path)
    return joined(parts, tensors, values)


def read_common(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what any process can read of a checkpoint, without a strategy: of a folder what rank 0 alone wrote.

    It is unpickled: read only checkpoints that you trust.

    Raises:
        FileNotFoundError: If there is no checkpoint at ``path``.
        ValueError: If it is not complete.
    """
    place, of_lightning = Path(path), Path(path) / "meta.pt"
    if place.is_dir() and not of_lightning.is_file():
        return dict(_load(read_manifest(place)[0] / _REST, False, mmap=False)["common"])
    return dict(_load(of_lightning if place.is_dir() else place, False, mmap=True))


def read_tensors(path: str | os.PathLike[str], into: dict[str, Any]) -> None:
    """Fill state dicts in place from what :func:`write_folder` wrote as ``tensors``; all ranks call it.

    Args:
        path: The folder.
        into: Nested state dicts with the keys of ``tensors``, or with some of them. Tensors are filled as they are
            sharded now; other values are replaced, by unpickling them: read only checkpoints that you trust.

    Raises:
        FileNotFoundError: If there is no checkpoint at ``path``.
        ValueError: If it is not complete, or a tensor has another shape.
        RuntimeError: If it lacks an entry, or a file cannot be read.
    """
    PendingWrite.settle()
    group = cpu_group("foreground")
    shards, _ = _opened(path, group)
    _read(into, shards, group, path)


@dataclass
class _Contents:
    """What is written: the tensors, and the rest by who writes it."""

    tensors: Mapping[str, Any]
    parts: Parts


class _FolderWrite:
    """The steps of one write on one rank; every step is over on all ranks before the next begins."""

    def __init__(self, path: Path, contents: Callable[[], _Contents], group: ProcessGroup, staged: bool) -> None:
        self._path = path
        self._contents = contents
        self._group = group
        self._staged = staged
        self._shards: Path | None = None

    def run(self) -> None:
        """Write, and put in place; delete what was written if a rank fails."""
        rank = self._group.rank()
        explain = partial(_not_written, self._path)
        try:
            contents, shards = self._prepare(rank)
            on_all_ranks(partial(self._write_own, contents.parts, shards, rank), self._group, explain)
            together(partial(self._write_tensors, contents, shards), explain)
            files: dict[str, int] = {}
            for own in on_all_ranks(partial(_sizes, shards, rank), self._group, explain):
                files |= own
            last = partial(commit, self._path, shards, files, self._group.size()) if rank == 0 else _nothing
            on_all_ranks(last, self._group, explain)
        except Exception:
            if self._shards is not None:
                abandon(self._shards)
            raise

    def _prepare(self, rank: int) -> tuple[_Contents, Path]:
        """Return the contents, and the folder that rank 0 has made for them."""
        taken: list[_Contents] = []

        def prepare() -> tuple[list[str], Path | None]:
            taken.append(self._contents())
            if rank == 0:
                self._shards = begin(self._path)
            return taken[0].parts.names, self._shards

        answers = on_all_ranks(prepare, self._group, partial(_not_written, self._path))
        check_same([names for names, _ in answers])
        shards = answers[0][1]
        assert shards is not None
        return taken[0], shards

    def _write_own(self, parts: Parts, shards: Path, rank: int) -> None:
        if not shards.is_dir():
            raise FileNotFoundError("this rank does not see the folder: use a file system that every node mounts")
        if rank == 0:
            described = {"common": parts.common, "shards_at": parts.shards_at, "values_at": parts.values_at}
            save(described, shards / _REST)
        if parts.values:
            save(parts.values, shards / _of_rank(rank))

    def _write_tensors(self, contents: _Contents, shards: Path) -> None:
        state = {**contents.tensors, _SHARDS: {str(i): shard for i, shard in enumerate(contents.parts.shards)}}
        # copying ahead from a GPU is of no use for staged tensors, and would touch the first GPU from this thread
        writer = FileSystemWriter(shards, per_thread_copy_ahead=0 if self._staged else 10_000_000)
        writer.fs = SystemErrors()
        save_tensors(state, storage_writer=writer, process_group=self._group)


def _staged(contents: Callable[[], _Contents]) -> Callable[[], _Contents]:
    """Copy the contents to the CPU now; an error is raised later, where it reaches all ranks."""
    try:
        taken = contents()
        parts = taken.parts
        stager = DefaultStager(StagingOptions(False, False, False, False))
        copies: Any = stager.stage(
            {"tensors": taken.tensors, "common": parts.common, "shards": parts.shards, "values": parts.values}
        )
        stager.close()
        tensors = copies.pop("tensors")
        copied = _Contents(tensors, replace(parts, **copies))
    except Exception as caught:
        error = caught

        def fail() -> _Contents:
            raise error

        return fail
    return lambda: copied


def _sizes(shards: Path, rank: int) -> dict[str, int]:
    """Return the bytes of every file that this rank has written: another rank may see them later."""
    own = [*shards.glob(f"__{rank}_*.distcp"), shards / _of_rank(rank)]
    if rank == 0:
        own += [shards / _REST, shards / ".metadata"]
    return {file.name: file.stat().st_size for file in own if file.exists()}


def _opened(path: str | os.PathLike[str], group: ProcessGroup) -> tuple[Path, int]:
    """Return the folder of shards that rank 0 finds at ``path``, and the number of ranks that wrote it."""

    def look() -> tuple[Path, int] | None:
        if group.rank() != 0:
            return None
        shards, manifest = read_manifest(_local(path))
        return shards, manifest.world_size

    found = on_all_ranks(look, group)[0]
    assert found is not None
    return found


def _read(into: dict[str, Any], shards: Path, group: ProcessGroup, path: str | os.PathLike[str]) -> None:
    def explain(errors: str) -> str:
        return (
            f"The checkpoint {str(path)!r} could not be read: {errors}. Resume with the model, the trainable parameters"
            " and the optimizers of the run that wrote it."
        )

    reader = FileSystemReader(shards)
    together(lambda: load(into, storage_reader=reader, process_group=group), explain)


def _load(file: Path, weights_only: bool | None, *, mmap: bool) -> Any:
    try:
        return torch.load(file, map_location="cpu", mmap=mmap, weights_only=weights_only)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{str(file)!r} is not found: every node must mount the checkpoint's folder") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(file)!r} holds objects other than tensors and plain values. If you trust where it comes from, pass"
            f" `weights_only=False` to `trainer.fit` (or `test`, ...). Torch says: {error}"
        ) from error
    except (OSError, RuntimeError, EOFError) as error:
        raise RuntimeError(f"{str(file)!r} cannot be read ({error}). Resume from an earlier checkpoint.") from error


def _not_written(path: Path, errors: str) -> str:
    existing = next(folder for folder in path.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(existing).free / 2**20
    return (
        f"The checkpoint {str(path)!r} could not be written: {errors}. A checkpoint that stood there before is"
        f" untouched: resume from it. {free:.0f} MiB are free in the folder."
    )


def _local(path: str | os.PathLike[str]) -> Path:
    if "://" in str(path):
        raise ValueError(f"{str(path)!r} is no path of a mounted file system, which a sharded checkpoint needs")
    return Path(path)


def _of_rank(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def _nothing() -> None:
    """Do what other ranks than 0 do while it commits."""
