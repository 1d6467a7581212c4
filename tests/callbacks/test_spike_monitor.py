"""Gradient spikes and loss spikes in runs of every kind."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from lightning_cl import ContinualCallback, ContinualMetrics, FSDP2Strategy, L2Anchor, SpikeAware, SpikeMonitor
from lightning_cl.cli.main import main
from lightning_cl.core.shards import gathered
from lightning_cl.core.state import local
from lightning_cl.core.update import OptimizerStep
from lightning_cl.functional import loss_deviation
from lightning_cl.metrics.record import read_records
from lightning_cl.optim import SPAM
from lightning_cl.optim.states import second_moment
from ranks import Ranks
from toys import ToyModule, fit_stream, toy_loaders, toy_stream, trainer, weights
from users import Images, Manual, loader

# so that none of the few losses of a toy task is a spike by chance
SETTINGS: dict[str, Any] = {"threshold": 1e7, "delay": 2, "every_n_steps": 1, "grace": 3, "deviations": 30.0}
PLANTED = {"model.0.weight": 3, "model.3.bias": 2}


class Adam(ToyModule):
    """With weight decay, and a choice of implementation."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(dropout=settings.pop("dropout", 0.0))
        self.settings = {"lr": 0.01, "weight_decay": 0.1} | settings

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), **self.settings)


class Spam(Adam):
    """The optimizer that clips by itself."""

    def configure_optimizers(self) -> Any:
        return SPAM(self.parameters(), **self.settings)


@contextmanager
def warned(pattern: str) -> Iterator[None]:
    """Expect a warning of the monitor; `pytest.warns` would let go of the filters for those of Lightning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message="`SpikeMonitor`")
        yield
    assert any(re.search(pattern, str(warning.message)) for warning in caught)


class Record(DummyLogger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:  # type: ignore[override]
        self.lines.append((step, metrics))

    def of(self, name: str) -> dict[int, float]:
        return {step: metrics[f"spikes/{name}"] for step, metrics in self.lines if f"spikes/{name}" in metrics}


class PlantGradients(Callback):
    """Sets some elements of gradients, of those that have a second moment, to 1e4 at a step."""

    def __init__(self, at: int, planted: dict[str, int]) -> None:
        self.at = at
        self.planted = planted
        self.largest = 0.0

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self.at:
            return
        for name, count in self.planted.items():
            parameter = dict(pl_module.named_parameters())[name]
            moment = second_moment(trainer.optimizers[0], parameter)
            assert moment is not None
            known = (moment.flatten() > 0).nonzero().flatten()[:count]
            assert len(known) == count
            local(parameter.grad).view(-1)[known] = 1e4
            self.largest = max(self.largest, float((1e8 / moment.flatten()[known]).max()))


class SpoilBatches(Callback):
    """Makes the inputs of some batches huge, or not a number."""

    def __init__(self, *at: int, factor: float = 1e4, rank: int | None = None) -> None:
        self.at = at
        self.factor = factor
        self.rank = rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1
        if done in self.at and self.rank in (None, trainer.global_rank):
            batch[0].mul_(self.factor)


def everything(fit: Trainer, module: LightningModule) -> dict[str, Any]:
    """Weights, buffers and the state of the optimizer."""
    return copy.deepcopy({**module.state_dict(), "optimizer": fit.optimizers[0].state_dict()["state"]})


class Watch(Callback):
    """Keeps everything as it was before each batch and after the last."""

    def __init__(self) -> None:
        self.before: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.before.append(everything(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before.append(everything(trainer, pl_module))


def assert_equal(found: Any, expected: Any) -> None:
    """Nested dicts and lists with the same bits."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_equal(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def differs(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether any weight or buffer does."""
    return any(not torch.equal(one[name], other[name]) for name in one if name != "optimizer")


def fit_adam(root: Path, *callbacks: Callback, module: LightningModule | None = None, **settings: Any) -> Any:
    """Fit one toy task of twelve steps."""
    module, data = module or Adam(), toy_loaders()[0]
    fit = trainer(root, callbacks, **({"max_epochs": 4} | settings))
    fit.fit(module, data, data)
    return module


# ---------------------------------------------------------------------- gradients


class Hide(ContinualCallback):
    """Takes all gradients away, where callbacks may change them."""

    def change_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        for parameter in step.parameters.values():
            parameter.grad.zero_()  # type: ignore[union-attr]


def test_counts_planted_spikes_by_layer(tmp_path: Path) -> None:
    """Before another callback, earlier in the list, takes them away."""
    plant, monitor, logger = PlantGradients(6, PLANTED), SpikeMonitor(**SETTINGS), Record()

    class HideThen(Hide):
        def change_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
            if trainer.global_step == 6:
                super().change_gradients(trainer, pl_module, step)

    fit_adam(tmp_path, HideThen(), plant, monitor, logger=logger)
    assert monitor.counts == {"model.0": 3, "model.3": 2}
    assert logger.of("gradient")[6] == 5
    assert {step for step, count in logger.of("gradient").items() if count} == {6}
    assert logger.of("gradient/model.0") == {6: 3}
    assert logger.of("gradient/model.3") == {6: 2}
    assert logger.of("largest_ratio")[6] == pytest.approx(plant.largest, rel=1e-5)
    # there is no second moment in the first step
    assert set(logger.of("gradient")) == set(range(1, 12))


@pytest.mark.parametrize(("at", "settings"), [(6, {"every_n_steps": 4}), (3, {"delay": 4})], ids=["between", "early"])
def test_spikes_that_do_not_count(at: int, settings: dict[str, Any], tmp_path: Path) -> None:
    """In a step that is not measured, and against a second moment of too few gradients; one step later they do."""
    monitor, logger = SpikeMonitor(**(SETTINGS | settings)), Record()
    fit_adam(tmp_path, PlantGradients(at, PLANTED), monitor, logger=logger)
    assert monitor.counts == {}
    every = settings.get("every_n_steps", 1)
    assert set(logger.of("gradient")) == set(range(every, 12, every))
    counted = SpikeMonitor(**(SETTINGS | settings))
    fit_adam(tmp_path, PlantGradients(8 if every == 4 else 4, PLANTED), counted)
    assert counted.counts == {"model.0": 3, "model.3": 2}


def test_gradients_of_micro_batches_are_counted_once(tmp_path: Path) -> None:
    """Their sum, in the optimizer step."""
    monitor = SpikeMonitor(**SETTINGS)
    # called after each of the two backward passes: the second one finds its elements taken, and takes them again
    fit_adam(tmp_path, PlantGradients(4, PLANTED), monitor, accumulate_grad_batches=2, max_epochs=6)
    assert monitor.counts == {"model.0": 3, "model.3": 2}
    assert monitor.state_dict()["steps"] == {0: 12}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_that_are_not_finite_are_spikes(value: float, count: int, tmp_path: Path) -> None:
    """Each is counted once, also where there is no second moment to compare with; the largest ratio is none."""

    class Break(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: ToyModule) -> None:
            if trainer.global_step == 6:
                moment = second_moment(trainer.optimizers[0], pl_module.model[0].weight)
                assert moment is not None
                moment[0, 0], moment[0, 1] = 0.0, 1.0
                trainer.optimizers[0].state[pl_module.model[0].weight]["exp_avg"][0, :count] = 0.0
                pl_module.model[0].weight.grad[0, :count] = value

    class Mend(ContinualCallback):
        def change_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
            for parameter in step.parameters.values():
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)  # type: ignore[union-attr]

    monitor, logger = SpikeMonitor(**SETTINGS), Record()
    fit_adam(tmp_path, Break(), Mend(), monitor, logger=logger)
    assert monitor.counts == {"model.0": count}
    assert logger.of("gradient")[6] == count
    assert 6 not in logger.of("largest_ratio")
    ratios = dict(zip(monitor.traces()[0].step, monitor.traces()[0].value, strict=True))
    assert ratios[6] is None
    assert monitor.traces()[0].marks == {"steps with spikes": [6]}


@pytest.mark.parametrize("clipping", ["callback", "optimizer"])
def test_counts_what_is_clipped(clipping: str, tmp_path: Path) -> None:
    """By `SpikeAware` over AdamW, and by SPAM; the callback counts only where it is asked to."""
    aware = SpikeAware(1e7, clip_delay=2, reset_interval=None)
    module = Adam() if clipping == "callback" else Spam(threshold=1e7, clip_delay=2, reset_interval=None)
    monitor, logger = SpikeMonitor(**(SETTINGS | {"every_n_steps": 3})), Record()
    callbacks = [aware] if clipping == "callback" else []
    fit_adam(tmp_path, PlantGradients(6, PLANTED), *callbacks, monitor, module=module, logger=logger)
    assert monitor.clipped == {"model.0": 3, "model.3": 2}
    assert logger.of("clipped") == {3: 0, 6: 5, 9: 0}
    assert not aware.count_clipped


def test_counting_what_is_clipped_ends_with_the_fit(tmp_path: Path) -> None:
    """Which takes passes over the gradients; also of a fit that fails."""
    aware = SpikeAware(clip_delay=2, reset_interval=None)
    fit_adam(tmp_path, aware, SpikeMonitor(**SETTINGS))
    assert not aware.count_clipped

    class Fail(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            assert aware.count_clipped
            raise KeyError("failed")

    with pytest.raises(KeyError, match="failed"):
        fit_adam(tmp_path, aware, SpikeMonitor(**SETTINGS), Fail())
    assert not aware.count_clipped


@pytest.mark.parametrize("settings", [{"clip_delay": 7}, {"reset_interval": 6}, {"threshold": math.inf}])
def test_spikes_that_spam_does_not_clip(settings: dict[str, Any], tmp_path: Path) -> None:
    """Before its delay is over, in a step that begins with a reset, and below its own threshold."""
    module = Spam(**({"threshold": 1e7, "clip_delay": 2, "reset_interval": None} | settings))
    monitor = SpikeMonitor(**SETTINGS)
    fit_adam(tmp_path, PlantGradients(6, PLANTED), monitor, module=module)
    assert monitor.counts == {"model.0": 3, "model.3": 2}
    assert monitor.clipped == {}


def test_an_optimizer_without_a_second_moment_is_told(tmp_path: Path) -> None:
    """Of SGD only the loss is watched."""
    monitor = SpikeMonitor(**SETTINGS)
    with warned("`SGD` does not keep"):
        fit_stream(tmp_path, [SpoilBatches(4, factor=math.nan), monitor])
    assert monitor.counts == {}
    assert [event["step"] for event in monitor.events][:1] == [4]


# ---------------------------------------------------------------------- losses


def test_logging_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A spike that is logged leaves the run as it is, with dropout; its entry says all about it."""
    monitor, logger, losses = SpikeMonitor(**SETTINGS), Record(), Losses()
    with caplog.at_level("INFO"):
        module = fit_adam(tmp_path, SpoilBatches(8), losses, monitor, module=Adam(dropout=0.3), logger=logger)
    torch.manual_seed(0)
    plain = fit_adam(tmp_path, SpoilBatches(8), module=Adam(dropout=0.3))
    torch.manual_seed(0)
    again = fit_adam(tmp_path, SpoilBatches(8), SpikeMonitor(), module=Adam(dropout=0.3))
    assert torch.equal(weights(again), weights(plain))
    deviation = loss_deviation(losses.seen[8], losses.seen[:8])
    expected = {"step": 8, "task": 0, "loss": losses.seen[8], "deviation": deviation, "action": "log", "length": 1}
    assert monitor.events == [expected]
    assert [logger.of("loss")[step] for step in (7, 8, 11)] == [0, 1, 1]
    assert "loss of optimizer step 8" in caplog.text
    del module


class KeepSnapshot(Callback):
    """Keeps the last snapshot that there was while steps were taken; behind the monitor."""

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        (monitor,) = [c for c in trainer.callbacks if isinstance(c, SpikeMonitor)]  # type: ignore[attr-defined]
        if snapshot := monitor.state_dict()["snapshot"]["kept"]:
            self.seen = snapshot


class Losses(Callback):
    """The loss of each optimizer step, the mean over its micro-batches."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self._parts: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        # Lightning has divided it already
        self._parts.append(float(outputs["loss"]) * trainer.accumulate_grad_batches)
        if len(self._parts) == trainer.accumulate_grad_batches or trainer.is_last_batch:
            self.seen.append(float(torch.tensor(self._parts).mean()))
            self._parts = []


@pytest.mark.parametrize("precision", ["32-true", "fp16"])
def test_the_loss_is_the_mean_over_micro_batches(precision: str, tmp_path: Path) -> None:
    """Of an epoch's last, incomplete step too, and without the scale of the loss under fp16."""
    settings: dict[str, Any] = {}
    if precision == "fp16":
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        settings["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    monitor, losses = SpikeMonitor(**SETTINGS), Losses()
    fit_adam(tmp_path, losses, monitor, accumulate_grad_batches=2, **settings)
    found = monitor.traces()[-1]
    assert found.step == list(range(8))
    assert found.value == pytest.approx(losses.seen, rel=1e-6)


def test_a_new_task_is_no_spike(tmp_path: Path) -> None:
    """Its first loss is far above those of the task before."""
    monitor, losses = SpikeMonitor(**(SETTINGS | {"deviations": 5.0})), Losses()
    fit_stream(tmp_path, [losses, monitor], module=Adam(lr=0.1), stream=toy_stream(epochs_per_task=4))
    assert loss_deviation(losses.seen[12], losses.seen[:12]) > 5.0
    assert monitor.events == []


def test_a_spike_that_goes_on_is_one_entry(tmp_path: Path) -> None:
    """A loss that is not finite is one also where nothing is judged yet; it spoils all that come after it."""
    monitor = SpikeMonitor(**SETTINGS)
    fit_adam(tmp_path, SpoilBatches(1, factor=math.nan), monitor)
    (event,) = monitor.events
    assert (event["step"], event["length"], event["deviation"]) == (1, 11, math.inf)
    assert math.isnan(event["loss"])
    assert monitor.traces()[-1].marks == {"spikes": [1]}


def test_losses_are_read_every_few_steps(tmp_path: Path) -> None:
    """To log them, the device is asked once for many; what is found is the same."""
    often, seldom = SpikeMonitor(**SETTINGS), SpikeMonitor(**(SETTINGS | {"every_n_steps": 5}))
    waiting: list[int] = []

    class Look(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            waiting.append(len(seldom._unread))

    fit_adam(tmp_path, SpoilBatches(8), often)
    fit_adam(tmp_path, SpoilBatches(8), seldom, Look())
    assert seldom.events == often.events
    assert [event["step"] for event in often.events] == [8]
    assert waiting == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert seldom.traces()[-1].step == [0, 5, 8, 10]


def test_a_loss_that_is_read_late_belongs_to_its_task(tmp_path: Path) -> None:
    """The last one of the first task, which its end reads, also on the way into the record that is written then."""
    monitor = SpikeMonitor(**(SETTINGS | {"every_n_steps": 7}))
    unread: list[int] = []

    class Look(ContinualCallback):
        def on_task_end(self, *_: Any) -> None:
            unread.append(len(monitor._unread))

    stream = toy_stream(epochs_per_task=4)
    fit_stream(tmp_path, [SpoilBatches(11), monitor, Look()], module=Adam(), stream=stream)
    assert [(event["step"], event["task"]) for event in monitor.events] == [(11, 0)]
    assert unread == [0, 0]


def test_a_loss_of_an_aborted_fit_belongs_to_its_task(tmp_path: Path) -> None:
    """Though it is read in the next one."""

    class Abort(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 9:
                raise KeyError("aborted")

    monitor = SpikeMonitor(**(SETTINGS | {"every_n_steps": 7}))
    with pytest.raises(KeyError, match="aborted"):
        fit_adam(tmp_path, SpoilBatches(8), monitor, Abort())
    assert monitor.events == []
    monitor.ended_tasks = {"learn": 3}
    fit_adam(tmp_path, monitor)
    assert [(event["step"], event["task"]) for event in monitor.events] == [(8, 0)]


# ---------------------------------------------------------------------- skipping

OPTIMIZERS = {
    "loop": lambda: Adam(foreach=False),
    "foreach": lambda: Adam(foreach=True),
    "fused": lambda: Adam(fused=True),
    "spam": lambda: Spam(density=0.5, reset_interval=3, clip_delay=2),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("factor", [1e4, math.nan])
def test_a_skipped_step_moves_nothing(make: Any, factor: float, tmp_path: Path) -> None:
    """Neither weights nor the optimizer's state, with weight decay, a penalty and Lightning's clipping."""
    monitor, watch, logger = SpikeMonitor(**SETTINGS, on_loss_spike="skip"), Watch(), Record()
    settings: dict[str, Any] = {"module": make(), "gradient_clip_val": 1.0, "logger": logger}
    with warned("the step is skipped"):
        module = fit_adam(tmp_path, watch, SpoilBatches(8, factor=factor), L2Anchor(1.0), monitor, **settings)
    assert_equal(watch.before[9], watch.before[8])
    assert all(differs(watch.before[step], watch.before[step + 1]) for step in range(12) if step != 8)
    assert weights(module).isfinite().all()
    assert [(event["step"], event["action"]) for event in monitor.events] == [(8, "skip")]
    assert [logger.of("actions")[step] for step in (7, 8, 9)] == [0, 1, 1]


def test_nothing_is_clipped_in_a_skipped_step(tmp_path: Path) -> None:
    """Its spikes are counted, but the optimizer never sees them."""
    monitor = SpikeMonitor(**SETTINGS, on_loss_spike="skip")
    module = Spam(threshold=1e7, clip_delay=2, reset_interval=None)
    with warned("the step is skipped"):
        fit_adam(tmp_path, SpoilBatches(8), PlantGradients(8, PLANTED), monitor, module=module)
    assert monitor.counts["model.3"] >= 2
    assert monitor.clipped == {}


def test_one_micro_batch_skips_the_whole_step(tmp_path: Path) -> None:
    """The gradient of the good one goes with it."""
    monitor, watch = SpikeMonitor(**SETTINGS, on_loss_spike="skip"), Watch()
    with warned("step 5 "):
        # of the micro-batches 0 1 | 2 of an epoch, the first of the sixth step
        fit_adam(tmp_path, watch, SpoilBatches(8, factor=math.nan), monitor, accumulate_grad_batches=2)
    assert [event["step"] for event in monitor.events] == [5]
    assert_equal(watch.before[9], watch.before[8])


def test_skips_under_a_gradient_scaler(tmp_path: Path) -> None:
    """Which has looked at the gradients before they are taken away."""
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))
    monitor, watch = SpikeMonitor(**SETTINGS, on_loss_spike="rollback", snapshot_every=5), Watch()
    with warned("snapshot of step 5"):
        fit_adam(tmp_path, watch, SpoilBatches(8, factor=math.nan), monitor, plugins=[plugin])
    assert_equal(watch.before[9], watch.before[5])
    assert differs(watch.before[9], watch.before[10])


def test_too_many_actions_are_an_error(tmp_path: Path) -> None:
    """Of one task; those of the next are counted anew."""
    monitor = SpikeMonitor(**SETTINGS, on_loss_spike="skip", max_actions=2)
    with (
        warned("2 of at most 2"),
        pytest.raises(RuntimeError, match=r"step 11 is .*, after 2 such steps of this task"),
    ):
        fit_adam(tmp_path, SpoilBatches(7, 9, 11), monitor)
    monitor = SpikeMonitor(**SETTINGS, on_loss_spike="skip", max_actions=2)
    with warned("1 of at most 2"):
        stream = toy_stream(epochs_per_task=4)
        fit_stream(tmp_path, [SpoilBatches(7, 9, 20), monitor], module=Adam(), stream=stream)
    assert [(event["step"], event["task"]) for event in monitor.events] == [(7, 0), (9, 0), (20, 1)]


# ---------------------------------------------------------------------- rolling back


class Normed(Adam):
    """Batch statistics, which a spoilt batch spoils, and a schedule of the learning rate."""

    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW, **settings: Any) -> None:
        super().__init__(**settings)
        self.optimizer = optimizer
        self.model = nn.Sequential(self.model[0], nn.BatchNorm1d(8), *self.model[1:])

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters(), **self.settings)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


NORMED = {
    "loop": lambda: Normed(),
    "fused": lambda: Normed(fused=True),
    "spam": lambda: Normed(SPAM, density=0.5, reset_interval=3, clip_delay=2),
    "sgd": lambda: Normed(torch.optim.SGD, momentum=0.9),
}


@pytest.mark.parametrize("make", NORMED.values(), ids=NORMED)
@pytest.mark.filterwarnings("ignore:`SpikeMonitor` compares")
def test_a_rollback_returns_to_the_snapshot(make: Any, tmp_path: Path) -> None:
    """To its weights, buffers and optimizer state, twice; the learning rate goes on."""
    # buffers are those after the forward that showed the loss to be normal
    taken: list[dict[str, Any]] = []

    class Taken(ContinualCallback):
        def observe_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
            if trainer.global_step == 5:
                taken.append(everything(trainer, pl_module))

    module, watch = make(), Watch()
    monitor = SpikeMonitor(**SETTINGS, on_loss_spike="rollback", snapshot_every=5)
    # batch normalisation hides the size of inputs
    spoil = SpoilBatches(7, 9, factor=math.nan)
    with warned("the step is skipped and the fit returns to its snapshot of step 5"):
        fit_adam(tmp_path, watch, spoil, Taken(), monitor, module=module)
    assert_equal(watch.before[8], taken[0])
    assert_equal(watch.before[10], taken[0])
    assert differs(watch.before[8], watch.before[7])
    assert differs(watch.before[8], watch.before[9])
    assert [(event["step"], event["snapshot"]) for event in monitor.events] == [(7, 5), (9, 5)]
    rate = module.optimizers().param_groups[0]["lr"] if module._trainer else None
    assert rate is None or rate == pytest.approx(0.01 * 0.9**12)


def test_a_snapshot_is_not_taken_of_a_spike(tmp_path: Path) -> None:
    """The step that it is due in is one: the one before it stays, and the next normal step takes it."""
    monitor, watch = SpikeMonitor(**SETTINGS, on_loss_spike="rollback", snapshot_every=4), Watch()
    with warned("snapshot of step"):
        fit_adam(tmp_path, watch, SpoilBatches(8, 10), monitor)
    assert [event["snapshot"] for event in monitor.events] == [4, 9]
    assert_equal(watch.before[9], watch.before[4])


def test_without_a_snapshot_of_the_task_it_skips(tmp_path: Path) -> None:
    """To return to the weights of another task would undo its end."""
    monitor, watch = SpikeMonitor(**SETTINGS, on_loss_spike="rollback"), Watch()
    stream = toy_stream(epochs_per_task=4)
    with warned(r"step 12 .* the step is skipped \(1 of"):
        fit_stream(tmp_path, [watch, SpoilBatches(12, factor=math.nan), monitor], module=Adam(), stream=stream)
    assert [(event["action"], "snapshot" in event) for event in monitor.events] == [("skip", False)]
    assert_equal(watch.before[13], watch.before[12])


def test_a_snapshot_keeps_its_bits_after_a_rollback(tmp_path: Path) -> None:
    """The optimizer goes on with copies of it."""
    monitor = SpikeMonitor(**SETTINGS, on_loss_spike="rollback", snapshot_every=5)
    states: list[Any] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            states.append(copy.deepcopy(monitor.state_dict()["snapshot"]["kept"]))

    with warned("snapshot of step 5"):
        fit_adam(tmp_path, SpoilBatches(6), monitor, Look())
    assert_equal(states[8], states[5])


class NestedState(torch.optim.AdamW):
    """Keeps what it knows of a parameter in containers, as 8-bit optimizers do, and something of its own beside."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                nested = state.setdefault("nested", {"moments": [torch.zeros_like(parameter)], "seen": [0]})
                nested["moments"][0].add_(state["exp_avg"])
                nested["seen"][0] += 1
        self.state.setdefault("all", {"steps": torch.zeros(())})["steps"] += 1  # type: ignore[call-overload]
        return loss


class Nested(Adam):
    """Is trained with it."""

    def configure_optimizers(self) -> Any:
        return NestedState(self.parameters(), **self.settings)


def test_a_rollback_returns_nested_state(tmp_path: Path) -> None:
    """To copies that no later step went on with, also where a snapshot is written over, and out of a checkpoint."""

    def run(directory: str, ckpt_path: Path | None = None) -> tuple[Watch, SpikeMonitor]:
        watch, monitor = Watch(), SpikeMonitor(**SETTINGS, on_loss_spike="rollback", snapshot_every=3)
        callbacks = [watch, SpoilBatches(8, 10), monitor, saver(tmp_path / directory)]
        with warned("snapshot of step 6"):
            stream = toy_stream(epochs_per_task=4)
            trainer(tmp_path, callbacks).fit(Nested(), datamodule=stream, ckpt_path=ckpt_path, weights_only=True)
        return watch, monitor

    watch, monitor = run("straight")
    assert [event["snapshot"] for event in monitor.events] == [6, 9]
    assert_equal(watch.before[9], watch.before[6])
    assert_equal(watch.before[11], watch.before[9])
    assert watch.before[6]["optimizer"]["all"] == {"steps": torch.tensor(6.0)}
    assert watch.before[6]["optimizer"][0]["nested"]["seen"] == [6]
    resumed, again = run("resumed", tmp_path / "straight" / "step=7.ckpt")
    assert [event["snapshot"] for event in again.events] == [6, 9]
    assert_equal(resumed.before[-1], watch.before[-1])


def test_no_snapshot_outlives_its_task(tmp_path: Path) -> None:
    """The next fit may train other parameters, and checkpoints at a task's end are small."""
    watch, monitor = Watch(), SpikeMonitor(**SETTINGS, on_loss_spike="rollback", snapshot_every=2)
    fit, module = trainer(tmp_path, [watch, SpoilBatches(5), monitor], max_epochs=2), Adam()
    first, second = toy_loaders()
    with warned("snapshot of step 4"):
        # its last step is rolled back all the same
        fit.fit(module, first, first)
    assert_equal(watch.before[-1], watch.before[4])
    fit.save_checkpoint(tmp_path / "first.ckpt")
    assert monitor.state_dict()["snapshot"] == {"step": None, "kept": {}}
    frozen = Adam()
    frozen.model[0].requires_grad_(False)
    fit = trainer(tmp_path, [SpikeMonitor(**SETTINGS, on_loss_spike="rollback")], max_epochs=3)
    fit.fit(frozen, second, second, ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    assert torch.equal(frozen.model[0].weight, module.model[0].weight)
    assert not torch.equal(frozen.model[3].weight, module.model[3].weight)


# ---------------------------------------------------------------------- resume


def saver(directory: Path) -> ModelCheckpoint:
    """A checkpoint at every step."""
    return ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.parametrize("action", ["log", "skip", "rollback"])
@pytest.mark.parametrize("step", [7, 19], ids=["before the spike", "in the second task"])
@pytest.mark.filterwarnings("ignore:.*the step is skipped")
def test_resumes_to_the_same_bits(action: Any, step: int, tmp_path: Path) -> None:
    """Between a snapshot and the spike that needs it, losses waiting to be read; spikes in both tasks."""

    def run(directory: str, ckpt_path: Path | None = None) -> tuple[Tensor, SpikeMonitor]:
        settings = SETTINGS | {"every_n_steps": 5, "snapshot_every": 3}
        monitor, module = SpikeMonitor(**settings, on_loss_spike=action), Adam(dropout=0.3)
        fit = trainer(tmp_path, [SpoilBatches(8, 20), monitor, saver(tmp_path / directory)])
        fit.fit(module, datamodule=toy_stream(epochs_per_task=4), ckpt_path=ckpt_path, weights_only=True)
        return weights(module), monitor

    straight, through = run("straight")
    torch.manual_seed(999)
    resumed, again = run("resumed", tmp_path / "straight" / f"step={step}.ckpt")
    assert torch.equal(resumed, straight)
    assert_equal(gathered(again.state_dict()), gathered(through.state_dict()))
    assert [(event["step"], event["action"]) for event in again.events] == [(8, action), (20, action)]


def test_a_run_may_be_watched_from_a_checkpoint_on(tmp_path: Path) -> None:
    """One that was not watched before."""
    fit_stream(tmp_path, [saver(tmp_path)], module=Adam(), stream=toy_stream(epochs_per_task=4))
    monitor = SpikeMonitor(**SETTINGS, on_loss_spike="skip")
    with warned("the step is skipped"):
        callbacks = [SpoilBatches(20), monitor, saver(tmp_path / "watched")]
        stream, path = toy_stream(epochs_per_task=4), tmp_path / "step=8.ckpt"
        fit_stream(tmp_path, callbacks, module=Adam(), stream=stream, ckpt_path=path)
    assert [(event["step"], event["task"]) for event in monitor.events] == [(20, 1)]
    assert monitor.traces()[-1].step == list(range(8, 24))
    again = SpikeMonitor(**SETTINGS, on_loss_spike="skip")
    stream, path = toy_stream(epochs_per_task=4), tmp_path / "watched" / "step=21.ckpt"
    fit_stream(tmp_path, [again, saver(tmp_path / "again")], module=Adam(), stream=stream, ckpt_path=path)
    assert again.traces()[-1].step == list(range(8, 24))


def test_a_snapshot_of_another_model_is_refused(tmp_path: Path) -> None:
    """Even where Lightning lets the model's own weights pass."""
    monitor = SpikeMonitor(**SETTINGS, on_loss_spike="rollback")
    fit_stream(tmp_path, [monitor, saver(tmp_path)], module=Adam())
    wider = Adam()
    wider.model.append(nn.Linear(4, 4))
    wider.model[0].weight.requires_grad_(False)
    wider.strict_loading = False
    path = tmp_path / "step=8.ckpt"
    fit = trainer(tmp_path, [SpikeMonitor(**SETTINGS, on_loss_spike="rollback"), saver(tmp_path / "other")])
    with pytest.raises(ValueError, match=r"snapshot of `SpikeMonitor` has 'model.0.weight' of shape \(8, 6\)"):
        # the optimizer's state is that of the checkpoint's parameters
        fit.fit(_WithoutOptimizerState(wider), datamodule=toy_stream(), ckpt_path=path)


class _WithoutOptimizerState(Adam):
    """Takes another module's layers; its checkpoints are read without the optimizer."""

    def __init__(self, other: Adam) -> None:
        super().__init__()
        self.model = other.model
        self.strict_loading = False

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["optimizer_states"] = []


# ---------------------------------------------------------------------- two ranks


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for the tests of this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def fit_on_this_rank(root: Path, strategy: str, action: Any, saved: str = "", ckpt_path: Path | None = None) -> Any:
    """Fit the toy stream, a batch of the second rank spoilt and gradients planted; return what both must agree on."""
    warnings.filterwarnings("ignore", message="`SpikeMonitor`")
    module, settings = Adam(), SETTINGS | {"every_n_steps": 5, "snapshot_every": 3}
    monitor = SpikeMonitor(**settings, on_loss_spike=action)
    watch = [] if action == "log" else [Shards()]
    plan = "ddp" if strategy == "ddp" else FSDP2Strategy(wrap=["Linear"])
    callbacks = [*watch, SpoilBatches(7, 9, 21, rank=1, factor=-1e5), PlantOnShards(), monitor]
    if saved:
        callbacks.append(ModelCheckpoint(root / saved, filename="{step}", every_n_train_steps=19))
    fit = trainer(root, callbacks, strategy=plan, devices=2)
    fit.fit(module, datamodule=toy_stream(batch_size=4, epochs_per_task=4), ckpt_path=ckpt_path)
    full = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    before = watch[0].before if watch else []
    clean = pickle.loads(pickle.dumps(monitor.events))
    return torch.cat([p.detach().flatten() for p in full]), clean, monitor.counts, before, monitor.traces()


class Shards(Callback):
    """The local weights and moments before each step."""

    def __init__(self) -> None:
        self.before: list[list[Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        state = trainer.optimizers[0].state
        tensors = [p for p in pl_module.parameters()]
        tensors += [value for p in tensors for key, value in sorted(state.get(p, {}).items())]
        self.before.append([local(t.detach()).clone() for t in tensors])


class PlantOnShards(Callback):
    """One spike in the first row of each rank's share of a weight, or in two rows of the whole."""

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != 5:
            return
        weight = pl_module.model[3].weight
        moment = second_moment(trainer.optimizers[0], weight)
        assert moment is not None
        rows = range(0, 4, 2) if not isinstance(weight, DTensor) else [0]
        for row in rows:
            column = int((moment[row] > 0).nonzero()[0])
            local(weight.grad)[row, column] = 1e4


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_one_ranks_spike_acts_on_both(strategy: str, action: str, two_ranks: Ranks, tmp_path: Path) -> None:
    """Both leave the step out, or return; gradient spikes are counted over the shards."""
    first, second = two_ranks.run(fit_on_this_rank, tmp_path, strategy, action)
    assert torch.equal(first[0], second[0])
    assert [(event["step"], event["action"]) for event in first[1]] == [(7, action), (9, action), (21, action)]
    assert first[1] == second[1]
    assert first[2] == second[2] == {"model.3": 2}
    assert first[4] == second[4]
    assert first[4][0].marks == {"steps with spikes": [5]}
    for before in (first[3], second[3]):
        # twice to the same snapshot, a step that moves in between
        same, other = (9, 8) if action == "skip" else (6, 9)
        assert all(torch.equal(a, b) for a, b in zip(before[same], before[10], strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(before[other], before[10], strict=True))


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_resume_to_the_same_bits(strategy: str, two_ranks: Ranks, tmp_path: Path) -> None:
    """Between a snapshot and the spike that needs it, which is cut to its shards again."""
    straight = two_ranks.run(fit_on_this_rank, tmp_path, strategy, "rollback", "straight")
    path = tmp_path / "straight" / "step=19.ckpt"
    resumed = two_ranks.run(fit_on_this_rank, tmp_path, strategy, "rollback", "resumed", path)
    for one, other in zip(straight, resumed, strict=True):
        assert torch.equal(one[0], other[0])
        assert one[1] == other[1]
        assert [event["snapshot"] for event in other[1]] == [6, 6, 18]


# ---------------------------------------------------------------------- what it goes along with


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_acting_under_manual_optimization_is_refused(action: Any, tmp_path: Path) -> None:
    """Such a module steps before its loss can be judged."""
    data = loader(Manual)
    with pytest.raises(ValueError, match=rf"on_loss_spike='{action}'\)` needs automatic optimization.*'log'"):
        trainer(tmp_path, [SpikeMonitor(on_loss_spike=action)], max_epochs=1).fit(Manual(), data, data)


class ManualAdam(Manual):
    """Two optimizers, each of which steps once for each batch."""

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(part.parameters(), lr=0.01) for part in (self.body, self.head)]


def test_several_optimizers_under_manual_optimization(tmp_path: Path) -> None:
    """Each is measured in its own steps; the loss belongs to the first that steps after its backward."""

    class Plant(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: ManualAdam) -> None:
            if trainer.global_step == 8:
                pl_module.body.weight.grad[0, :2] = 1e5
                pl_module.head.bias.grad[0] = 1e5

    data, logger = loader(Manual), Record()
    monitor = SpikeMonitor(**(SETTINGS | {"every_n_steps": 2}))
    spoil = SpoilBatches(10, factor=math.nan)
    trainer(tmp_path, [Plant(), spoil, monitor], max_epochs=4, logger=logger).fit(ManualAdam(), data, data)
    # of the step of each, the logger knows it by the number of steps before it
    assert [logger.of(f"gradient/{layer}")[step] for layer, step in (("body", 8), ("head", 9))] == [2, 1]
    assert max(step for step in logger.of("gradient/body") if step < 20) == 8
    assert monitor.state_dict()["steps"] == {0: 12, 1: 12}
    assert list(monitor.state_dict()["windows"]) == [0]
    assert [(event["step"], event["action"]) for event in monitor.events] == [(20, "log"), (22, "log")]


def test_each_optimizer_has_a_curve_of_its_losses(tmp_path: Path) -> None:
    """With those of its own steps that are measured, and its own spikes."""

    class TwoLosses(ManualAdam):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            for factor, optimizer in zip((1.0, 100.0), self.optimizers(), strict=True):
                optimizer.zero_grad()
                # that of the head is spoilt in its tenth step, the twentieth of all
                broken = math.nan if (factor, self.trainer.global_step) == (100.0, 19) else 1.0
                self.manual_backward(factor * broken * self.loss(batch))
                optimizer.step()

    data = loader(Manual)
    for every, first in ((1, [0, 2, 4, 6]), (2, [0, 4, 8, 12]), (3, [0, 6, 12, 18])):
        monitor = SpikeMonitor(**(SETTINGS | {"every_n_steps": every}))
        trainer(tmp_path, [monitor], max_epochs=4).fit(TwoLosses(), data, data)
        body, head = monitor.traces()[1:]
        assert (body.name, head.name) == ("loss spikes, optimizer 0", "loss spikes, optimizer 1")
        assert body.step[:4] == first
        assert head.step[:4] == [step + 1 for step in first]
        assert max(value for value in body.value[:4] if value) < 10 < min(value for value in head.value[:4] if value)
        assert head.marks["spikes"][0] == 19
        assert 19 in head.step
        assert not any(step % 2 for step in body.marks.get("spikes", []))


def test_images_with_frozen_parameters(tmp_path: Path) -> None:
    """Of what is frozen nothing is counted, kept or moved; half precision is counted as well."""

    class Frozen(Images):
        def configure_optimizers(self) -> Any:
            self.body[0].weight.requires_grad_(False)
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    data, module = loader(Frozen), Frozen()
    monitor, keep = SpikeMonitor(**SETTINGS, on_loss_spike="rollback"), KeepSnapshot()
    trainer(tmp_path, [monitor, keep], max_epochs=3, precision="bf16-mixed").fit(module, data, data)
    kept = keep.seen
    assert "body.0.weight" not in kept["weights"]
    assert "body.1.running_mean" in kept["buffers"]
    assert len(monitor.traces()[0].step) == 8


def test_hidden_boundaries(tmp_path: Path) -> None:
    """Who only watches is told of them; who acts learns nothing from them."""
    from lightning_cl.datamodules import ClassIncremental

    class Hidden(ClassIncremental):
        hides_boundaries = True

    for action in ("log", "skip"):
        monitor = SpikeMonitor(**SETTINGS, on_loss_spike=action)  # type: ignore[arg-type]
        stream = toy_stream(scenario=Hidden(n_tasks=2), epochs_per_task=3)
        fit_stream(tmp_path, [monitor], module=Adam(), stream=stream)
        assert len(monitor.state_dict()["windows"][0]) == (9 if action == "log" else 18)


def test_footprint_and_pickling(tmp_path: Path) -> None:
    """Weights and two moments on the host, where there is a snapshot; it goes to another process after a fit."""
    monitor, keep = SpikeMonitor(**SETTINGS, on_loss_spike="rollback", snapshot_every=5), KeepSnapshot()
    module = fit_adam(tmp_path, monitor, keep)
    fit = trainer(tmp_path)
    assert monitor.footprint(fit, module, None).host == 3 * 4 * len(weights(module))
    assert SpikeMonitor().footprint(fit, module, None).host == 0
    tensors = [leaf for leaf in tree_leaves(keep.seen) if isinstance(leaf, Tensor)]
    counters = 4 * len(list(module.parameters()))
    assert sum(tensor.nbytes for tensor in tensors) == 3 * 4 * len(weights(module)) + counters
    assert_equal(gathered(pickle.loads(pickle.dumps(monitor)).state_dict()), gathered(monitor.state_dict()))


def test_the_record_has_its_curves(tmp_path: Path) -> None:
    """From the command line, into the record that reports are made of."""
    (tmp_path / "run.yaml").write_text(
        f"""
trainer:
  accelerator: cpu
  max_steps: 30
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: SpikeMonitor
      init_args: {{threshold: 1000, every_n_steps: 2, on_loss_spike: rollback, max_actions: 3, deviations: 100}}
    - class_path: ContinualMetrics
      init_args: {{directory: {tmp_path}}}
model:
  class_path: Classifier
  init_args:
    optimizer: adamw
    network:
      class_path: MLP
      init_args: {{num_inputs: 64, num_outputs: 10, hidden: [16]}}
data:
  class_path: TaskStreamDataModule
  init_args:
    train: {{class_path: DigitsSource, init_args: {{split: train}}}}
    val: {{class_path: DigitsSource, init_args: {{split: val}}}}
    scenario: {{class_path: ClassIncremental, init_args: {{n_tasks: 5}}}}
"""
    )
    main(["fit", "--config", str(tmp_path / "run.yaml")])
    (record,) = read_records([tmp_path])
    assert record.method == "finetune"
    gradients, losses = record.traces
    assert (gradients.name, losses.name) == ("gradient spikes", "loss spikes")
    assert gradients.level == 1000
    assert losses.step[:3] == [0, 2, 4]
    assert None not in losses.value


def test_a_threshold_that_counts_nothing_is_recorded(tmp_path: Path) -> None:
    """As a curve with no level: JSON knows no infinity."""
    callbacks = [SpikeMonitor(**(SETTINGS | {"threshold": math.inf})), ContinualMetrics(directory=tmp_path)]
    fit_stream(tmp_path, callbacks, module=Adam())
    (record,) = read_records([tmp_path])
    assert [trace.level for trace in record.traces] == [None, None]


def test_without_a_monitor_there_are_no_curves(tmp_path: Path) -> None:
    """And a monitor that saw nothing has none."""
    fit_stream(tmp_path, [ContinualMetrics(directory=tmp_path)])
    (record,) = read_records([tmp_path])
    assert record.traces == []
    assert SpikeMonitor().traces() == []


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"threshold": 0}, "threshold"),
        ({"deviations": -1.0}, "deviations"),
        ({"delay": 0}, "delay"),
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"window": 0}, "window"),
        ({"grace": 1.5}, "grace"),
        ({"grace": 101}, "grace=101.*window=100"),
        ({"max_actions": 0}, "max_actions"),
        ({"snapshot_every": 0}, "snapshot_every"),
        ({"on_loss_spike": "stop"}, "on_loss_spike"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], named: str) -> None:
    """Each by its name."""
    with pytest.raises(ValueError, match=named):
        SpikeMonitor(**settings)
