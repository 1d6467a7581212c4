"""Static ConPET: how many old samples a step rehearses, and of which tasks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from lightning_cl import AdapterSlots, StaticConPET, TaskStreamDataModule
from lightning_cl.datamodules import ClassIncremental, Online
from lightning_cl.memory import Drawn
from toys import LoraToy, ToyModule, fit_stream, toy_data, toy_stream


class Logged(StaticConPET):
    """Keeps how many samples came in a step, and the tasks of those that were drawn."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.steps: list[tuple[int, list[int]]] = []

    def samples(self, trainer: Any, pl_module: Any, batch: Any) -> Drawn | None:
        drawn = super().samples(trainer, pl_module, batch)
        self.steps.append((self.adapter.size(batch), [] if drawn is None else drawn.tasks.tolist()))
        return drawn


@pytest.mark.parametrize(("ratio", "old"), [(1.0, 6), (2.0, 3), (4.0, 2), (100.0, 1), (0.5, 12)])
def test_old_samples_of_a_step(ratio: float, old: int, tmp_path: Path) -> None:
    """None in the first task, then a fixed number, however many tasks came before; never of the running one."""
    method = Logged(36, new_old_ratio=ratio)
    fit_stream(tmp_path, [method], stream=toy_stream(batch_size=6, scenario=ClassIncremental(n_tasks=4)))
    assert [size for size, _ in method.steps] == [6] * 16
    for step, (_, tasks) in enumerate(method.steps):
        assert len(tasks) == (old if step >= 4 else 0)
        assert all(task < step // 4 for task in tasks)


def test_earlier_tasks_are_alike(tmp_path: Path) -> None:
    """The first one has 40 samples in memory and the second 4, and as many come of each."""

    class Uneven(Logged):
        def on_task_end(self, trainer: Any, pl_module: Any, task: Any) -> None:
            super().on_task_end(trainer, pl_module, task)
            if task.index == 1:
                ids = self.buffer.sample_ids[self.buffer.tasks == 1]
                self.purge(ids[4:])

    method = Uneven(100, new_old_ratio=6.0)
    stream = toy_stream(batch_size=6, scenario=ClassIncremental(n_tasks=4), steps_per_task=150, epochs_per_task=1)
    fit_stream(tmp_path, [method], stream=stream)
    found = Counter(task for _, tasks in method.steps[300:450] for task in tasks)
    assert found.total() == 150
    assert found[0] == pytest.approx(75, abs=25)


def test_a_second_stream_rehearses_the_first(tmp_path: Path) -> None:
    """Its tasks are further ones: old samples come in its first task, and never one of the running task."""
    method, module = Logged(96), ToyModule()
    fit_stream(tmp_path, [method], module=module, stream=toy_stream(batch_size=6))
    method.steps.clear()
    # what is known by its identity does not come in anew
    longer = TaskStreamDataModule(
        toy_data(96), toy_data(16, seed=1), scenario=ClassIncremental(2), batch_size=6, epochs_per_task=2
    )
    fit_stream(tmp_path, [method], module=module, stream=longer)
    half = len(method.steps) // 2
    for step, (_, tasks) in enumerate(method.steps):
        assert len(tasks) == 6
        assert all(task < (2 if step < half else 3) for task in tasks)
    assert any(task == 2 for _, tasks in method.steps[half:] for task in tasks)


def test_beside_adapters(tmp_path: Path) -> None:
    """What the paper has: the memory rehearses, and only the slots train."""
    before, module = LoraToy(learning_rate=0.02), LoraToy(learning_rate=0.02)
    method = Logged(20)
    callbacks: list[Callback] = [method, AdapterSlots(4)]
    fit_stream(tmp_path, callbacks, module=module)
    for old, new in zip(before.model.base_model.model, module.model.base_model.model, strict=True):
        if hasattr(old, "base_layer"):
            assert (old.base_layer.weight == new.base_layer.weight).all()
            assert new.lora_A["past"].weight.any()
    assert [len(tasks) for _, tasks in method.steps] == [0] * 6 + [8] * 6


def test_refusals(tmp_path: Path) -> None:
    """A ratio that says nothing, and a stream that hides its tasks."""
    for ratio in (0.0, -1.0):
        with pytest.raises(ValueError, match="`new_old_ratio` must be above 0"):
            StaticConPET(4, new_old_ratio=ratio)
    with pytest.raises(ValueError, match="StaticConPET"):
        fit_stream(
            tmp_path, [StaticConPET(4)], stream=toy_stream(scenario=Online(ClassIncremental(2)), epochs_per_task=1)
        )
