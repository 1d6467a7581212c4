"""Learning rates that restart with every task, and come back to the bit after a resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from language import TokenRows, llama, token_stream
from lightning_cl.core.schedules import TaskScheduler
from lightning_cl.datamodules import Online
from lightning_cl.modules import Schedule
from toys import fit_stream, trainer

pytest.importorskip("transformers")
PEAK = 0.01


class Rates(Callback):
    """Writes down the learning rate of every optimizer step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.rates += {group["lr"] / PEAK for group in optimizer.param_groups}


def rates_of(root: Path, *, stream: Any = None, module: Any = None, **settings: Any) -> list[float]:
    """Fit, and return the rates as fractions of the peak."""
    rates = Rates()
    names = ("schedule", "warmup", "floor", "rewarm", "adapter")
    options = {name: settings.pop(name) for name in names if name in settings}
    module = module or llama(learning_rate=PEAK, **options)
    fit_stream(root, [rates], module=module, stream=stream or token_stream(), **settings)
    return rates.rates


def scheduler(steps: list[int], **settings: Any) -> TaskScheduler:
    """A scheduler of its own, without a Trainer."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    left = settings.pop("left", None)
    return TaskScheduler(optimizer, Schedule(**settings), steps, left=None if left is None else lambda: left)


def advance(schedule: TaskScheduler, steps: int) -> list[float]:
    """Make steps, and return the rate of each."""
    rates = []
    for _ in range(steps):
        rates.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return rates


# ---------------------------------------------------------------------- values


def test_values_by_hand() -> None:
    """Two steps of warm-up of six, a floor of a tenth, a cosine between them; from the floor in the second task."""
    schedule = Schedule("cosine", warmup=2, floor=0.1)
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * part / 3)) for part in range(4)]
    assert [schedule.factor(0, step, 6) for step in range(6)] == pytest.approx([1 / 3, 2 / 3, *cosine])
    assert [schedule.factor(1, step, 6) for step in range(6)] == pytest.approx([0.4, 0.7, *cosine])
    assert cosine[-1] == pytest.approx(0.1)


def test_a_warmup_may_be_a_fraction() -> None:
    """Rounded up, so that a short task has one too; and cut to leave a step at the peak."""
    schedule = Schedule("constant", warmup=0.2)
    assert [schedule.factor(0, step, 8) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert Schedule("constant", warmup=0.0).factor(0, 0, 8) == 1
    assert [Schedule("linear", warmup=9).factor(0, step, 3) for step in range(3)] == pytest.approx([1 / 3, 2 / 3, 1])


def test_every_task_of_a_stream_has_its_own_schedule(tmp_path: Path) -> None:
    """Six steps, then four, each from its warm-up to the floor."""
    rates = rates_of(tmp_path, schedule="linear", warmup=1, floor=0.2)
    assert rates == pytest.approx([0.5, 1, 0.8, 0.6, 0.4, 0.2, 0.6, 1, 0.6, 0.2])


def test_without_rewarming_the_stream_has_one_schedule(tmp_path: Path) -> None:
    """Also where the scenario hides the boundaries, and where the optimizer is made anew."""
    expected = [0.5, *(1 - step / 8 for step in range(9))]
    settings = {"schedule": "linear", "warmup": 1, "floor": 0.0}
    assert rates_of(tmp_path, rewarm=False, **settings) == pytest.approx(expected)
    again = token_stream(optimizer_policy="rebuild")
    assert rates_of(tmp_path, rewarm=False, stream=again, **settings) == pytest.approx(expected)
    hidden = token_stream(scenario=Online(token_stream().scenario), epochs_per_task=1, steps_per_task=None)
    assert rates_of(tmp_path, stream=hidden, **settings) == pytest.approx([0.5, 1, 2 / 3, 1 / 3, 0])


@pytest.mark.parametrize(
    ("stream", "settings"),
    [
        ({"optimizer_policy": "rebuild"}, {}),
        ({"batch_size": 2}, {"accumulate_grad_batches": 2}),
        ({"batch_size": 2}, {"limit_train_batches": 0.5}),
    ],
    ids=["rebuilt", "accumulation", "a part of the batches"],
)
def test_steps_are_counted_as_lightning_makes_them(stream: Any, settings: Any, tmp_path: Path) -> None:
    """However a task comes to its steps, it ends at the floor and the next one warms up."""
    rates = rates_of(tmp_path, stream=token_stream(**stream), schedule="linear", warmup=1, floor=0.2, **settings)
    assert rates == pytest.approx([0.5, 1, 0.8, 0.6, 0.4, 0.2, 0.6, 1, 0.6, 0.2])


def test_steps_per_task(tmp_path: Path) -> None:
    """They are the length of the schedule."""
    rates = rates_of(tmp_path, stream=token_stream(steps_per_task=3, epochs_per_task=1), warmup=0, floor=0.0)
    assert rates == pytest.approx([1, 0.5, 0] * 2)


# ---------------------------------------------------------------------- without a stream


def test_a_fit_without_a_stream_is_one_task(tmp_path: Path) -> None:
    """The Trainer says how long it is; a second job that loads the checkpoint warms up again."""
    loader, rates = DataLoader(TokenRows(1), batch_size=4), []
    module = llama(learning_rate=PEAK, schedule="linear", warmup=1, floor=0.2)
    for epochs, checkpoint in ((2, None), (4, tmp_path / "end.ckpt")):
        rates.append(Rates())
        job = trainer(tmp_path, [rates[-1]], max_epochs=epochs)
        job.fit(module, loader, loader, ckpt_path=checkpoint)
        job.save_checkpoint(tmp_path / "end.ckpt")
    assert rates[0].rates == pytest.approx([0.5, 1, 0.8, 0.6, 0.4, 0.2])
    assert rates[1].rates == pytest.approx([0.6, 1, 0.8, 0.6, 0.4, 0.2])


def test_a_fit_without_an_end(tmp_path: Path) -> None:
    """Refused where the schedule needs one."""
    loader = DataLoader(TokenRows(1), batch_size=4)
    with pytest.raises(ValueError, match="set `max_epochs` or `max_steps`"):
        trainer(tmp_path).fit(llama(), loader, loader)

    class Stop(Rates):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 5

    rates = Stop()
    trainer(tmp_path, [rates]).fit(llama(learning_rate=PEAK, schedule="constant", warmup=2), loader, loader)
    assert rates.rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])


# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize("policy", ["keep", "reset_state", "rebuild"])
@pytest.mark.parametrize("step", [4, 6, 8])
def test_a_resumed_run_ends_with_the_same_bits(policy: str, step: int, tmp_path: Path) -> None:
    """In the first task, at the boundary, and in the second, with re-warming."""
    settings: dict[str, Any] = {"learning_rate": PEAK, "warmup": 2}
    ends, rates = [], []
    for folder, checkpoint in ((tmp_path, None), (tmp_path / "resumed", tmp_path / f"step={step}.ckpt")):
        rates.append(Rates())
        saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        stream, module = token_stream(optimizer_policy=policy), llama(**settings)
        ends.append(fit_stream(folder, [rates[-1], saver], module=module, stream=stream, ckpt_path=checkpoint))
    assert torch.equal(*ends)
    assert rates[1].rates == rates[0].rates[step:]
    # so there was something to restore
    assert len(set(rates[0].rates)) == 8


def test_a_resume_with_other_numbers_of_steps_keeps_its_place() -> None:
    """Half as many steps, as on twice as many ranks: a third through the second task stays a third through it."""
    saved = scheduler([4, 12], shape="linear", warmup=0)
    advance(saved, 8)
    fresh = scheduler([2, 6], shape="linear", warmup=0)
    fresh.load_state_dict(saved.state_dict())
    assert advance(fresh, 4) == [Schedule("linear", warmup=0).factor(1, step, 6) for step in (2, 3, 4, 5)]


def test_state_of_a_finished_run_and_of_an_open_one() -> None:
    """Without a stream, steps beyond the saved end are a task of their own; before it, the task is what is left."""
    saved = scheduler([4], shape="linear", warmup=0, left=2)
    advance(saved, 2)
    for left, steps in ((6, [8]), (1, [3]), (0, [4])):
        other = scheduler([9], shape="linear", warmup=0, left=left)
        other.load_state_dict(saved.state_dict())
        assert other.steps == steps
    advance(saved, 2)
    for left, steps in ((6, [4, 6]), (1, [4, 1]), (0, [4])):
        # as many as before may be planned in all
        other = scheduler([4], shape="linear", warmup=0, left=left)
        other.load_state_dict(saved.state_dict())
        assert other.steps == steps


def test_a_state_of_this_run_is_not_taken_for_that_of_another() -> None:
    """Taken in the middle of a task, and loaded later in it."""
    schedule = scheduler([4, 6], shape="linear", warmup=0, left=1)
    advance(schedule, 6)
    state = schedule.state_dict()
    advance(schedule, 3)
    schedule.load_state_dict(state)
    assert schedule.steps == [4, 6]


def test_a_group_that_was_added_keeps_its_own_rate() -> None:
    """Also over a resume."""
    schedule = scheduler([4], shape="linear", warmup=0, floor=0.0)
    schedule.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))], "lr": 0.3})
    advance(schedule, 2)
    assert [group["lr"] for group in schedule.optimizer.param_groups] == pytest.approx([1 / 3, 0.3])
    schedule.load_state_dict(schedule.state_dict())
    assert [group["lr"] for group in schedule.optimizer.param_groups] == pytest.approx([1 / 3, 0.3])
