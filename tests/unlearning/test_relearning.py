"""The relearning attack against a plain loop, and that it leaves the module alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_cl.unlearning import Relearning, relearning_attack
from toys import ToyModule, toy_data

BATCHES = list(DataLoader(toy_data(24, classes=2), batch_size=8))
HELD = toy_data(20, seed=5, classes=2).tensors


def accuracy(module: LightningModule) -> float:
    """Return the share of right labels on samples that the attack does not train on."""
    assert not module.training
    assert not torch.is_grad_enabled()
    return float((module(HELD[0]).argmax(-1) == HELD[1]).float().mean())


def test_course_is_that_of_a_plain_loop() -> None:
    """Momentum and order of batches included: scores before the first step and after every second."""
    module = ToyModule(learning_rate=0.01)
    course = relearning_attack(module, BATCHES, accuracy, threshold=0.85, max_steps=8, every_n_steps=2)
    plain = copy.deepcopy(module)
    optimizer, expected = plain.configure_optimizers(), [accuracy_of(plain)]
    for step in range(8):
        inputs, labels = BATCHES[step % 3]
        optimizer.zero_grad()
        cross_entropy(plain(inputs), labels).backward()
        optimizer.step()
        if step % 2:
            expected.append(accuracy_of(plain))
    assert course.steps == [0, 2, 4, 6, 8]
    assert course.scores == pytest.approx(expected)
    assert course.scores[0] < 0.85 < course.scores[-1]
    assert course.steps_to_recover == course.steps[next(i for i, s in enumerate(expected) if s >= 0.85)]


def accuracy_of(module: LightningModule) -> float:
    """Return :func:`accuracy` outside of the attack."""
    with torch.no_grad():
        return accuracy(module.eval())


def test_module_and_generators_stay_as_they_are() -> None:
    """Weights, gradients, training flags, hooks and the random numbers of the process."""
    module = ToyModule(dropout=0.5)
    before, keys = {k: v.clone() for k, v in module.state_dict().items()}, set(module.__dict__)
    state = torch.get_rng_state()
    first = relearning_attack(module, BATCHES, accuracy, threshold=2.0, max_steps=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training
    assert set(module.__dict__) == keys
    assert all(parameter.grad is None for parameter in module.parameters())
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    torch.manual_seed(99)
    again = relearning_attack(module, BATCHES, accuracy, threshold=2.0, max_steps=5)
    assert again == first
    assert first.steps_to_recover is None
    assert relearning_attack(module.eval(), BATCHES, accuracy, threshold=2.0, max_steps=5) == first
    assert not module.training
    assert relearning_attack(module, BATCHES, accuracy, threshold=2.0, max_steps=5, seed=1) != first


class TwoOptimizers(ToyModule):
    """Steps two optimizers by hand in each batch, and may draw random numbers to score."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Step both."""
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        """Return one for each layer."""
        return [torch.optim.SGD(self.model[i].parameters(), lr=0.1) for i in (0, 3)]


def test_steps_are_batches_with_manual_optimization() -> None:
    """Two optimizers make no two steps of one batch."""
    course = relearning_attack(TwoOptimizers(), BATCHES, accuracy, threshold=0.9, max_steps=7)
    assert course.steps == list(range(8))
    assert course.scores[-1] > course.scores[0]


def test_attack_after_a_fit_is_without_its_trainer() -> None:
    """A module that was fitted holds its Trainer, which must neither be copied nor lost."""
    from lightning.pytorch import Trainer

    module = ToyModule()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_steps=1, limit_val_batches=0, enable_model_summary=False, **quiet)
    trainer.fit(module, DataLoader(BATCHES, batch_size=None), [])
    relearning_attack(module, BATCHES, accuracy, threshold=0.9, max_steps=1)
    assert module.trainer is trainer
    assert trainer.global_step == 1


def test_never_forgotten_recovers_at_step_zero() -> None:
    """The first that reaches the threshold counts, also where the score falls again."""
    assert Relearning(0.5, [0, 2, 4], [0.5, 0.2, 0.9]).steps_to_recover == 0
    assert Relearning(0.8, [0, 2, 4], [0.5, 0.8, 0.1]).steps_to_recover == 2


def test_refuses() -> None:
    """No batch, settings out of range, a score that is no number."""
    module = ToyModule()
    with pytest.raises(ValueError, match="`batches` holds no batch"):
        relearning_attack(module, [], accuracy, threshold=0.9)
    for setting in ("max_steps", "every_n_steps"):
        with pytest.raises(ValueError, match=f"`{setting}` must be an integer of at least 1"):
            relearning_attack(module, BATCHES, accuracy, threshold=0.9, **{setting: 0})
    with pytest.raises(ValueError, match="`score` returned NaN after 0 steps"):
        relearning_attack(module, BATCHES, lambda module: float("nan"), threshold=0.9)
