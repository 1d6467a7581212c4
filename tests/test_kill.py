"""Runs with EWC, replay and metrics, killed and resumed by fresh objects: the same bits as straight runs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from killed import run, run_and_save
from ranks import exit_codes

KILLED = [-9]
KILLS = [
    pytest.param(("on_train_batch_start", 2), 2, id="first task"),
    pytest.param(("on_train_batch_start", 3), 3, id="between epochs"),
    pytest.param(("on_task_end", 6), 5, id="consolidation of the first task"),
    pytest.param(("on_validation_end", 6), 6, id="evaluation between tasks"),
    pytest.param(("on_task_start", 6), 6, id="start of the second task"),
    pytest.param(("on_train_batch_start", 8), 8, id="second task"),
    pytest.param(("on_task_end", 12), 11, id="consolidation of the second task"),
]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The run that nothing disturbs; with and without workers it is the same."""
    return run(tmp_path_factory.mktemp("straight"))


def assert_same_bits(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Weights, optimizer, Fisher information, anchors, memory, matrix and random generators."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("kill", "step"), KILLS)
def test_killed_run_resumes_to_the_same_bits(
    kill: tuple[str, int], step: int, num_workers: int, straight: dict[str, Any], tmp_path: Path
) -> None:
    """From the last checkpoint that the killed process left, random augmentation and dropout included."""
    killed = functools.partial(run_and_save, tmp_path, num_workers=num_workers, kill=kill)
    assert exit_codes(killed) == KILLED
    last = tmp_path / "checkpoints" / f"step={step}.ckpt"
    steps = [int(path.stem.partition("=")[2]) for path in last.parent.iterdir()]
    assert max(steps) == step
    assert_same_bits(run(tmp_path / "resumed", num_workers=num_workers, ckpt_path=last), straight)


def on_ranks(root: Path, world_size: int, **settings: Any) -> tuple[list[int | None], list[dict[str, Any]]]:
    """Run on several ranks; return how they ended and what each of them ended at."""
    codes = exit_codes(functools.partial(run_and_save, root, devices=world_size, **settings), world_size=world_size)
    paths = [root / f"result-{rank}.pt" for rank in range(world_size)]
    return codes, [torch.load(path) for path in paths if path.exists()]


@pytest.mark.distributed
def test_killed_ranks_resume_to_the_same_bits(tmp_path: Path) -> None:
    """Two ranks under DDP, killed in the second task and in the consolidation of the first."""
    codes, expected = on_ranks(tmp_path / "straight", 2, batch_size=4)
    assert codes == [0, 0]
    for kill, step in ((("on_train_batch_start", 8), 8), (("on_task_end", 6), 5)):
        root = tmp_path / f"killed-{step}"
        assert on_ranks(root, 2, batch_size=4, kill=kill)[0] == KILLED * 2
        last = root / "checkpoints" / f"step={step}.ckpt"
        codes, resumed = on_ranks(tmp_path / f"resumed-{step}", 2, batch_size=4, ckpt_path=last)
        assert codes == [0, 0]
        for actual, straight in zip(resumed, expected, strict=True):
            assert_same_bits(actual, straight)


@pytest.mark.distributed
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 8), (3, 4)])
def test_resume_on_another_number_of_ranks_loses_no_sample(world_size: int, batch_size: int, tmp_path: Path) -> None:
    """A checkpoint of two ranks, on one and on three: the memory holds what it would have held."""
    assert on_ranks(tmp_path, 2, batch_size=4, kill=("on_train_batch_start", 4))[0] == KILLED * 2
    last = tmp_path / "checkpoints" / "step=4.ckpt"
    saved = torch.load(last, weights_only=True)["callbacks"]["ExperienceReplay"]["buffer"]
    codes, results = on_ranks(tmp_path / "resumed", world_size, batch_size=batch_size, ckpt_path=last)
    assert codes == [0] * world_size
    assert all(torch.equal(result["weights"], results[0]["weights"]) for result in results)
    assert sum(len(result["stored"]) for result in results) == 10
    # the first task's part of the final memory is a part of what was saved
    first_task = {row for row in results[0]["replay"].tolist() if row % 4 < 2}
    assert first_task <= set(saved["sample_ids"].tolist())
    assert results[0]["matrix"].shape == (2, 2)
