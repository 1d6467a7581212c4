"""The relearning attack: how fast does a little fine-tuning bring back what was forgotten?"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_cl.core.capture import undisturbed
from lightning_cl.core.checks import check_count
from lightning_cl.core.distributed import is_distributed
from lightning_cl.core.rng import isolated_rng

__all__ = ["Relearning", "relearning_attack"]


@dataclass(frozen=True)
class Relearning:
    """The course of a relearning attack.

    Args:
        threshold: Score from which on the forgotten counts as recovered.
        steps: Training batches seen at each measurement; the first is 0.
        scores: The score at each.
    """

    threshold: float
    steps: list[int]
    scores: list[float]

    @property
    def steps_to_recover(self) -> int | None:
        """Steps of the first measurement that reached the threshold; ``None`` if none did.

        0 means that it was never forgotten.
        """
        return next((s for s, score in zip(self.steps, self.scores, strict=True) if score >= self.threshold), None)


def relearning_attack(
    pl_module: LightningModule,
    batches: Iterable[Any],
    score: Callable[[LightningModule], float],
    *,
    threshold: float,
    max_steps: int = 100,
    every_n_steps: int = 1,
    seed: int = 0,
) -> Relearning:
    """Fine-tune a copy of a module on a few forgotten samples, and measure what comes back.

    The attack of Hu et al. 2025, arXiv:2406.13356: a small fixed subset, a few steps, the forget metric at each.
    Samples to train on and samples to score should be different ones of the same request: what returns without being
    shown was suppressed, not erased. Attack the model retrained without them in the same way as well: it learns too,
    and only fewer steps than it needs say that something was left.

    The copy is trained by Lightning's Trainer, with the module's own ``training_step``, optimizers and schedulers and
    without callbacks; the module itself stays as it is. Change its settings before to attack with another learning
    rate.

    Args:
        pl_module: The unlearned module.
        batches: Training batches of forgotten samples, read once and repeated in their order. With retained samples
            beside them, the attack does not lose again what it brings back.
        score: Returns how much the module it is given still knows, high = known (an accuracy; a negated loss). It is
            called in evaluation mode without gradients, and leaves no trace. Of a class that was forgotten, let it
            count other classes as well: a module shown nothing but that class soon answers with it always.
        threshold: Score that counts as recovered, such as the one before unlearning.
        max_steps: Training batches.
        every_n_steps: Batches between two measurements.
        seed: Seeds dropout and whatever else a step draws.

    Returns:
        The scores before the first step and after every so many.

    Raises:
        ValueError: If there is no batch, a setting is out of range, a score is NaN, or several processes run.

    Example:
        >>> from lightning_cl.modules import Classifier
        >>> network, data = torch.nn.Linear(2, 2), (torch.eye(2), torch.tensor([1, 0]))
        >>> network.load_state_dict({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)})
        <All keys matched successfully>
        >>> module = Classifier(network, learning_rate=0.1)
        >>> accuracy = lambda module: float((module(data[0]).argmax(-1) == data[1]).float().mean())
        >>> course = relearning_attack(module, [data], accuracy, threshold=1.0, max_steps=4, every_n_steps=2)
        >>> course.steps, course.scores, course.steps_to_recover
        ([0, 2, 4], [0.5, 1.0, 1.0], 2)
    """
    check_count("max_steps", max_steps)
    check_count("every_n_steps", every_n_steps)
    if is_distributed():
        raise ValueError(
            "A relearning attack runs in one process: save the module, and attack it in a script of its own."
        )
    kept = list(batches)
    if not kept:
        raise ValueError("`batches` holds no batch to relearn from.")
    # Lightning leaves the Trainer out of the copy, and trains in evaluation mode what is given to it so
    attacked = copy.deepcopy(pl_module).train()
    watch = _Watch(score, every_n_steps, max_steps)
    device = pl_module.device
    with isolated_rng(seed):
        trainer = Trainer(
            accelerator=device.type,
            devices=1 if device.index is None else [device.index],
            max_epochs=-1,
            limit_val_batches=0,
            callbacks=[watch],
            log_every_n_steps=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        # each entry is a batch already; without validation loaders Lightning would warn of the module's validation step
        trainer.fit(attacked, DataLoader(kept, batch_size=None), [])  # type: ignore[arg-type]
    return Relearning(float(threshold), watch.steps, watch.scores)


class _Watch(Callback):
    """Scores the module before the first batch and after every so many, and ends the fit."""

    def __init__(self, score: Callable[[LightningModule], float], every_n_steps: int, max_steps: int) -> None:
        self.score = score
        self.every_n_steps = every_n_steps
        self.max_steps = max_steps
        self.seen = 0
        self.steps: list[int] = []
        self.scores: list[float] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measure(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen += 1
        if self.seen % self.every_n_steps == 0:
            self._measure(pl_module)
        # the Trainer's `max_steps` counts a batch once for each optimizer that steps in it
        trainer.should_stop = self.seen == self.max_steps

    def _measure(self, pl_module: LightningModule) -> None:
        with undisturbed(pl_module, seed=0), torch.no_grad():
            value = float(self.score(pl_module))
        if math.isnan(value):
            raise ValueError(f"`score` returned NaN after {self.seen} steps.")
        self.steps.append(self.seen)
        self.scores.append(value)
