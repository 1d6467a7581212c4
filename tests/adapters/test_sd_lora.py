"""SD-LoRA: directions stay, magnitudes train on, and no boundary shows in the outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_cl import ContinualCallback, SDLoRA, Task
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.functional import fit_direction
from lora_runs import LAYERS, RUNS, SLOW, Watch, logits, slot_of
from toys import LoraToy, fit_stream, toy_loaders, toy_stream, trainer


class PastAtStart(ContinualCallback):
    """Notes the factors and the magnitudes of finished tasks where a task starts."""

    needs_state = False

    def __init__(self) -> None:
        self.found: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        slot = slot_of(pl_module)
        self.found.append((*slot.weights("past"), slot.mixing("past")))


@pytest.mark.parametrize("run", RUNS)
def test_boundaries_do_not_show(run: str, tmp_path: Path) -> None:
    """An update keeps its value when it is split into direction and magnitude; magnitudes have moved by then."""
    kind, settings = RUNS[run]
    before, after, module = Watch(), Watch(), kind()
    fit_stream(tmp_path, [before, SDLoRA(capacity=4), after], module=module, **settings)
    for old, new in zip(before.outputs, after.outputs, strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-6 * float(old.abs().max()))
    assert all(abs(float(scale) - 1) > 1e-4 for scale in before.mixings)


def test_directions_stay_and_magnitudes_go_on(tmp_path: Path) -> None:
    """In task 2 the factors of task 1 keep their bits, and its magnitude moves from where it was, not from 1."""
    start, watch, module, method = PastAtStart(), Watch(), SLOW(), SDLoRA(capacity=6)
    fit_stream(tmp_path, [start, watch, method], module=module)
    down, up, magnitudes = start.found[1]
    slot = slot_of(module)
    assert torch.equal(slot.weights("past")[0][:2], down[:2])
    assert torch.equal(slot.weights("past")[1][:, :2], up[:, :2])
    torch.testing.assert_close((up @ down).norm(), torch.tensor(1.0))
    first_down, first_up = watch.factors[0]
    torch.testing.assert_close(magnitudes[0], (watch.mixings[0] * first_up @ first_down).norm())
    assert (slot.mixing("past")[0] - magnitudes[0]).abs() > 1e-3
    assert method.segments[LAYERS[0]] == [0, 2, 4]
    # of each task one magnitude acts, that of its first rank; what is free has none yet
    assert slot.down("past").groups.tolist() == [0, 0, 2, 2, 4, 5]
    assert slot.mixing("past")[[1, 3, 4, 5]].tolist() == [1.0] * 4


def test_a_task_begins_with_a_magnitude_of_one(tmp_path: Path) -> None:
    """And B at zero."""
    module = LoraToy()
    fit_stream(tmp_path, [SDLoRA(capacity=4)], module=module)
    slot = slot_of(module)
    assert slot.mixing("default").tolist() == [1.0]
    assert not slot.weights("default")[1].any()


def test_a_checkpoint_is_evaluated_by_a_fresh_module(tmp_path: Path) -> None:
    """Which magnitude belongs to which rank is in the weights: Lightning restores no callback to evaluate."""
    module = SLOW()
    fit = trainer(tmp_path, [SDLoRA(capacity=6)])
    fit.fit(module, datamodule=toy_stream())
    fit.save_checkpoint(tmp_path / "last.ckpt")
    fresh = SLOW(seed=99)
    trainer(tmp_path, [SDLoRA(capacity=6)]).validate(
        fresh, toy_loaders()[0], ckpt_path=tmp_path / "last.ckpt", verbose=False
    )
    assert torch.equal(logits(fresh), logits(module))


# ---------------------------------------------------------------------- room


def test_too_small_a_capacity_is_refused(tmp_path: Path) -> None:
    """Before the first step, with what it takes."""
    with pytest.raises(
        ValueError, match=r"SDLoRA\(capacity=3\)` .* 0 ranks are used, and with 2 more .* a capacity of 4"
    ):
        fit_stream(tmp_path, [SDLoRA(capacity=3)], module=LoraToy())
    with pytest.raises(ValueError, match="with 4 more tasks of rank 2 it needs a capacity of 8"):
        fit_stream(
            tmp_path,
            [SDLoRA(capacity=7)],
            module=LoraToy(),
            stream=toy_stream(scenario=ClassIncremental(n_tasks=4)),
        )
    with pytest.raises(ValueError, match="with 1 more tasks of rank 2 it needs a capacity of 2"):
        fit_stream(tmp_path, [SDLoRA(0.5, capacity=1)], module=LoraToy())


def test_fits_of_one_task_are_counted(tmp_path: Path) -> None:
    """Without a stream the tasks to come are unknown: the fit that has no room is refused."""
    method, module = SDLoRA(capacity=3), LoraToy()
    first, second = toy_loaders()
    trainer(tmp_path, [method], max_epochs=1).fit(module, first, first)
    with pytest.raises(ValueError, match="2 ranks are used, and with 1 more tasks of rank 2 it needs a capacity of 4"):
        trainer(tmp_path, [method], max_epochs=1).fit(module, second, second)


def test_a_second_stream_needs_room_of_its_own(tmp_path: Path) -> None:
    """Tasks of a stream before are not subtracted from those to come; with the room for both it goes on."""
    method, module = SDLoRA(capacity=6), LoraToy()
    fit_stream(tmp_path, [method], module=module)
    with pytest.raises(ValueError, match="4 ranks are used, and with 2 more tasks of rank 2 it needs a capacity of 8"):
        fit_stream(tmp_path, [method], module=module)
    method, module = SDLoRA(capacity=8), LoraToy()
    for _ in range(2):
        fit_stream(tmp_path, [method], module=module)
    assert method.segments[LAYERS[0]] == [0, 2, 4, 6, 8]


def test_a_direction_without_room_is_never_truncated(tmp_path: Path) -> None:
    """The slot stays as it is."""

    class Full(SDLoRA):
        def _check_room(self, tasks: int) -> None:
            """Nothing is looked at before."""

    module = LoraToy()
    with pytest.raises(ValueError, match="2 ranks are used, and with 1 more"):
        fit_stream(tmp_path, [Full(capacity=3)], module=module)
    slot = slot_of(module)
    down, up = slot.weights("past")
    torch.testing.assert_close((up[:, :2] @ down[:2]).norm(), torch.tensor(1.0))


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_settings_out_of_range(value: float) -> None:
    """A share is from 0 to 1."""
    with pytest.raises(ValueError, match="`merge_below` must be from 0 to 1"):
        SDLoRA(value)


# ---------------------------------------------------------------------- merging


@pytest.mark.parametrize(("merge_below", "capacity"), [(1.0, 8), (1e-6, 2)], ids=["spanned", "no room"])
def test_a_direction_is_merged_into_earlier_ones(merge_below: float, capacity: int, tmp_path: Path) -> None:
    """By least squares on their magnitudes; the boundary then jumps by the residual."""
    watch, module, method = Watch(), SLOW(), SDLoRA(merge_below, capacity=capacity)
    final = PastBeforeEnd()
    fit_stream(tmp_path, [watch, final, method], module=module)
    slot = slot_of(module)
    assert method.segments[LAYERS[0]] == [0, 2, 2]
    (down, up), scale = watch.factors[1], watch.mixings[1]
    past_down, past_up, magnitudes = final.found[1]
    coefficients, residual = fit_direction(scale * down, up, [(past_down[:2], past_up[:, :2])])
    torch.testing.assert_close(slot.mixing("past")[0], magnitudes[0] + coefficients[0])
    assert method.errors[LAYERS[0]] == pytest.approx(float(residual), rel=1e-5)
    new = slot.factors("past")
    jump = (new[1] @ new[0] - past_up @ (magnitudes[0] * past_down) - scale * up @ down).norm()
    torch.testing.assert_close(jump, residual * (scale * up @ down).norm(), rtol=1e-4, atol=0)


class PastBeforeEnd(PastAtStart):
    """The same where a task ends, before the method acts."""

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        pass

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().on_task_start(trainer, pl_module, task)


def test_what_is_not_spanned_is_kept(tmp_path: Path) -> None:
    """With a small share, and room."""
    method = SDLoRA(1e-6, capacity=8)
    fit_stream(tmp_path, [method], module=SLOW())
    assert method.segments[LAYERS[0]] == [0, 2, 4]
    assert method.errors == {}
