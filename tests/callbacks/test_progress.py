"""The progress bar says which task of how many is being learned."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_cl.callbacks import TaskProgressBar
from lightning_cl.datamodules import ClassIncremental, Online
from toys import ToyModule, fit_stream, toy_loaders, toy_stream, trainer


def test_the_task_stands_in_front(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its number, the number of tasks, its name and the epoch within it."""
    fit_stream(tmp_path, [TaskProgressBar()], enable_progress_bar=True)
    printed = "".join(capfd.readouterr())
    for text in (
        "Task 1/2 (classes 0-1), epoch 1/2:",
        "Task 1/2 (classes 0-1), epoch 2/2:",
        "Task 2/2 (classes 2-3), epoch 1/2:",
        "Task 2/2 (classes 2-3), epoch 2/2:",
    ):
        assert text in printed
    assert printed.index("Task 1/2") < printed.index("Task 2/2")


def test_plain_fits_look_as_ever(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a stream it is Lightning's own bar."""
    loader = toy_loaders()[0]
    trainer(tmp_path, [TaskProgressBar()], enable_progress_bar=True, max_epochs=1).fit(ToyModule(), loader, loader)
    printed = "".join(capfd.readouterr())
    assert "Epoch 0:" in printed
    assert "Task" not in printed


def test_hidden_boundaries_are_shown_to_the_reader(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Methods must not see them, people may."""
    stream = toy_stream(scenario=Online(ClassIncremental(n_tasks=2)), epochs_per_task=1)
    fit_stream(tmp_path, [TaskProgressBar()], stream=stream, enable_progress_bar=True)
    assert "Task 2/2" in "".join(capfd.readouterr())
