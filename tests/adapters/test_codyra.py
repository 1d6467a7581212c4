"""CoDyRA: gates shrink in the second half of a task, and what is at zero is dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_cl import CoDyRA, ContinualCallback
from lightning_cl.core.update import OptimizerStep
from lora_runs import LAYERS, RUNS, SLOW, Watch, slot_of
from toys import fit_stream, toy_loaders, toy_stream, trainer, weights


class Gates(ContinualCallback):
    """Notes the gates of a layer after every update; its place says before or after the method."""

    needs_state = False

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def change_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        if any(name.endswith("mixing") for name in step.parameters):
            self.found.append(slot_of(pl_module).mixing("default"))


@pytest.mark.parametrize("run", RUNS)
def test_thresholds_of_every_step(run: str, tmp_path: Path) -> None:
    """None in the dense half of each task, then linear; the last of a task is the largest."""
    kind, settings = RUNS[run]
    before, after = Gates(), Gates()
    fit_stream(tmp_path, [before, CoDyRA(0.3, capacity=8), after], module=kind(), **settings)
    steps = 2 if "accumulate_grad_batches" in settings else 3
    expected = [0.3 * max(n - steps, 0) / steps for n in range(1, 2 * steps + 1)] * 2
    assert len(before.found) == len(expected)
    for old, new, threshold in zip(before.found, after.found, expected, strict=True):
        torch.testing.assert_close(new, old.sign() * (old.abs() - threshold).clamp(min=0))
    assert any((new == 0).any() for new in after.found)


@pytest.mark.parametrize("run", ["plain", "bf16-mixed", "fused"])
def test_only_what_survives_is_kept(run: str, tmp_path: Path) -> None:
    """The past slot takes no rank with a gate of zero, and the outputs do not change at a boundary."""
    kind, settings = RUNS[run]
    before, after, module, method = Watch(), Watch(), kind(), CoDyRA(0.3, capacity=8)
    fit_stream(tmp_path, [before, method, after], module=module, **settings)
    used = 0
    for task, gates in enumerate(before.mixings):
        down, up = before.factors[task]
        rows = slice(used, used + int((gates != 0).sum()))
        past_down, past_up = slot_of(module).weights("past")
        torch.testing.assert_close(past_down[rows], (gates[:, None] * down)[gates != 0])
        torch.testing.assert_close(past_up[:, rows], up[:, gates != 0])
        used = rows.stop
        assert method.segments[LAYERS[0]][task + 1] == used
    for old, new in zip(before.outputs, after.outputs, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-5)


def test_ranks_differ_by_layer_and_are_logged(tmp_path: Path) -> None:
    """For each task, by the name of the layer."""
    method, logger = CoDyRA(0.3, capacity=8), CSVLogger(tmp_path)
    fit_stream(tmp_path, [method], module=SLOW(), logger=logger)
    assert method.ranks == {name: offsets[-1] - offsets[-2] for name, offsets in method.segments.items()}
    assert sum(offsets[-1] for offsets in method.segments.values()) < 8
    logger.save()
    text = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert all(f"codyra/rank/{name}" in text for name in LAYERS)


def test_when_all_gates_are_zero_a_task_leaves_nothing(tmp_path: Path) -> None:
    """The weights are those of before, and the slot stays empty."""
    module, method = SLOW(), CoDyRA(50.0, capacity=1)
    start = weights(module)
    fit_stream(tmp_path, [method], module=module)
    assert method.segments == {name: [0, 0, 0] for name in LAYERS}
    torch.testing.assert_close(weights(module), start)


def test_every_task_begins_with_its_own_gates(tmp_path: Path) -> None:
    """Drawn anew, the same for the same seed."""
    found = []
    for seed in (0, 0, 1):
        module = SLOW()
        trainer(tmp_path, [CoDyRA(0.1, capacity=8, seed=seed)]).fit(module, datamodule=toy_stream())
        found.append([slot_of(module, name).mixing("default") for name in LAYERS])
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][0], found[2][0])
    assert not torch.equal(found[0][0], found[0][1])


def test_gates_in_bfloat16_are_refused(tmp_path: Path) -> None:
    """They would swallow thresholds below half of their last bit; adapters in float32 train."""
    module, watch = SLOW(), Watch()
    with pytest.raises(ValueError, match=r"`CoDyRA` subtracts thresholds.*torch\.bfloat16.*bf16-mixed"):
        fit_stream(tmp_path, [CoDyRA(), watch], module=module, precision="bf16-true")
    assert watch.steps == []


def test_a_task_of_unknown_length_is_refused(tmp_path: Path) -> None:
    """Before its first step."""
    module, watch = SLOW(), Watch()
    with pytest.raises(ValueError, match=r"`CoDyRA` needs to know how many steps the task has"):
        trainer(tmp_path, [CoDyRA(), watch], max_epochs=-1).fit(module, *toy_loaders())
    assert watch.steps == []


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"threshold": 0.0}, "`threshold` must be above 0"),
        ({"dense": 1.0}, "`dense` must be from 0 to below 1"),
        ({"dense": -0.1}, "`dense` must be from 0 to below 1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], text: str) -> None:
    """Each names itself."""
    with pytest.raises(ValueError, match=text):
        CoDyRA(**settings)
