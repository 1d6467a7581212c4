"""Resume under DDP: the same bits on as many ranks, and no sample lost on more or fewer."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import Dataset

from killed import KILLED, KillAt, assert_same, run_and_save
from lightning_cl import ContinualCallback, ContinualMetrics, ExperienceReplay, TaskStreamDataModule
from lightning_cl.datamodules import ClassIncremental
from ranks import exit_codes
from toys import ToyModule, toy_data, trainer

pytestmark = pytest.mark.distributed
ROWS = 44


def on_ranks(root: Path, world_size: int, function: Any = run_and_save, **settings: Any) -> list[dict[str, Any]]:
    """Run on some ranks to the end; return the results of all."""
    root.mkdir(exist_ok=True)
    ended = exit_codes(functools.partial(function, root, devices=world_size, **settings), world_size=world_size)
    assert ended == [0] * world_size
    return [torch.load(root / f"result-{rank}.pt", weights_only=True) for rank in range(world_size)]


# ---------------------------------------------------------------------- as many ranks


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two ranks end with when nobody kills them."""
    return on_ranks(tmp_path_factory.mktemp("straight"), 2, batch_size=4)


def test_ranks_share_weights_and_divide_the_memory(straight: list[dict[str, Any]]) -> None:
    """They end alike where they must, and hold different samples."""
    first, second = straight
    for name in ("weights", "optimizer", "fisher", "anchors", "matrix", "replay", "evaluated"):
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, equal_nan=True)
    assert len(first["stored"]) + len(second["stored"]) == 10
    assert not set(first["stored"]) & set(second["stored"])


@pytest.mark.parametrize(
    ("kill", "last"),
    [(("on_train_batch_start", 8), 8), (("on_task_end", 6), 5), (("on_task_end", 12), 11), (("on_task_start", 6), 6)],
    ids=["second task", "consolidation of the first task", "consolidation of the second task", "between tasks"],
)
def test_two_ranks_killed_and_resumed(kill: Any, last: int, straight: list[dict[str, Any]], tmp_path: Path) -> None:
    """Weights, optimizer, Fisher, anchors, memory, metrics and the generators of each rank."""
    killed = functools.partial(run_and_save, tmp_path, devices=2, batch_size=4, kill=kill)
    assert exit_codes(killed, world_size=2) == [KILLED, KILLED]
    path = tmp_path / "checkpoints" / f"step={last}.ckpt"
    for resumed, expected in zip(
        on_ranks(tmp_path / "resumed", 2, batch_size=4, ckpt_path=path), straight, strict=True
    ):
        assert_same(resumed, expected)


# ---------------------------------------------------------------------- more or fewer ranks


class Rows(Dataset):
    """A sample is its own row number, six times, and a label."""

    targets = tuple(row % 4 for row in range(ROWS))

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return torch.full((6,), float(row)), torch.tensor(row % 4)


class Visits(ContinualCallback):
    """Keeps the rows that this rank was given, epoch by epoch, and the memory at the start."""

    boundaries = "evaluation"
    needs_state = False

    def __init__(self, replay: ExperienceReplay) -> None:
        self.replay = replay
        self.rows: dict[str, list[int]] = {}
        self.at_start: dict[str, list[int]] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.at_start = memory(self.replay)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        ids, owners = trainer.datamodule.batch_sample_ids(batch_idx)
        assert batch[0][:, 0].long().tolist() == ids[owners == trainer.global_rank].tolist()
        self.rows.setdefault(str(trainer.current_epoch), []).extend(batch[0][:, 0].long().tolist())


def memory(replay: ExperienceReplay) -> dict[str, list[int]]:
    """The identities that all ranks hold, and what this rank has stored."""
    slots = torch.arange(len(replay.buffer)).numpy()
    stored = replay.buffer.storage.read(slots, None)["0"] if len(slots) else torch.zeros(0, 6)
    assert (stored == stored[:, :1]).all()
    return {"ids": replay.buffer.all_samples.sample_ids.tolist(), "stored": stored[:, 0].long().tolist()}


def visit(
    root: Path, *, devices: int, batch_size: int, ckpt_path: Path | None = None, kill: tuple[str, int] | None = None
) -> None:
    """Two tasks of 22 rows for two epochs, with a checkpoint at every step; each rank saves what it saw."""
    replay, metrics = ExperienceReplay(10), ContinualMetrics(directory=root / "record")
    visits = Visits(replay)
    callbacks = [replay, metrics, visits, *([] if kill is None else [KillAt(*kill)])]
    callbacks.append(ModelCheckpoint(root / "checkpoints", filename="{step}", every_n_train_steps=1, save_top_k=-1))
    stream = TaskStreamDataModule(
        Rows(), toy_data(16), scenario=ClassIncremental(n_tasks=2), batch_size=batch_size, epochs_per_task=2
    )
    fit = trainer(root, callbacks, strategy="ddp", devices=devices) if devices > 1 else trainer(root, callbacks)
    fit.fit(ToyModule(learning_rate=1e-3), datamodule=stream, ckpt_path=ckpt_path, weights_only=True)
    result = {"rows": visits.rows, "start": visits.at_start, "end": memory(replay), "matrix": metrics.matrix}
    torch.save(result, root / f"result-{os.environ.get('RANK', '0')}.pt")


@pytest.fixture(scope="module")
def saved_on_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The checkpoints of a run on two ranks, and its results."""
    root = tmp_path_factory.mktemp("two")
    return root / "checkpoints", on_ranks(root, 2, visit, batch_size=4)


def test_ranks_read_disjoint_parts_of_the_batches_of_one_process(saved_on_two: Any, tmp_path: Path) -> None:
    """Lightning puts no sampler of its own: the joined batches are those of one process with batches as large."""
    _, (first, second) = saved_on_two
    visit(tmp_path, devices=1, batch_size=8)
    alone = torch.load(tmp_path / "result-0.pt", weights_only=True)["rows"]
    for epoch in alone:
        assert not set(first["rows"][epoch]) & set(second["rows"][epoch])
        assert interleaved([first["rows"][epoch], second["rows"][epoch]], 4) == alone[epoch]


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 8), (3, 4)], ids=["one rank", "three ranks"])
@pytest.mark.parametrize("step", [4, 8], ids=["first task", "second task"])
def test_another_number_of_ranks_goes_on(
    step: int, world_size: int, batch_size: int, saved_on_two: Any, tmp_path: Path
) -> None:
    """The memory is dealt anew, and the interrupted epoch is finished: three steps of eight rows in each."""
    checkpoints, two = saved_on_two
    path = checkpoints / f"step={step}.ckpt"
    results = on_ranks(tmp_path, world_size, visit, batch_size=batch_size, ckpt_path=path)

    shares = torch.load(path, weights_only=True)["callbacks"]["ExperienceReplay"]["buffer"]
    kept = [row for share in shares for row in share["sample_ids"].tolist()]
    assert len(kept) == 10
    assert all(result["start"]["ids"] == sorted(kept) for result in results)
    # identities and payload belong together on every rank, and nothing is there twice
    assert sorted(row for result in results for row in result["start"]["stored"]) == sorted(kept)
    # in the end it is what any number of ranks ends with
    assert all(result["end"]["ids"] == two[0]["end"]["ids"] for result in results)
    assert sorted(row for result in results for row in result["end"]["stored"]) == sorted(two[0]["end"]["ids"])

    # the interrupted epoch shows every row once, up to the fill-up of its last step
    interrupted, done = step // 3, 8 * (step % 3)
    first = interleaved([result["rows"][str(interrupted)] for result in two], 4)[:done]
    rest = interleaved([result["rows"][str(interrupted)] for result in results], batch_size)
    assert sorted(first + rest[: 22 - done]) == rows_of_task(step // 6)
    assert len(rest) == 22 - done + -(22 - done) % world_size
    for epoch in range(interrupted + 1, 4):
        rows = interleaved([result["rows"][str(epoch)] for result in results], batch_size)
        assert sorted(rows[:22]) == rows_of_task(epoch // 2)
        assert len(rows) == 22 + -22 % world_size

    assert all(torch.equal(result["matrix"].nan_to_num(-1), results[0]["matrix"].nan_to_num(-1)) for result in results)
    assert results[0]["matrix"].shape == (2, 2)
    assert results[0]["matrix"].nan_to_num(0).max() <= 1
    if step == 8:
        assert results[0]["matrix"][0, 0] == two[0]["matrix"][0, 0]


def rows_of_task(task: int) -> list[int]:
    """The rows of the task's two classes."""
    return [row for row in range(ROWS) if row % 4 // 2 == task]


def interleaved(ranks: list[list[int]], batch_size: int) -> list[int]:
    """Rows of all ranks in the order of the global batches."""
    joined: list[int] = []
    for start in range(0, len(ranks[0]), batch_size):
        for rows in ranks:
            joined += rows[start : start + batch_size]
    return joined
