"""Learning rates that begin anew with every task: the module's own schedules, and schedules of the callback."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader

from lightning_cl import FSDP2Strategy, Rewarm, TaskStreamDataModule
from lightning_cl.callbacks.restarted import RestartedScheduler
from lightning_cl.datamodules import ClassIncremental, Online
from lightning_cl.optim import SPAM
from ranks import Ranks
from toys import ToyModule, fit_stream, toy_loaders, toy_stream, trainer
from users import Manual

PEAK = 0.1
Make = Callable[[torch.optim.Optimizer], Any]


class Scheduled(ToyModule):
    """The toy module with a schedule of its own."""

    def __init__(self, make: Make, *, dropout: float = 0.0, **config: Any) -> None:
        super().__init__(dropout=dropout)
        self.make, self.config = make, config

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        made = self.make(optimizer)
        if isinstance(made, list):
            return [optimizer], [{"scheduler": one, "interval": "step"} for one in made]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made} | self.config}


class Unpicklable(Scheduled):
    """Has a function in its schedule."""

    def configure_optimizers(self) -> Any:
        optimizer = ToyModule.configure_optimizers(self)
        schedule = schedulers.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Rates(Callback):
    """Writes down what every optimizer step is taken with."""

    def __init__(self, *keys: str) -> None:
        self.keys = keys or ("lr",)
        self.rates: list[Any] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.rates += [float(group[key]) for group in optimizer.param_groups for key in self.keys]


def rates_of(root: Path, *callbacks: Callback, keys: tuple[str, ...] = (), **settings: Any) -> list[float]:
    """Fit the toy stream, six steps for each of two tasks."""
    rates = Rates(*keys)
    fit_stream(root, [*callbacks, rates], **settings)
    return rates.rates


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    """A task's length of a schedule, each rate made from the one before."""
    return schedulers.CosineAnnealingLR(optimizer, T_max=6, eta_min=0.01)


def exponential(optimizer: torch.optim.Optimizer) -> Any:
    """Likewise, without an end."""
    return schedulers.ExponentialLR(optimizer, gamma=0.5)


def sequential(optimizer: torch.optim.Optimizer) -> Any:
    """Two schedules, one after the other."""
    parts = [schedulers.LinearLR(optimizer, 0.1, total_iters=2), schedulers.ExponentialLR(optimizer, 0.5)]
    return schedulers.SequentialLR(optimizer, parts, milestones=[2])


def chained(optimizer: torch.optim.Optimizer) -> Any:
    """Two schedules at once."""
    parts = [schedulers.ConstantLR(optimizer, 0.5, total_iters=3), schedulers.ExponentialLR(optimizer, 0.5)]
    return schedulers.ChainedScheduler(parts, optimizer)


def two(optimizer: torch.optim.Optimizer) -> Any:
    """Two schedules that Lightning steps."""
    return [schedulers.ConstantLR(optimizer, 0.5, total_iters=3), schedulers.ExponentialLR(optimizer, 0.5)]


OWN: dict[str, Make] = {
    "cosine": cosine,
    "exponential": exponential,
    "lambda": lambda optimizer: schedulers.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "one cycle": lambda optimizer: schedulers.OneCycleLR(optimizer, max_lr=PEAK, total_steps=13),
    "cyclic": lambda optimizer: schedulers.CyclicLR(optimizer, 0.02, PEAK, step_size_up=4),
    "warm restarts": lambda optimizer: schedulers.CosineAnnealingWarmRestarts(optimizer, 4),
    "sequential": sequential,
    "chained": chained,
    "two": two,
}


# ---------------------------------------------------------------------- the module's own schedule


@pytest.mark.parametrize("name", OWN)
def test_the_own_schedule_begins_anew_with_every_task(name: str, tmp_path: Path) -> None:
    """To the bit, with the momenta that it sets; the first task is that of a run without the callback."""
    keys = ("lr", "momentum")
    plain = rates_of(tmp_path, keys=keys, module=Scheduled(OWN[name], interval="step"))
    found = rates_of(tmp_path, Rewarm(), keys=keys, module=Scheduled(OWN[name], interval="step"))
    assert found == plain[:12] * 2
    assert plain[12:] != plain[:12]


def test_a_task_is_rewarmed_from_where_the_one_before_ended(tmp_path: Path) -> None:
    """Over a decay that goes on below it, which each of its steps derives from the step before."""
    found = rates_of(tmp_path, Rewarm(warmup=3), module=Scheduled(exponential, interval="step"))
    decay = [PEAK * 0.5**step for step in range(6)]
    ended = PEAK * 0.5**6
    warm = [ended + (decay[step] - ended) * (step + 1) / 4 for step in range(3)]
    assert found[:6] == pytest.approx(decay)
    assert found[6:] == pytest.approx([*warm, *decay[3:]])
    # nothing of the warm-up stays
    assert found[9:] == found[3:6]


def test_a_task_shorter_than_its_warmup(tmp_path: Path) -> None:
    """It gets as far as it can; the next one warms up from there."""
    stream = toy_stream(scenario=ClassIncremental(n_tasks=4), epochs_per_task=1, batch_size=6)
    constant = functools.partial(schedulers.MultiStepLR, milestones=[2], gamma=0.5)
    found = rates_of(tmp_path, Rewarm(warmup=3), module=Scheduled(constant, interval="step"), stream=stream)
    assert found == pytest.approx([0.1, 0.1] + [0.0625, 0.075] * 3)


def test_a_schedule_of_epochs(tmp_path: Path) -> None:
    """Warm-up counts steps all the same."""
    step = functools.partial(schedulers.StepLR, step_size=1, gamma=0.5)
    found = rates_of(tmp_path, Rewarm(warmup=1), module=Scheduled(step))
    assert found == pytest.approx([0.1] * 3 + [0.05] * 3 + [0.0625] + [0.1] * 2 + [0.05] * 3)


def test_the_frequency_of_epochs_counts_from_the_start_of_a_task(tmp_path: Path) -> None:
    """Every second epoch of three, in both tasks; by itself Lightning would count all six."""
    step = functools.partial(schedulers.StepLR, step_size=1, gamma=0.5)
    stream = functools.partial(toy_stream, epochs_per_task=3, batch_size=24)
    plain = rates_of(tmp_path, module=Scheduled(step, frequency=2), stream=stream())
    assert plain == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025, 0.025])
    found = rates_of(tmp_path, Rewarm(), saver(tmp_path), module=Scheduled(step, frequency=2), stream=stream())
    assert found == pytest.approx([0.1, 0.1, 0.05] * 2)
    for done in (1, 4):
        fit = {"module": Scheduled(step, frequency=2), "stream": stream(), "ckpt_path": tmp_path / f"step={done}.ckpt"}
        assert rates_of(tmp_path, Rewarm(), saver(tmp_path / "resumed"), **fit) == found[done:]


def test_the_frequency_of_steps_is_that_of_lightning(tmp_path: Path) -> None:
    """The second batch of each epoch of three, and so the same in every task."""
    module = functools.partial(Scheduled, exponential, interval="step", frequency=2)
    plain = rates_of(tmp_path, module=module())
    assert plain == pytest.approx([PEAK * 0.5**steps for steps in (0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4)])
    assert rates_of(tmp_path, Rewarm(), module=module()) == plain[:6] * 2


def test_accumulation_counts_steps_of_the_optimizer(tmp_path: Path) -> None:
    """Three steps of two batches, two of them warm-up."""
    constant = functools.partial(schedulers.StepLR, step_size=2, gamma=0.5)
    settings: dict[str, Any] = {"stream": toy_stream(batch_size=4), "accumulate_grad_batches": 2}
    found = rates_of(tmp_path, Rewarm(warmup=2), module=Scheduled(constant, interval="step"), **settings)
    own = [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]
    ended = 0.0125
    assert found == pytest.approx([*own, *(ended + (0.1 - ended) * part for part in (1 / 3, 2 / 3)), *own[2:]])


def test_a_plateau_is_looked_for_in_every_task_anew(tmp_path: Path) -> None:
    """The metric that comes after a task's end is none of the next task's: its own may be worse."""

    class Plateau(Scheduled):
        def on_train_epoch_end(self) -> None:
            # never better; in the second task far worse
            self.log("worst", float(self.current_epoch >= 3))

    plateau = functools.partial(schedulers.ReduceLROnPlateau, factor=0.5, patience=0)

    def run(*callbacks: Callback) -> list[float]:
        module = Plateau(plateau, monitor="worst")
        return rates_of(tmp_path, *callbacks, module=module, stream=toy_stream(epochs_per_task=3, batch_size=24))

    assert run() == pytest.approx([0.1, 0.1, 0.05, 0.025, 0.0125, 0.00625])
    assert run(Rewarm()) == pytest.approx([0.1, 0.1, 0.05] * 2)


class ByHand(Manual):
    """Two optimizers, two schedules that it steps itself: one by steps, one by epochs."""

    learning_rate = PEAK

    def build(self) -> None:
        super().build()
        self.head = torch.nn.Linear(5, 4)

    def configure_optimizers(self) -> Any:
        optimizers = super().configure_optimizers()
        # the frequency is the module's to heed
        by_epoch = {"scheduler": schedulers.StepLR(optimizers[1], 1, gamma=0.1), "frequency": 2}
        return optimizers, [exponential(optimizers[0]), by_epoch]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.lr_schedulers()[0].step()

    def on_train_epoch_end(self) -> None:
        self.lr_schedulers()[1].step()


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    """What the module steps begins anew, and a step of an epoch's end that follows the task's end does not count."""
    inputs = torch.stack([sample for sample, _ in Manual.samples(12)])
    data = (inputs, torch.arange(12) % 2 + 2 * (torch.arange(12) < 6))
    stream = TaskStreamDataModule(data, scenario=ClassIncremental(2), batch_size=3, epochs_per_task=2)
    found = rates_of(tmp_path, Rewarm(warmup=1), module=ByHand(), stream=stream)
    by_step = [PEAK * 0.5**step for step in range(4)]
    by_epoch = [0.1, 0.1, 0.01, 0.01]
    assert found[0:8:2] == pytest.approx(by_step)
    assert found[1:8:2] == pytest.approx(by_epoch)
    assert found[8::2] == pytest.approx([(PEAK + PEAK * 0.5**4) / 2, *by_step[1:]])
    assert found[9::2] == pytest.approx([(0.1 + 0.01) / 2, *by_epoch[1:]])


def test_a_learning_rate_in_a_tensor_stays_in_it(tmp_path: Path) -> None:
    """As a captured step needs it, in schedules of the module and of the callback."""

    class InTensor(Scheduled):
        def configure_optimizers(self) -> Any:
            self.rate = torch.tensor(PEAK)
            optimizer = torch.optim.AdamW(self.parameters(), lr=self.rate, foreach=False)
            return (
                ([optimizer], [{"scheduler": exponential(optimizer), "interval": "step"}]) if self.make else optimizer
            )

    own, ours = InTensor(exponential), InTensor(None)
    found = rates_of(tmp_path, Rewarm(warmup=1), module=own)
    assert found[6:] == pytest.approx([PEAK * (1 + 0.5**6) / 2, *(PEAK * 0.5**step for step in range(1, 6))])
    found = rates_of(tmp_path, Rewarm("linear", warmup=0, floor=0.0), module=ours)
    assert found == pytest.approx([PEAK * (1 - step / 5) for step in range(6)] * 2, abs=1e-8)
    for module in (own, ours):
        assert module.optimizers().param_groups[0]["lr"] is module.rate


def test_what_the_schedule_is_asked(tmp_path: Path) -> None:
    """A module reads its scheduler as before, and the learning rate in the warm-up too."""

    class Asked(Callback):
        rates: ClassVar[list[float]] = []

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
            self.rates.extend(pl_module.lr_schedulers().get_last_lr())

    module = Scheduled(cosine, interval="step")
    assert rates_of(tmp_path, Rewarm(warmup=3), Asked(), module=module) == Asked.rates
    scheduler = module.lr_schedulers()
    assert (scheduler.T_max, scheduler.base_lrs) == (6, [PEAK])


# ---------------------------------------------------------------------- a schedule of the callback


def test_shape_gives_every_task_its_schedule(tmp_path: Path) -> None:
    """Six steps and three, each from its warm-up to the floor, the second's from the floor."""
    settings = {"shape": "linear", "warmup": 1, "floor": 0.2}
    found = rates_of(tmp_path, Rewarm(**settings), stream=toy_stream(epochs_per_task=[2, 1]))
    assert found == pytest.approx([PEAK * part for part in (0.5, 1, 0.8, 0.6, 0.4, 0.2, 0.6, 1, 0.2)])


def test_defaults_of_a_shape_are_those_of_the_papers() -> None:
    """A hundredth of the task, a tenth of the peak."""
    assert (Rewarm("cosine").schedule.warmup, Rewarm("cosine").schedule.floor) == (0.01, 0.1)
    assert Rewarm().warmup == 0


# ---------------------------------------------------------------------- one fit for each task

LINEAR = {"shape": "linear", "warmup": 1, "floor": 0.2}
EXPECTED = {
    "own": [0.1, 0.05, 0.025, 0.0125 + 0.0875 / 2, 0.05, 0.025],
    "shape": [0.05, 0.1, 0.02, 0.06, 0.1, 0.02],
}


def case(kind: str) -> tuple[Rewarm, LightningModule]:
    """The callback and a module for it."""
    if kind == "own":
        return Rewarm(warmup=1), Scheduled(exponential, interval="step")
    return Rewarm(**LINEAR), ToyModule()


@pytest.mark.parametrize("kind", EXPECTED)
def test_fits_with_a_fresh_trainer(kind: str, tmp_path: Path) -> None:
    """The callback knows where the fit before ended."""
    (rewarm, module), rates = case(kind), Rates()
    for loader in toy_loaders():
        trainer(tmp_path, [rewarm, rates], max_epochs=1).fit(module, loader, loader)
    assert rates.rates == pytest.approx(EXPECTED[kind])


@pytest.mark.parametrize("kind", EXPECTED)
@pytest.mark.parametrize("load", [True, False], ids=["from a checkpoint", "as it is"])
def test_fits_with_the_same_trainer(kind: str, load: bool, tmp_path: Path) -> None:
    """Whose limit is raised: steps of the fit before are not counted again."""
    (rewarm, module), rates = case(kind), Rates()
    job = trainer(tmp_path, [rewarm, rates], max_epochs=1)
    for epochs, loader in enumerate(toy_loaders(), start=1):
        job.fit_loop.max_epochs = epochs
        job.fit(module, loader, loader, ckpt_path=tmp_path / "last.ckpt" if load and epochs == 2 else None)
        job.save_checkpoint(tmp_path / "last.ckpt")
    assert rates.rates == pytest.approx(EXPECTED[kind])


@pytest.mark.parametrize("kind", EXPECTED)
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "fresh"])
def test_fits_through_checkpoints(kind: str, keep: bool, tmp_path: Path) -> None:
    """A monthly job with fresh objects, or with the callback kept."""
    (rewarm, module), rates = case(kind), Rates()
    for epochs, loader in enumerate(toy_loaders(), start=1):
        if not keep:
            rewarm, module = case(kind)
        job = trainer(tmp_path, [rewarm, rates], max_epochs=epochs)
        job.fit(module, loader, loader, ckpt_path=None if epochs == 1 else tmp_path / "last.ckpt")
        job.save_checkpoint(tmp_path / "last.ckpt")
    assert rates.rates == pytest.approx(EXPECTED[kind])


def test_a_group_that_the_task_before_did_not_have_warms_up_from_zero(tmp_path: Path) -> None:
    """As a part of the network that is unfrozen for the second fit."""

    class Grown(Scheduled):
        groups = 1

        def configure_optimizers(self) -> Any:
            parts = [self.model[0], self.model[3]][: self.groups]
            optimizer = torch.optim.SGD([{"params": part.parameters()} for part in parts], lr=PEAK)
            return [optimizer], [{"scheduler": exponential(optimizer), "interval": "step"}]

    module, rewarm, rates = Grown(exponential), Rewarm(warmup=1), Rates()
    for module.groups, loader in zip((1, 2), toy_loaders(), strict=True):
        trainer(tmp_path, [rewarm, rates], max_epochs=1).fit(module, loader, loader)
    assert rates.rates[3:5] == pytest.approx([(0.0125 + 0.1) / 2, 0.05])


def samples(batches: int) -> DataLoader[Any]:
    """Batches of eight samples, at most three different ones."""
    data = next(iter(DataLoader(toy_loaders()[0].dataset, batch_size=8)))
    return DataLoader([(x, y) for _ in range(batches) for x, y in zip(*data[:2], strict=True)], batch_size=8)


@pytest.mark.parametrize("way", ["fresh", "same", "checkpoint", "mid-run checkpoint", "both"])
@pytest.mark.parametrize("second", [2, 3, 6])
def test_a_task_of_another_length_has_its_own_number_of_steps(way: str, second: int, tmp_path: Path) -> None:
    """Shorter or longer than the one before, which had two epochs of three batches."""
    callbacks = [Rewarm("linear", warmup=0, floor=0.0), Rates(), saver(tmp_path)]
    job = trainer(tmp_path, callbacks, max_epochs=2, limit_val_batches=0)
    job.fit(ToyModule(), samples(3), samples(1))
    rates, path = Rates(), None
    if way in ("checkpoint", "both"):
        path = tmp_path / "end.ckpt"
        job.save_checkpoint(path)
    elif way == "mid-run checkpoint":
        # of the last step, when its epoch was not over
        path = tmp_path / "step=6.ckpt"
    rewarm = callbacks[0] if way in ("fresh", "same") else Rewarm("linear", warmup=0, floor=0.0)
    callbacks = [rewarm, rates, saver(tmp_path / "second")]
    if way in ("same", "both"):
        kinds = (Rewarm, Rates, ModelCheckpoint)
        job.callbacks = [*callbacks, *[other for other in job.callbacks if not isinstance(other, kinds)]]
        job.fit_loop.max_epochs = 4
    else:
        job = trainer(tmp_path, callbacks, max_epochs=2 if way == "fresh" else 4, limit_val_batches=0)
    job.fit(ToyModule(), samples(second), samples(1), ckpt_path=path)
    # Lightning counts the batches of the saved epoch as some of the next one, where that is longer
    steps = 9 if way == "mid-run checkpoint" and second == 6 else 2 * second
    assert rates.rates == pytest.approx([PEAK * (1 - step / (steps - 1)) for step in range(steps)])


def test_a_limit_of_steps_ends_the_task_before_its_epochs(tmp_path: Path) -> None:
    """The one that comes first, also where it was raised."""
    rates, rewarm = Rates(), Rewarm("linear", warmup=0, floor=0.0)
    job = trainer(tmp_path, [rewarm, rates], max_epochs=9, max_steps=4, limit_val_batches=0)
    job.fit(ToyModule(), samples(3), samples(1))
    job.fit_loop.epoch_loop.max_steps = 9
    job.fit(ToyModule(), samples(6), samples(1))
    assert rates.rates == pytest.approx([PEAK * p for p in (1, 2 / 3, 1 / 3, 0, 1, 0.75, 0.5, 0.25, 0)])


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("step", [7, 9, 10])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_resume_in_a_longer_task(accumulated: int, step: int, tmp_path: Path) -> None:
    """Of the second fit, from the middle and the end of an epoch: the rest of its rates."""
    settings = {"limit_val_batches": 0, "accumulate_grad_batches": accumulated}
    job = trainer(tmp_path, [Rewarm("cosine", warmup=2)], max_epochs=2, **settings)
    job.fit(ToyModule(), samples(3 * accumulated), samples(1))
    job.save_checkpoint(tmp_path / "end.ckpt")
    found = []
    for folder, path in ((tmp_path, "end.ckpt"), (tmp_path / "resumed", f"step={step}.ckpt")):
        found.append(Rates())
        job = trainer(folder, [Rewarm("cosine", warmup=2), found[-1], saver(folder)], max_epochs=4, **settings)
        job.fit(ToyModule(), samples(4 * accumulated), samples(1), ckpt_path=tmp_path / path)
    assert len(found[0].rates) == 8
    assert found[1].rates == found[0].rates[step - 6 :]


class Unfreezing(Callback):
    """Gives the optimizer another group in the second epoch of a task."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            group = {"params": list(pl_module.model[0].parameters()), "lr": 0.01}
            trainer.optimizers[0].add_param_group(group)


class Head(Scheduled):
    """Trains its last layer."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.model[3].parameters(), lr=PEAK)
        config = {"scheduler": self.make(optimizer), "interval": "step"}
        return {"optimizer": optimizer} | ({"lr_scheduler": config} if config["scheduler"] else {})


@pytest.mark.parametrize("epoch", [1, 2])
@pytest.mark.parametrize("kind", ["own", "shape"])
def test_a_group_that_is_added_in_the_middle(kind: str, epoch: int, tmp_path: Path) -> None:
    """The others have the rates that they have without it; it keeps its own, or goes on with the module's schedule."""
    rewarm: Callable[[], Rewarm] = functools.partial(Rewarm, *(["linear"] if kind == "shape" else []), warmup=3)
    make: Any = exponential if kind == "own" else lambda _: None
    # three steps in an epoch, two epochs in a task: the second task begins with the third
    plain = rates_of(tmp_path, rewarm(), module=Head(make))
    found = rates_of(tmp_path, rewarm(), Unfreezing(epoch), module=Head(make))
    before = 3 * epoch
    assert found[:before] == plain[:before]
    assert found[before::2] == pytest.approx(plain[before:])
    own = [0.01 * 0.5 ** (step if kind == "own" else 0) for step in range(12 - before)]
    if kind == "own":
        # where a task begins, the schedule is set back before it would step
        own = own[:4] if epoch == 1 else own
    assert found[before + 1 :: 2][: len(own)] == pytest.approx(own)


def test_a_scheduler_is_stepped_as_without_the_callback(tmp_path: Path) -> None:
    """By keywords too."""

    class Own(Scheduled):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            assert isinstance(scheduler, RestartedScheduler)
            if metric is None:
                scheduler.step(epoch=None)
            else:
                scheduler.step(metrics=metric)

    module = Own(exponential, interval="step")
    for warmup in (0, 3):
        found = rates_of(tmp_path, Rewarm(warmup=warmup), module=module)
        assert found == rates_of(tmp_path, Rewarm(warmup=warmup), module=Scheduled(exponential, interval="step"))
    plateau = functools.partial(schedulers.ReduceLROnPlateau, factor=0.5, patience=0, mode="max")
    found, other = (
        rates_of(tmp_path, Rewarm(), module=kind(plateau, monitor="train_loss"), stream=toy_stream(epochs_per_task=4))
        for kind in (Own, Scheduled)
    )
    assert found == other
    assert min(found) < PEAK


def test_a_scheduler_can_be_asked_for_its_next_rate() -> None:
    """With the warning that torch has for it."""
    scheduler = RestartedScheduler(exponential(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=PEAK)))
    with pytest.warns(UserWarning, match="get_last_lr"):
        assert scheduler.get_lr() == [PEAK / 2]


# ---------------------------------------------------------------------- optimizers that begin anew


class Momenta(Callback):
    """Counts the parameters that the optimizer has moments of before each step."""

    def __init__(self) -> None:
        self.entries: list[int] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        self.entries.append(sum(any(value.any() for value in state.values()) for state in optimizer.state.values()))


@pytest.mark.parametrize("reset", [True, False])
def test_optimizers_begin_anew(reset: bool, tmp_path: Path) -> None:
    """In the second task's first step, where asked to; with a schedule of any kind."""
    for rewarm, module in (
        (Rewarm(reset_at_task=reset), Scheduled(cosine)),
        (Rewarm("cosine", reset_at_task=reset), None),
    ):
        momenta = Momenta()
        fit_stream(tmp_path, [rewarm, momenta], module=module)
        assert momenta.entries == [0, *[4] * 5, 0 if reset else 4, *[4] * 5]


def test_optimizers_begin_anew_without_any_schedule(tmp_path: Path) -> None:
    """The learning rate stays; a job that loads a checkpoint resets too, and the same job resumed does not."""
    momenta = Momenta()
    assert set(rates_of(tmp_path, Rewarm(reset_at_task=True), momenta)) == {PEAK}
    assert momenta.entries == [0, *[4] * 5, 0, *[4] * 5]
    for epochs, entries in ((1, [0, 4, 4]), (2, [0, 4, 4])):
        momenta, loader = Momenta(), toy_loaders()[epochs - 1]
        job = trainer(tmp_path, [Rewarm(reset_at_task=True), momenta], max_epochs=epochs)
        job.fit(ToyModule(), loader, loader, ckpt_path=None if epochs == 1 else tmp_path / "last.ckpt")
        job.save_checkpoint(tmp_path / "last.ckpt")
        assert momenta.entries == entries


def test_what_an_optimizer_brings_into_the_first_task_stays(tmp_path: Path) -> None:
    """As one with the state of a pre-training."""

    class Brought(ToyModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = super().configure_optimizers()
            optimizer.state.update({p: {"momentum_buffer": torch.ones_like(p)} for p in self.parameters()})
            return optimizer

    momenta = Momenta()
    fit_stream(tmp_path, [Rewarm(reset_at_task=True), momenta], module=Brought())
    assert momenta.entries == [*[4] * 6, 0, *[4] * 5]


def test_our_optimizers_reset_their_moments(tmp_path: Path) -> None:
    """They keep count of it."""

    class Spiky(ToyModule):
        def configure_optimizers(self) -> Any:
            return SPAM(self.parameters(), lr=1e-3)

    module = Spiky()
    fit_stream(tmp_path, [Rewarm("linear", reset_at_task=True)], module=module)
    state = module.optimizers().state[module.model[0].weight]
    assert (int(state["resets"]), int(state["step"])) == (1, 6)


# ---------------------------------------------------------------------- what is logged


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_learning_rate_monitor_logs_what_steps_are_taken_with(interval: str, tmp_path: Path) -> None:
    """Listed before and behind; for an epoch, its first step."""
    for callbacks in ([Rewarm(warmup=2), LearningRateMonitor()], [LearningRateMonitor(), Rewarm(warmup=2)]):
        monitor, rates = next(c for c in callbacks if isinstance(c, LearningRateMonitor)), Rates()
        settings = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 1}
        fit_stream(tmp_path, [*callbacks, rates], module=Scheduled(exponential, interval=interval), **settings)
        assert monitor.lrs["lr-SGD"] == rates.rates[:: 1 if interval == "step" else 3]


# ---------------------------------------------------------------------- resume


def saver(directory: Path) -> ModelCheckpoint:
    """A checkpoint at every step."""
    return ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'")
@pytest.mark.parametrize("name", ["exponential", "one cycle", "sequential"])
@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_resumed_run_ends_with_the_same_bits(name: str, interval: str, tmp_path: Path) -> None:
    """From steps of both tasks: in the schedule, at the boundary and in the warm-up."""

    def run(folder: Path, ckpt_path: Path | None = None) -> tuple[Tensor, list[float]]:
        module, rates = Scheduled(OWN[name], dropout=0.3, interval=interval), Rates("lr", "momentum")
        callbacks = [Rewarm(warmup=3, reset_at_task=True), rates, saver(folder)]
        return fit_stream(folder, callbacks, module=module, ckpt_path=ckpt_path), rates.rates

    end, rates = run(tmp_path)
    for step in (1, 5, 6, 7, 9):
        torch.manual_seed(step)
        resumed, rest = run(tmp_path / "resumed", tmp_path / f"step={step}.ckpt")
        assert torch.equal(resumed, end)
        assert rest == rates[2 * step :]


def test_a_checkpoint_without_the_state_is_refused(tmp_path: Path) -> None:
    """Of a run without the callback, or with one that has another kind of schedule."""
    module = functools.partial(Scheduled, cosine, interval="step")
    fit_stream(tmp_path / "plain", [saver(tmp_path / "plain")], module=module())
    with pytest.raises(ValueError, match="no state for Rewarm"):
        fit_stream(tmp_path, [Rewarm(), saver(tmp_path)], module=module(), ckpt_path=tmp_path / "plain" / "step=8.ckpt")
    fit_stream(tmp_path, [Rewarm(), saver(tmp_path)], module=module())
    with pytest.raises(ValueError, match=r"written with `Rewarm\(shape=None\)`"):
        fit_stream(tmp_path, [Rewarm("cosine"), saver(tmp_path)], ckpt_path=tmp_path / "step=8.ckpt")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_may_go_on_without_the_callback(tmp_path: Path) -> None:
    """The module's own schedule goes on where it was in the second task."""
    module = functools.partial(Scheduled, exponential, interval="step")
    rates = rates_of(tmp_path, Rewarm(), saver(tmp_path), module=module())
    found = rates_of(tmp_path, saver(tmp_path), module=module(), ckpt_path=tmp_path / "step=8.ckpt")
    assert found == rates[8:]


def test_survives_pickling_after_a_fit(tmp_path: Path) -> None:
    """With a schedule that does not; the next fit warms up from where it ended."""
    rewarm, rates, data = Rewarm(warmup=1), Rates(), toy_loaders()[1]
    fit_stream(tmp_path, [rewarm], module=Unpicklable(exponential))
    again = pickle.loads(pickle.dumps(rewarm))
    trainer(tmp_path, [again, rates], max_epochs=1).fit(Unpicklable(exponential), data, data)
    assert rates.rates == pytest.approx([(PEAK / 7 + PEAK) / 2, PEAK / 2, PEAK / 3])


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for all tests of this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def fit_on_this_rank(root: Path, strategy: str, step: int | None) -> tuple[Tensor, list[float]]:
    """Fit with half of each batch, from the beginning or from a step; return full weights and rates."""
    module, rates = Scheduled(exponential, dropout=0.3, interval="step"), Rates()
    callbacks = [Rewarm(warmup=3, reset_at_task=True), rates, saver(root / "resumed" if step else root)]
    strategies = {"ddp": "ddp", "fsdp2": FSDP2Strategy(wrap=["Linear"])}
    fit = trainer(root, callbacks, strategy=strategies[strategy], devices=2)
    fit.fit(module, datamodule=toy_stream(batch_size=4), ckpt_path=root / f"step={step}.ckpt" if step else None)
    full = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return torch.cat([p.detach().flatten() for p in full]), rates.rates


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks(strategy: str, two_ranks: Ranks, tmp_path: Path) -> None:
    """The rates of one process, and the same bits from a step in the second task's warm-up."""
    expected = rates_of(tmp_path, Rewarm(warmup=3), module=Scheduled(exponential, interval="step"))
    straight = two_ranks.run(fit_on_this_rank, tmp_path, strategy, None)
    resumed = two_ranks.run(fit_on_this_rank, tmp_path, strategy, 8)
    for (end, rates), (again, rest) in zip(straight, resumed, strict=True):
        assert rates == expected
        assert rest == expected[8:]
        assert torch.equal(again, end)


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": "step"}, "`shape` must be one of 'cosine', 'linear', 'constant', got 'step'"),
        ({"shape": "cosine", "warmup": 1.5}, "`warmup` must be a number of steps, or a fraction"),
        ({"shape": "cosine", "floor": 2.0}, "`floor` is a fraction of the learning rate from 0 to 1, got 2.0"),
        ({"warmup": 0.01}, "`warmup` must be a number of steps without `shape`.*got 0.01"),
        ({"warmup": -1}, "`warmup` must be a number of steps without `shape`.*got -1"),
        ({"floor": 0.0}, "`floor=0.0` belongs to a `shape`"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    """Where the callback is made."""
    with pytest.raises(ValueError, match=message):
        Rewarm(**settings)


class NotTorchs:
    """A scheduler of another library."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


class Custom(Scheduled):
    """Steps any scheduler."""

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Nothing to step."""


@pytest.mark.parametrize(
    ("rewarm", "module", "message"),
    [
        (Rewarm(), ToyModule(), "`ToyModule` returns no learning-rate schedule to restart"),
        (Rewarm(warmup=2, reset_at_task=True), ToyModule(), "`ToyModule` returns no learning-rate schedule to restart"),
        (
            Rewarm("cosine"),
            Scheduled(cosine),
            "so does the `CosineAnnealingLR` that `configure_optimizers` of `Scheduled`",
        ),
        (Rewarm(warmup=2), Scheduled(two), "`warmup=2` needs one schedule for each optimizer"),
        (Rewarm(), Custom(NotTorchs), "schedulers of torch, and `NotTorchs` is none"),
    ],
)
def test_schedules_that_are_refused(rewarm: Rewarm, module: LightningModule, message: str, tmp_path: Path) -> None:
    """Before the first step."""
    with pytest.raises(ValueError, match=message):
        fit_stream(tmp_path, [rewarm], module=module)


def test_runs_that_are_refused(tmp_path: Path) -> None:
    """Other things that make schedules, fits without an end, and optimizers that the module steps itself."""
    with pytest.raises(ValueError, match="`optimizer_policy='rebuild'` makes optimizers and schedules anew"):
        fit_stream(tmp_path, [Rewarm("cosine")], stream=toy_stream(optimizer_policy="rebuild"))
    hidden = toy_stream(scenario=Online(ClassIncremental(n_tasks=2)), epochs_per_task=1)
    with pytest.raises(ValueError, match="hides task boundaries"):
        fit_stream(tmp_path, [Rewarm("cosine")], stream=hidden)
    with pytest.raises(ValueError, match="set `max_epochs` or `max_steps`"):
        trainer(tmp_path, [Rewarm("constant", warmup=1)]).fit(ToyModule(), *toy_loaders())
    data = DataLoader(Manual.samples(4))
    with pytest.raises(ValueError, match=r"`Rewarm\(shape='cosine'\)` needs automatic optimization"):
        trainer(tmp_path, [Rewarm("cosine")], max_epochs=1).fit(Manual(), data, data)


class Replacing(Callback):
    """Puts a schedule of its own in the place of the first."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.lr_scheduler_configs[0].scheduler = schedulers.ConstantLR(trainer.optimizers[0], 1.0)


@pytest.mark.parametrize("kind", EXPECTED)
def test_a_schedule_that_is_taken_away(kind: str, tmp_path: Path) -> None:
    """By a callback that is known to, before the first step; by any other, where the task ends."""
    rewarm, module = case(kind)
    with pytest.raises(ValueError, match="`StochasticWeightAveraging` puts a schedule of its own in the place"):
        fit_stream(tmp_path, [rewarm, StochasticWeightAveraging(0.01)], module=module, max_epochs=4)
    rewarm, module = case(kind)
    with pytest.raises(ValueError, match="holds `ConstantLR` in the place of what `Rewarm` put there"):
        fit_stream(tmp_path, [rewarm, Replacing()], module=module)


def test_our_own_modules_that_know_tasks_are_refused(tmp_path: Path) -> None:
    """They re-warm by themselves."""
    language = pytest.importorskip("language", exc_type=ImportError)
    with pytest.raises(ValueError, match="has a schedule that knows tasks itself: leave `Rewarm` out"):
        fit_stream(tmp_path, [Rewarm()], module=language.llama(), stream=language.token_stream())
