"""The learning rate of requests: a multiple of that of learning, and gone behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

from lightning_cl.core.requests import ForgetRequest
from lightning_cl.datamodules import UnlearningDataModule
from lightning_cl.unlearning import GradientAscent, TaskVectorNegation, Unlearn
from toys import ToyModule, toy_data, toy_stream, trainer, weights

ROWS = ForgetRequest("rows", rows=[0, 1, 4, 5], after=1)


def ascent(factor: float) -> Unlearn:
    """A request of a few steps."""
    return Unlearn(GradientAscent(), learning_rate_factor=factor)


@pytest.mark.parametrize("make", [ascent, lambda factor: TaskVectorNegation(learning_rate_factor=factor)])
@pytest.mark.parametrize("optimizer", [SGD, Adam, lambda p, lr: Adam(p, lr=torch.tensor(lr), capturable=False)])
def test_a_request_alone_is_one_of_a_smaller_rate(make: Any, optimizer: Any, tmp_path: Path) -> None:
    """To the bit, whatever the optimizer keeps its rate in, which it has again at the end."""

    def forget(factor: float, rate: float) -> tuple[Tensor, float]:
        data = UnlearningDataModule(toy_data(), requests=[ROWS], batch_size=2, epochs_per_request=2)
        module = ToyModule(learning_rate=rate, optimizer=optimizer)
        fit = trainer(tmp_path / f"{factor}", [make(factor)])
        fit.fit(module, datamodule=data)
        return weights(module), float(fit.optimizers[0].param_groups[0]["lr"])

    scaled, rate = forget(0.25, 0.1)
    assert rate == pytest.approx(0.1)
    assert torch.equal(scaled, forget(1.0, 0.025)[0])
    assert not torch.allclose(scaled, forget(0.5, 0.1)[0])


class Rates(Callback):
    """The rate that each step was made with."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        (optimizer,) = trainer.optimizers
        optimizer.register_step_post_hook(lambda *_: self.seen.append(optimizer.param_groups[0]["lr"]))


class Scheduled(ToyModule):
    """Halves its rate every four steps."""

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": StepLR(optimizer, 4, 0.5), "interval": "step"}]


def learn(root: Path, unlearn: Unlearn, *callbacks: Callback, **settings: Any) -> Tensor:
    """Learn, forget in two epochs of two steps, learn."""
    stream = toy_stream(requests=[ROWS], epochs_per_request=2, batch_size=2, epochs_per_task=1)
    module = Scheduled()
    ckpt_path = settings.pop("ckpt_path", None)
    trainer(root, [unlearn, *callbacks], **settings).fit(module, datamodule=stream, ckpt_path=ckpt_path)
    return weights(module)


def test_schedules_go_on_by_themselves(tmp_path: Path) -> None:
    """In a request its steps have a tenth of what the schedule says, before and behind it all of it."""
    rates = Rates()
    learn(tmp_path, ascent(0.1), rates)
    assert len(rates.seen) == 12 + 4 + 12
    expected = [0.1 * 0.5 ** (step // 4) * (0.1 if 12 <= step < 16 else 1.0) for step in range(28)]
    assert rates.seen == pytest.approx(expected)


def test_resumes_inside_a_request(tmp_path: Path) -> None:
    """With the smaller rate, to the same bits."""
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    expected = learn(tmp_path / "a", ascent(0.1), saver)
    for step in (13, 15):
        again = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        found = learn(tmp_path / f"b{step}", ascent(0.1), again, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert torch.equal(found, expected)


def test_a_request_that_breaks_off_leaves_the_rate(tmp_path: Path) -> None:
    """Also in the middle of a step."""
    fits: list[Trainer] = []

    class Breaks(Callback):
        def on_train_start(self, trainer: Trainer, *_: Any) -> None:
            fits.append(trainer)

        def on_after_backward(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 13:
                raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        learn(tmp_path, ascent(0.1), Breaks())
    (optimizer,) = fits[0].optimizers
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)
    assert not optimizer._optimizer_step_pre_hooks


class CallsBase(SGD):
    """Its step calls that of its base class, so that torch runs the hooks of a step around both."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_a_step_that_calls_that_of_its_base_class(tmp_path: Path) -> None:
    """Is scaled once, and the rate comes back."""
    data = UnlearningDataModule(toy_data(), requests=[ROWS], batch_size=2, epochs_per_request=2)
    found = []
    # torch hooks the step of a class when the first of its optimizers is made
    for optimizer in (SGD, CallsBase):
        module = ToyModule(learning_rate=0.1, optimizer=optimizer)
        fit = trainer(tmp_path / optimizer.__name__, [ascent(0.25)])
        fit.fit(module, datamodule=data)
        found.append(weights(module))
        assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1)
    assert torch.equal(*found)


def test_a_checkpoint_inside_a_step_holds_the_rate_of_the_schedule(tmp_path: Path) -> None:
    """As one that a signal of the cluster asks for: a resumed run would scale it a second time."""
    saved = []

    class Saves(Callback):
        def on_after_backward(self, trainer: Trainer, *_: Any) -> None:
            saved.append(trainer.optimizers[0].state_dict()["param_groups"][0]["lr"])

    learn(tmp_path, ascent(0.1), Saves())
    assert saved == pytest.approx([0.1 * 0.5 ** (step // 4) for step in range(28)])


def test_a_factor_of_nothing_is_refused() -> None:
    """It would forget nothing."""
    with pytest.raises(ValueError, match=r"`learning_rate_factor` must be above 0, got 0"):
        ascent(0.0)


def test_the_ledger_says_it(tmp_path: Path) -> None:
    """As a setting."""
    unlearn = ascent(0.5)
    learn(tmp_path, unlearn)
    assert unlearn.ledger.records[0].settings["learning_rate_factor"] == 0.5
