"""What happens to the optimizers where a task starts."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback

from lightning_cl import ContinualCallback
from lightning_cl.optim import SPAM
from toys import ToyModule, fit_stream, toy_stream, trainer


class Inspector(ContinualCallback):
    """Looks at the optimizer in the first step of each task."""

    needs_state = False

    def __init__(self):
        self.optimizers, self.momenta, self.rates = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in (0, 6):
            (optimizer,) = trainer.optimizers
            self.optimizers.append(optimizer)
            states = optimizer.state.values()
            self.momenta.append(sum(bool(state["momentum_buffer"].any()) for state in states))
            self.rates.append(optimizer.param_groups[0]["lr"])


class Decaying(ToyModule):
    """Halves its learning rate after every epoch."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)]


@pytest.mark.parametrize(
    ("policy", "momenta", "rates", "same"),
    [
        ("keep", [0, 4], [0.1, 0.025], True),
        ("reset_state", [0, 0], [0.1, 0.025], True),
        ("rebuild", [0, 0], [0.1, 0.1], False),
    ],
)
def test_optimizer_policies(policy, momenta, rates, same, tmp_path):
    """Momenta of four parameters, the learning rate after two epochs, and whether it is the same object."""
    inspector = Inspector()
    fit_stream(tmp_path, [inspector], module=Decaying(), stream=toy_stream(optimizer_policy=policy))
    assert inspector.momenta == momenta
    assert inspector.rates == pytest.approx(rates)
    assert (inspector.optimizers[0] is inspector.optimizers[1]) is same


def test_a_rebuilt_schedule_goes_on_in_the_second_task(tmp_path):
    """The new schedule is the one that steps: 0.1, then 0.05 in the task's second epoch."""
    rates = []

    class Rates(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

        def on_train_batch_end(self, trainer, *_):
            rates[-1] = trainer.optimizers[0].param_groups[0]["lr"]

    fit_stream(tmp_path, [Rates()], module=Decaying(), stream=toy_stream(optimizer_policy="rebuild"))
    assert rates == pytest.approx([0.05, 0.025, 0.05, 0.025])


def test_policies_train_differently(tmp_path):
    """Not a no-op."""
    ends = [
        fit_stream(tmp_path, module=Decaying(), stream=toy_stream(optimizer_policy=policy))
        for policy in ("keep", "reset_state", "rebuild")
    ]
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[1], ends[2])


def test_an_optimizer_with_moments_of_its_own_resets_them_itself(tmp_path):
    """SPAM counts the reset, which warms up the steps after it."""
    module = ToyModule(optimizer=SPAM)
    run = trainer(tmp_path)
    run.fit(module, datamodule=toy_stream(optimizer_policy="reset_state"))
    assert {float(state["resets"]) for state in run.optimizers[0].state.values()} == {1.0}
