"""Checkpoints of sharded runs: read by other numbers of ranks, and never half written, whatever happens."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lightning_cl.core.shards import PerRank, map_leaves
from lightning_cl.strategies.checkpoint import (
    PendingWrite,
    is_complete,
    read_common,
    read_rest,
    read_tensors,
    write_file,
    write_folder,
)
from lightning_cl.strategies.checkpoint_files import locate
from lightning_cl.strategies.checkpoint_ranks import cpu_group
from ranks import Ranks, exit_codes

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, Ranks]]:
    """Process groups of one, two and three ranks."""
    started = {size: Ranks(size) for size in (1, 2, 3)}
    yield started
    for ranks in started.values():
        ranks.close()


def plain(tree: Any) -> Any:
    """Return a tree with full tensors as their bytes, to be compared bit by bit, and what is a rank's as it is."""

    def leaf(value: Any) -> Any:
        if isinstance(value, PerRank):
            return plain(value.value)
        if isinstance(value, OrderedDict):  # as a module's state dict is
            return plain(dict(value))
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if isinstance(value, Tensor):
            return (tuple(value.shape), str(value.dtype), value.detach().flatten().view(torch.uint8).numpy().tobytes())
        return value

    return map_leaves(tree, leaf)


# -- a run: a sharded module and its optimizer, a callback with shards, and what each rank has of its own


def mesh_of(layout: str = "shards") -> DeviceMesh:
    """Return a mesh that shards over all ranks, or a hybrid one of one row of shards, or of copies only."""
    size = dist.get_world_size()
    if layout == "shards":
        return init_device_mesh("cpu", (size,))
    return init_device_mesh("cpu", (1, size) if layout == "one row" else (size, 1), mesh_dim_names=("copies", "shards"))


def built(seed: int, layout: str = "shards") -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a module of uneven sizes, some smaller than the number of ranks, two steps into its training."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1))
    mesh = mesh_of(layout)
    fully_shard(net[0], mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1 * (seed + 1))
    for _ in range(2):
        net(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


def tensors_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state dicts of module and optimizer, sharded."""
    return {
        "state_dict": get_model_state_dict(net),
        "optimizer_states": [get_optimizer_state_dict(net, optimizer)],
    }


def rest_of(net: nn.Module) -> dict[str, Any]:
    """Return what stands beside weights and optimizers in a checkpoint."""
    rank = dist.get_rank()
    first = next(net.parameters())
    copies = [Replicate()] * first.device_mesh.ndim
    return {
        "epoch": 3,
        "loops": {"done": [1, (2, None)], "empty": {}, "rank": rank},
        "callbacks": {
            "EWC": {
                "importance": {name: p.detach() ** 2 for name, p in net.named_parameters()},
                "trajectory": [(p.detach().clone(),) for p in net.parameters()],
                "by column": distribute_tensor(
                    torch.arange(10.0).view(2, 5), first.device_mesh, [*copies[1:], Shard(1)]
                ),
                "count": distribute_tensor(torch.tensor(5), first.device_mesh, copies),
                "half": {"p": first.detach().bfloat16()},
            },
            "Replay": {"share": PerRank({"samples": torch.arange(rank + 1), "rank": rank}), "seen": torch.ones(3)},
        },
        "rng": PerRank((torch.get_rng_state(), random.getstate())),
    }


def save_run(path: Path, seed: int = 0, layout: str = "shards", asynchronous: bool = False) -> Any:
    """Write a run, and return it in full."""
    net, optimizer = built(seed, layout)
    expected = plain([tensors_of(net, optimizer), rest_of(net)])
    write_folder(path, tensors_of(net, optimizer), rest_of(net), asynchronous=asynchronous).wait()
    return expected


def read_run(path: Path, layout: str = "shards") -> Any:
    """Read a run into one that was made from another seed, and return it in full."""
    net, optimizer = built(5, layout)
    tensors = tensors_of(net, optimizer)
    read_tensors(path, tensors)
    mesh = mesh_of(layout)
    rest = read_rest(path, mesh)
    parameter = next(net.parameters())
    assert rest["callbacks"]["EWC"]["importance"]["0.weight"].placements == parameter.placements
    assert rest["callbacks"]["EWC"]["importance"]["0.weight"].to_local().shape == parameter.to_local().shape
    assert rest["callbacks"]["EWC"]["by column"].placements[-1] == Shard(1)
    return plain([tensors, rest])


@pytest.mark.parametrize(
    ("before", "after", "written", "read"),
    [
        (2, 1, "shards", "shards"),
        (1, 2, "shards", "shards"),
        (2, 3, "shards", "shards"),
        (3, 2, "shards", "one row"),
        (2, 3, "copies", "shards"),
        (3, 2, "one row", "copies"),
    ],
)
def test_another_number_of_ranks_reads_the_same_bits(
    groups: dict[int, Ranks], tmp_path: Path, before: int, after: int, written: str, read: str
):
    """Weights, optimizer and callback state move between 1, 2 and 3 ranks and hybrid meshes, and no share is lost."""
    path = tmp_path / "last.ckpt"
    saved = groups[before].run(save_run, path, 0, written)
    tensors, expected = saved[0]
    expected["rng"] = [rest["rng"] for _, rest in saved]
    expected["callbacks"]["Replay"]["share"] = [rest["callbacks"]["Replay"]["share"] for _, rest in saved]
    assert [share["rank"] for share in expected["callbacks"]["Replay"]["share"]] == list(range(before))
    assert groups[after].run(read_run, path, read) == [[tensors, expected]] * after
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["last.ckpt"]


def common_file(path: Path) -> Path:
    """Return the file of rank 0."""
    return next(path.glob("shards-*/rest.pt"))


def test_files_are_small_plain_and_mapped(groups: dict[int, Ranks], tmp_path: Path):
    """Rank 0's file loads without pickled classes, a view is saved without its storage, shares are mapped, not read."""
    path = tmp_path / "last.ckpt"
    groups[2].run(save_views, path)
    assert torch.load(common_file(path), weights_only=True)["common"]["view"].tolist() == [0, 1]
    assert sum(file.stat().st_size for file in path.rglob("*")) < 200_000
    assert groups[1].run(maps_the_shares, path) == [True]


def test_what_a_process_without_ranks_reads(groups: dict[int, Ranks], tmp_path: Path):
    """Of our folder what rank 0 alone wrote, of Lightning's the file beside the shards, of a file all."""
    groups[2].run(save_run, tmp_path / "last.ckpt")
    found = read_common(tmp_path / "last.ckpt")
    assert (found["epoch"], found["loops"]["rank"], found["rng"]) == (3, 0, None)
    assert found["callbacks"]["Replay"]["share"] is None
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "folder" / "meta.pt", tmp_path / "single.ckpt"):
        torch.save({"callbacks": {"a": 1}}, place)
    for place in (tmp_path / "folder", tmp_path / "single.ckpt"):
        assert read_common(place) == {"callbacks": {"a": 1}}
    with pytest.raises(FileNotFoundError):
        read_common(tmp_path / "missing.ckpt")


def save_views(path: Path) -> None:
    """Write a checkpoint of small views of large tensors."""
    large = torch.arange(1_000_000)
    write_folder(path, {}, {"view": large[:2], "share": PerRank([large[:3]])})


def maps_the_shares(path: Path) -> bool:
    """Read a checkpoint, and return whether the share of rank 1 is mapped into memory."""
    rest = read_rest(path, mesh_of())
    assert [share[0].tolist() for share in rest["share"]] == [[0, 1, 2]] * 2
    return "rank-00001.pt" in Path("/proc/self/maps").read_text()


def save_a_path(path: Path, weights_only: bool | None) -> str:
    """Save an object that torch does not load by default; return how reading it ends."""
    write_folder(path, {}, {"root": path, "mine": PerRank(path)})
    return ended(lambda: read_rest(path, mesh_of(), weights_only=weights_only))


def ended(action: Callable[[], Any]) -> str:
    """Return the kind and the text of the error that an action ends with, or its result."""
    try:
        return str(action())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_objects_are_read_only_on_request(groups: dict[int, Ranks], tmp_path: Path):
    """What torch forbids by default is refused with the way out, and read with `weights_only=False`."""
    path = tmp_path / "last.ckpt"
    refused = groups[2].run(save_a_path, path, None)
    assert all(text.startswith("ValueError") and "weights_only=False` to `trainer.fit`" in text for text in refused)
    trusted = groups[2].run(save_a_path, path, False)
    assert trusted == [str({"root": path, "mine": [path, path]})] * 2


# -- asynchronous writes


class Slow:
    """A value that takes its time to be written."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __deepcopy__(self, memo: Any) -> Slow:
        return self

    def __reduce__(self) -> Any:
        time.sleep(self.seconds)
        return Slow, (self.seconds,)


def leaves(tree: Any) -> list[Tensor]:
    """Return the local tensors of a tree, also those that this rank alone has."""
    found: list[Tensor] = []

    def collect(leaf: Any) -> None:
        if isinstance(leaf, PerRank | OrderedDict):
            found.extend(leaves(leaf.value if isinstance(leaf, PerRank) else dict(leaf)))
        elif isinstance(leaf, Tensor):
            found.append(leaf.to_local() if isinstance(leaf, DTensor) else leaf)

    map_leaves(tree, collect)
    return found


def save_and_go_on(path: Path) -> Any:
    """Write asynchronously; meanwhile change every tensor in place, and communicate as training does."""
    write_folder(path, {}, {"epoch": "old"})
    net, optimizer = built(0)
    tensors, rest = tensors_of(net, optimizer), rest_of(net)
    expected = plain([tensors, rest])
    rest["slow"] = PerRank(Slow(0.5 * dist.get_rank()))
    write = write_folder(path, tensors, rest, asynchronous=True)
    for leaf in leaves([tensors, rest]):
        leaf.zero_()
    rest["callbacks"]["EWC"]["trajectory"].clear()
    dist.all_reduce(torch.ones(1))
    time.sleep(0.2)
    dist.barrier()
    while_written = (write.done, torch.load(common_file(path))["common"]["epoch"])
    write.wait()
    assert write.done
    assert is_complete(path)
    return expected, while_written


def test_later_changes_do_not_reach_an_asynchronous_write(groups: dict[int, Ranks], tmp_path: Path):
    """The checkpoint holds what stood at the call; it counts when the slowest rank is done, and not before."""
    path = tmp_path / "last.ckpt"
    saved = groups[2].run(save_and_go_on, path)
    assert [while_written for _, while_written in saved] == [(False, "old")] * 2
    (tensors, rest), _ = saved[0]
    for got_tensors, got in groups[3].run(read_slow, path):
        assert got_tensors == tensors
        assert got["callbacks"]["EWC"] == rest["callbacks"]["EWC"]
        assert got["callbacks"]["Replay"]["share"] == [each["callbacks"]["Replay"]["share"] for (_, each), _ in saved]
        assert got["callbacks"]["Replay"]["seen"] == rest["callbacks"]["Replay"]["seen"]


def read_at_once(path: Path) -> Any:
    """Start a write that takes its time on rank 1, and read at once."""
    write_folder(path, {}, {"epoch": "old"})
    write_folder(path, {}, {"epoch": "new", "slow": PerRank(Slow(0.3 * dist.get_rank()))}, asynchronous=True)
    return read_rest(path, mesh_of(), weights_only=False)["epoch"]


def test_a_read_waits_for_the_write_under_way(groups: dict[int, Ranks], tmp_path: Path):
    """A checkpoint that was asked for is read, and not the one from before."""
    assert groups[2].run(read_at_once, tmp_path / "last.ckpt") == ["new", "new"]


def timeouts() -> list[timedelta]:
    """Return the timeouts of the groups of two default groups, one after the other."""
    found = []
    for seconds in (77, 55):
        timeout = timedelta(seconds=seconds)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        groups = [cpu_group("foreground"), cpu_group("background"), dist.group.WORLD]
        assert len(set(groups)) == 3
        assert cpu_group("background") is groups[1]
        found += [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
        dist.destroy_process_group()
    return found


def test_groups_have_the_timeout_of_the_run():
    """A lost rank ends a write as soon as it ends a step, also in the second process group of a process."""
    assert timeouts() == [timedelta(seconds=77)] * 3 + [timedelta(seconds=55)] * 3


def read_slow(path: Path) -> Any:
    """Read a run with a value of a class of this file."""
    with torch.serialization.safe_globals([Slow]):
        tensors, rest = read_run(path)
    return tensors, {key: value for key, value in rest.items() if key != "slow"}


def fail_asynchronously(path: Path) -> list[str]:
    """Start writes that fail on rank 1, at the call and in the thread; return how they end, and how the next begins."""
    write_folder(path, {}, {"epoch": "old"})
    ends = []
    for share in (Stubborn(), Unwritable()):
        mine = PerRank(share if dist.get_rank() == 1 else 1)
        ends.append(ended(write_folder(path, {}, {"mine": mine}, asynchronous=True).wait))
        write_folder(path, {}, {"mine": mine}, asynchronous=True)
        ends.append(ended(lambda: write_folder(path, {}, {"epoch": "next"})))
        ends.append(ended(PendingWrite.settle))
    return [*ends, torch.load(common_file(path))["common"]["epoch"]]


class Stubborn:
    """A value that cannot be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("not to be copied")


class Unwritable:
    """A value that can be copied, but not pickled."""

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("not to be pickled")


def test_an_asynchronous_error_reaches_every_rank_once(groups: dict[int, Ranks], tmp_path: Path):
    """`wait` raises it, or else the next write does; the checkpoint from before stands."""
    path = tmp_path / "last.ckpt"
    for ends in groups[2].run(fail_asynchronously, path):
        copied, next_copied, after, pickled, next_pickled, after_too, epoch = ends
        assert "RuntimeError" in copied
        assert "TypeError: not to be copied (rank 1)" in copied
        assert "TypeError: not to be pickled (rank 1)" in pickled
        assert (next_copied, next_pickled, after, after_too) == (copied, pickled, "None", "None")
        assert epoch == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


# -- writes that are killed


def killed_at(number: int, action: Callable[[], Any]) -> None:
    """Run an action, and die just before its given change of names in the file system."""
    remaining = number

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            nonlocal remaining
            remaining -= 1
            if remaining < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **settings)

        return call

    for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync"):
        setattr(os, name, counted(getattr(os, name)))  # the process ends with this action
    action()


def write_as(kind: str, path: Path, epoch: str) -> None:
    """Write a small checkpoint as a folder or a file."""
    if kind == "folder":
        write_folder(path, {"weights": {"w": torch.full((8,), float(len(epoch)))}}, {"epoch": epoch})
    elif kind == "file":
        write_file(path, {"epoch": epoch})


def start_alone() -> None:
    """Start a process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def die_while_replacing(path: Path, old: str, new: str, number: int) -> None:
    """Write two checkpoints, and die in the second one."""
    start_alone()
    write_as(old, path, "old")
    killed_at(number, lambda: write_as(new, path, "newer"))


def die_again(path: Path, kind: str) -> None:
    """Write over what a killed write left, and die before the content is on the disk."""
    start_alone()
    killed_at(4, lambda: write_as(kind, path, "third"))


def standing(path: Path) -> str:
    """Return which checkpoint stands at a path."""
    place = locate(path)
    if place.is_file():
        return str(torch.load(place)["epoch"])
    if not is_complete(path):
        return "none"
    into = {"weights": {"w": torch.zeros(8)}}
    read_tensors(path, into)
    epoch = str(read_rest(path, mesh_of())["epoch"])
    assert into["weights"]["w"].tolist() == [float(len(epoch))] * 8
    return epoch


def write_once_more(path: Path, kind: str) -> str:
    """Write a third checkpoint over what a killed write left."""
    write_as(kind, path, "next")
    return standing(path)


def changes_of_a_write(path: Path) -> list[tuple[str, str]]:
    """Return, in their order, the names that a second write brings to the disk or renames."""
    write_as("folder", path, "old")
    events: list[tuple[str, str]] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def logged(change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            events.append((change.__name__, Path(arguments[-1]).name))
            return change(*arguments)

        return call

    def logged_fsync(file: Any) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    os.fsync, os.rename, os.replace = logged_fsync, logged(rename), logged(replace)
    try:
        write_folder(path, {"w": torch.ones(3)}, {"share": PerRank(1)})
    finally:
        os.fsync, os.rename, os.replace = fsync, rename, replace
    return events


def test_all_is_on_the_disk_before_it_counts(groups: dict[int, Ranks], tmp_path: Path):
    """Files, then folders reach the disk before the rename that makes them count, and that rename after it."""
    events = groups[1].run(changes_of_a_write, tmp_path / "last.ckpt")[0]
    shards = next((tmp_path / "last.ckpt").glob("shards-*"))
    counts = events.index(("replace", "checkpoint.json"))
    before = events[:counts]
    files = [".metadata.tmp", "__0_0.distcp", "rest.pt", "rank-00000.pt", "checkpoint.json"]
    assert sorted(file for kind, file in before if kind == "fsync" and file in files) == sorted(files)
    assert [event for event in events if "ckpt" in event[1] or "shards" in event[1]] == [
        ("fsync", shards.name),
        ("fsync", f"last.ckpt-{shards.name[-8:]}"),
        ("rename", shards.name),
        ("fsync", "last.ckpt"),
        ("fsync", "last.ckpt"),
    ]
    assert events.index(("fsync", shards.name)) > max(before.index(("fsync", file)) for file in files)
    assert events[counts + 1] == ("fsync", "last.ckpt")


@pytest.mark.parametrize("old", ["nothing", "folder", "file"])
@pytest.mark.parametrize("new", ["folder", "file"])
def test_a_write_killed_anywhere_leaves_a_whole_checkpoint(
    groups: dict[int, Ranks], tmp_path: Path, old: str, new: str
):
    """Killed before each of its steps in turn, a write leaves the old checkpoint until it leaves the new one."""
    found = []
    for number in range(100):
        path = tmp_path / str(number) / "hpc_ckpt_1.ckpt"
        (code,) = exit_codes(die_while_replacing, path, old, new, number)
        found.append(groups[1].run(standing, path)[0])
        if locate(path) != path:  # killed between two renames
            assert exit_codes(die_again, path, new) == [-signal.SIGKILL]
            assert groups[1].run(standing, path) == ["old"]
        if number % 5 == 0 or found[-1] != found[-2]:
            assert groups[1].run(write_once_more, path, new) == ["next"]
            assert [entry.name for entry in path.parent.iterdir()] == [path.name]
            assert path.is_file() or len(list(path.iterdir())) == 2
        if code == 0:
            break
        assert code == -signal.SIGKILL
    before = "none" if old == "nothing" else "old"
    assert len(found) > 5
    assert found == [before] * found.count(before) + ["newer"] * found.count("newer")
    assert found.count(before) > 1
    assert found.count("newer") > 1


def die_on_one_rank(path: Path) -> None:
    """Write twice, and kill rank 1 in the second write, between its two files."""
    dist.init_process_group("gloo")
    save_run(path)
    if dist.get_rank() == 0:
        save_run(path, seed=1)
    killed_at(1, lambda: save_run(path, seed=1))


def test_a_killed_rank_ends_the_others_with_an_error(groups: dict[int, Ranks], tmp_path: Path):
    """One rank is killed between its files: the other fails at once, and the checkpoint from before is read."""
    path = tmp_path / "last.ckpt"
    assert exit_codes(die_on_one_rank, path, world_size=2) == [1, -signal.SIGKILL]
    assert is_complete(path)
    straight = groups[2].run(save_run, tmp_path / "straight.ckpt")[0]
    assert groups[1].run(read_run, path)[0][0] == straight[0]


def test_lightning_takes_no_leftover_for_a_checkpoint(tmp_path: Path):
    """After a killed first write, neither `ckpt_path="last"` nor the SLURM resume finds anything."""
    for name in ("last.ckpt", "hpc_ckpt_1.ckpt"):
        assert exit_codes(die_while_replacing, tmp_path / name, "nothing", "folder", 5) == [-signal.SIGKILL]
    assert (tmp_path / ".partial").is_dir()
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    assert ModelCheckpoint(tmp_path, save_last=True)._find_last_checkpoints(trainer) == set()
    assert _CheckpointConnector.hpc_save_path(tmp_path).endswith("/hpc_ckpt_1.ckpt")


# -- writes that fail


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let the system refuse to write more than ``size`` bytes to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_limited(path: Path, what: str) -> tuple[str, str]:
    """Write with a limit on the size of files on rank 1; return how it ends and what stands then."""
    write_as("folder", path, "old")
    large = torch.ones(100_000)
    mesh = mesh_of()
    tensors = {"w": distribute_tensor(large, mesh, [Shard(0)])} if what == "tensors" else {}
    rest = {"epoch": "newer", "mine": PerRank(large if what == "share" else 0)}
    if what == "shards":
        rest["fisher"] = distribute_tensor(large, mesh, [Shard(0)])
    with file_size_limit(50_000 if dist.get_rank() == 1 else resource.RLIM_INFINITY):
        end = ended(lambda: write_folder(path, tensors, rest))
    return end, standing(path)


@pytest.mark.parametrize("what", ["tensors", "shards", "share"])
def test_an_error_of_one_rank_is_an_error_of_all(groups: dict[int, Ranks], tmp_path: Path, what: str):
    """The system refuses a write of rank 1: both ranks name path, rank and reason, and the old checkpoint is intact."""
    path = tmp_path / "last.ckpt"
    for end, stands in groups[2].run(write_limited, path, what):
        assert re.match(
            r"RuntimeError: The checkpoint '.*last\.ckpt' could not be written: OSError:.*File too large", end
        )
        assert "(rank 1)" in end
        assert "(rank 0)" not in end
        assert stands == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("NOT TESTED: a full disk; mounting a small one needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill_disk(path: Path, kind: str) -> tuple[str, str]:
    """Write a checkpoint that is too large; return how it ends and what stands then."""
    write_as(kind, path, "old")
    large = {"large": torch.ones(1_000_000)}
    end = ended(lambda: write_folder(path, large, {}) if kind == "folder" else write_file(path, large))
    write_as(kind, path.with_name("other.ckpt"), "other")  # what had filled the disk is gone
    return end, standing(path)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_full_disk_leaves_the_old_checkpoint(groups: dict[int, Ranks], tiny_disk: Path, kind: str):
    """With no space left, all ranks say so, with the space that is free; the old checkpoint is read afterwards."""
    for end, stands in groups[2].run(fill_disk, tiny_disk / "last.ckpt", kind):
        assert "No space left on device" in end
        assert "MiB are free" in end
        assert stands == "old"


def write_files(path: Path) -> list[str]:
    """Write single files, the second without success; return how they end and what the file holds."""
    ends = [ended(lambda: write_file(path, {"rank": dist.get_rank()}))]
    ends.append(str(torch.load(path)))
    ends.append(ended(lambda: write_file(path, Unwritable() if dist.get_rank() == 0 else 1)))
    return [*ends, str(torch.load(path))]


def test_a_single_file_is_rank_zeros(groups: dict[int, Ranks], tmp_path: Path):
    """Rank 0's content is written; an error of it reaches both ranks, and the old file stands."""
    for first, content, second, kept in groups[2].run(write_files, tmp_path / "last.ckpt"):
        assert (first, content, kept) == ("None", "{'rank': 0}", "{'rank': 0}")
        assert second.startswith("RuntimeError: The checkpoint")
        assert "TypeError: not to be pickled (rank 0)" in second
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_single_file_needs_no_process_group(tmp_path: Path):
    """One process writes as it is; a folder cannot be written without ranks, and both say what is wrong."""
    write_file(tmp_path / "new" / "last.ckpt", {"epoch": 1})
    assert torch.load(tmp_path / "new" / "last.ckpt") == {"epoch": 1}
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match="could not be written: NotADirectoryError"):
        write_file(tmp_path / "file" / "last.ckpt", {})
    with pytest.raises(RuntimeError, match="needs a process group"):
        write_folder(tmp_path / "last.ckpt", {}, {})


# -- what is refused


def refusals(folder: Path) -> dict[str, str]:
    """Return how writes and reads end that cannot be served."""
    rank, mesh = dist.get_rank(), mesh_of()
    shards = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])
    sums = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    good = folder / "good.ckpt"
    write_folder(good, {"net": {"w": shards}}, {"fisher": shards, "mine": PerRank(rank)})

    def write(rest: Any, path: Path | str = folder / "bad.ckpt") -> str:
        return ended(lambda: write_folder(path, {}, rest))

    return {
        "partial": write({"callbacks": {"EWC": [sums]}}),
        "ordered": write({"EWC": OrderedDict(fisher={"w": shards})}),
        "unequal": write({"EWC": [shards] if rank else [shards, PerRank(1)]}),
        "foreign": write({}, folder / "foreign"),
        "remote": write({}, "s3://bucket/last.ckpt"),
        "other key": ended(lambda: read_tensors(good, {"net": {"v": shards}})),
        "other shape": ended(lambda: read_tensors(good, {"net": {"w": torch.zeros(5)}})),
        "nothing": ended(lambda: read_rest(folder / "none.ckpt", mesh)),
        "file": ended(lambda: read_rest(folder / "file.ckpt", mesh)),
        "lightning": ended(lambda: read_tensors(folder / "lightning", {})),
        "empty": ended(lambda: read_tensors(folder / "empty", {})),
    }


def test_refuses_with_the_way_out(groups: dict[int, Ranks], tmp_path: Path):
    """Everything that cannot be written or read is refused on both ranks, in words, and nothing foreign is touched."""
    for name, file in {"foreign": "thesis.tex", "lightning": "meta.pt", "empty": ".metadata"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / file).touch()
    (tmp_path / "file.ckpt").touch()
    expected = {
        "partial": r"ValueError: .*checkpoint\['callbacks'\]\['EWC'\]\[0\] has values .* to be summed",
        "ordered": r"ValueError: .*checkpoint\['EWC'\] is a OrderedDict with shards .* Keep them in a dict",
        "unequal": r"ValueError: ranks 0 and 1 differ .*PerRank \['EWC'\]\[1\]",
        "foreign": r"ValueError: .* is a folder with files that are no checkpoint: \['thesis.tex'\]",
        "remote": r"ValueError: 's3://bucket/last.ckpt' is no path of a mounted file system",
        "other key": r"RuntimeError: .*good.ckpt' could not be read: .*Missing key .*net\.v.* Resume with the model",
        "other shape": r"ValueError: .*good.ckpt' could not be read: .*[Ss]ize mismatch .* Resume with the model",
        "nothing": r"FileNotFoundError: There is no checkpoint at '.*none.ckpt'",
        "file": r"ValueError: .*file.ckpt' is a checkpoint in a single file",
        "lightning": r"ValueError: .* was written by a strategy of Lightning, .* resume it with that strategy",
        "empty": r"ValueError: .* is no complete checkpoint: it has no checkpoint.json. Resume from an earlier one",
    }
    for got in groups[2].run(refusals, tmp_path):
        assert got.keys() == expected.keys()
        for name, text in got.items():
            assert re.match(expected[name], text, re.DOTALL), (name, text)
    assert (tmp_path / "foreign" / "thesis.tex").is_file()
    assert not (tmp_path / "bad.ckpt").exists()
    assert not (tmp_path / ".partial").exists()


def damaged(path: Path) -> str:
    """Return how reading ends."""
    return ended(lambda: read_rest(path, mesh_of()))


def test_knows_a_damaged_checkpoint(groups: dict[int, Ranks], tmp_path: Path):
    """A file that is gone, cut or unreadable, a broken manifest, a later format: never complete, and said in words."""
    path = tmp_path / "last.ckpt"
    groups[2].run(save_run, path)
    share, manifest = next(path.glob("shards-*/rank-00001.pt")), path / "checkpoint.json"
    content, described = share.read_bytes(), manifest.read_text()

    def found(file: Path, content: bytes | None) -> tuple[bool, str]:
        before = file.read_bytes()
        file.unlink()
        if content is not None:
            file.write_bytes(content)
        answer = is_complete(path), groups[1].run(damaged, path)[0]
        file.write_bytes(before)
        assert is_complete(path)
        return answer

    later = json.dumps({**json.loads(described), "format": 9}).encode()
    for wrong, text in [
        (found(share, None), r"ValueError: .* is not complete: shards-\w{8}/rank-00001.pt is missing"),
        (found(share, content[:-1]), r"ValueError: .* is not complete: .* has \d+ of \d+ bytes"),
        (found(manifest, described[:-9].encode()), r"ValueError: .*checkpoint.json' cannot be read"),
        (found(manifest, later), r"ValueError: .* has the format 9, this version of lightning_cl reads 1"),
    ]:
        assert not wrong[0]
        assert re.match(text, wrong[1]), wrong[1]
    scrambled = bytes(len(content))
    assert found(share, scrambled)[0]  # the length is right
    assert "cannot be read" in found(share, scrambled)[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_writes_from_a_gpu_with_nccl(tmp_path: Path):
    """Shards on a GPU are written at once and in the background through a CPU group, and come back to the GPU."""
    device = torch.device("cuda", 0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    mesh = init_device_mesh("cuda", (1,))
    values = torch.arange(10.0, device=device)
    for asynchronous in (False, True):
        shards = distribute_tensor(values, mesh, [Shard(0)])
        path = tmp_path / f"{asynchronous}.ckpt"
        write = write_folder(path, {"w": shards}, {"fisher": shards, "plain": values}, asynchronous=asynchronous)
        shards.to_local().zero_()
        write.wait()
        into = {"w": torch.zeros(10, device=device)}
        read_tensors(path, into)
        rest = read_rest(path, mesh)
        assert rest["fisher"].device.type == "cuda"
        assert rest["plain"].device.type == "cpu"
        for found in (into["w"], rest["fisher"].full_tensor(), rest["plain"]):
            assert found.tolist() == list(range(10))
        values = torch.arange(10.0, device=device)
