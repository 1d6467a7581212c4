"""What ``spikes.py`` runs: a small Llama on three domains, with planted gradient spikes, and the optimizers."""

from __future__ import annotations

import json
import math
import pydoc_data.topics
import random
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import AdamW, Optimizer
from workloads import quiet_trainer

from lightning_cl.callbacks import ContinualMetrics
from lightning_cl.callbacks.spike_aware import SpikeAware
from lightning_cl.core.schedules import task_scheduler
from lightning_cl.datamodules import PackedTextSource, Predefined, TaskStreamDataModule
from lightning_cl.modules import CausalLM
from lightning_cl.optim.spam import SPAM
from lightning_cl.optim.stable_spam import StableSPAM

BLOCK, BATCH = 128, 4
LLAMA = {
    "model_type": "llama",
    "vocab_size": 259,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": BLOCK,
}
EVERY = 10  # steps that are one point of a curve


@dataclass(frozen=True)
class Settings:
    """What all runs of a file share.

    Args:
        steps: In each of the three tasks.
        seeds: Number of them.
        learning_rates: Those that each optimizer chooses from.
        warmup: Steps of warm-up at the start of the stream; the rate is constant after them.
        reset_interval: Steps between momentum resets.
        warmup_steps: Steps of warm-up after a reset.
        spike_rate: Probability of a step to have spikes.
        spike_share: Probability of a tensor to have one in such a step.
        spike_factors: Least and most of a factor, which is drawn log-uniformly.
        train_bytes: Text of each domain.
        val_blocks: Blocks of each domain that the validation loss is the mean of.
    """

    steps: int = 200
    seeds: int = 3
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    warmup: int = 20
    reset_interval: int = 120
    warmup_steps: int = 36
    spike_rate: float = 0.03
    spike_share: float = 0.2
    spike_factors: tuple[float, float] = (10.0, 1000.0)
    train_bytes: int = 400_000
    val_blocks: int = 64


# ---------------------------------------------------------------------- texts


def python_sources() -> list[str]:
    """The modules of the standard library that are single files."""
    return [file.read_text("utf-8") for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]


def documentation() -> list[str]:
    """The chapters of the language reference that ``help()`` shows."""
    return [text for _, text in sorted(pydoc_data.topics.topics.items())]


def headers() -> list[str]:
    """The C++ headers of torch's tensor library."""
    return [file.read_text("utf-8") for file in sorted((Path(torch.__file__).parent / "include" / "c10").rglob("*.h"))]


DOMAINS: dict[str, Callable[[], list[str]]] = {
    "Python": python_sources,
    "documentation": documentation,
    "C++": headers,
}


def write_texts(folder: Path, settings: Settings) -> dict[str, tuple[Path, Path]]:
    """Write training and validation documents of each domain as JSON lines; return their paths."""
    paths = {}
    for name, find in DOMAINS.items():
        documents, chance = find(), random.Random(0)
        chance.shuffle(documents)
        # a document is in one part only; of those for validation a piece of each, so that no long one makes it up
        val, rest = documents[: len(documents) // 8], documents[len(documents) // 8 :]
        pieces = [text[start : start + 2000] for text in val for start in [chance.randrange(len(text))]]
        for part, texts in {"train": _first(rest, settings.train_bytes), "val": pieces}.items():
            lines = [json.dumps({"text": text}) + "\n" for text in texts]
            (folder / f"{name}.{part}.jsonl").write_text("".join(lines), "utf-8")
        paths[name] = (folder / f"{name}.train.jsonl", folder / f"{name}.val.jsonl")
    return paths


def _first(documents: Iterable[str], size: int) -> list[str]:
    kept: list[str] = []
    for text in documents:
        kept.append(text[: size - sum(map(len, kept))])
    return [text for text in kept if text]


# ---------------------------------------------------------------------- spikes


class PlantedSpikes(Callback):
    """Multiplies gradients of random tensors in random steps, before anything clips, and sees what was left of them.

    What is planted in a step is a pure function of the seed and the step.
    """

    def __init__(self, settings: Settings, seed: int, *, plant: bool) -> None:
        self.settings = settings
        self.seed = seed
        self.plant = plant
        self.factors: list[float] = []
        self.remaining: list[float] = []
        self.lowered: list[float] = []
        self._planted: dict[str, float] = {}
        self._before: dict[str, torch.Tensor] = {}

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        chance = random.Random(f"{self.seed} {trainer.global_step}")
        self._planted = {}
        gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        if self.plant and chance.random() < self.settings.spike_rate:
            low, high = map(math.log, self.settings.spike_factors)
            for name, gradient in gradients.items():
                if chance.random() < self.settings.spike_share:
                    self._planted[name] = math.exp(chance.uniform(low, high))
                    gradient.mul_(self._planted[name])
        self._before = {name: gradient.clone() for name, gradient in gradients.items()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # the gradients still are those that the step was made with
        after = {name: p.grad for name, p in pl_module.named_parameters() if name in self._before}
        if self._planted:
            for name, factor in self._planted.items():
                self.factors.append(factor)
                self.remaining.append(factor * (after[name].norm() / self._before[name].norm()).item())
        else:
            lowered = sum(int((after[name].abs() < 0.99 * g.abs()).sum()) for name, g in self._before.items())
            self.lowered.append(lowered / sum(g.numel() for g in self._before.values()))


class Losses(Callback):
    """Keeps the training loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))


# ---------------------------------------------------------------------- optimizers


@dataclass(frozen=True)
class Arm:
    """An optimizer with what protects it.

    Args:
        label: How tables and figures call it.
        optimizer: Makes it of parameters; the learning rate is ``lr``.
        callbacks: Makes the callbacks beside it.
        trainer: Settings of the Trainer.
        rates_of: The arm whose learning rate this one takes; its own are tried if ``None``.
    """

    label: str
    optimizer: Callable[..., Optimizer]
    callbacks: Callable[[], list[Callback]] = list
    trainer: dict[str, Any] = field(default_factory=dict)
    rates_of: str | None = None


def arms(settings: Settings) -> dict[str, Arm]:
    """Return all arms by name. Moments decay as in the paper of SPAM, and no arm has weight decay."""
    adamw = partial(AdamW, betas=(0.9, 0.999), weight_decay=0.0)
    schedule = {"reset_interval": settings.reset_interval, "warmup_steps": settings.warmup_steps}
    return {
        "adamw": Arm("AdamW", adamw),
        "adamw-clip": Arm("AdamW, clipped norm", adamw, trainer={"gradient_clip_val": 1.0}),
        "spam": Arm("SPAM", partial(SPAM, **schedule)),
        "spam-paper": Arm("SPAM, resets of the paper", SPAM, rates_of="spam"),
        "stable-spam": Arm("Stable-SPAM", partial(StableSPAM, **schedule), rates_of="spam"),
        "spike-aware": Arm("AdamW, SpikeAware", adamw, lambda: [SpikeAware(**schedule)], rates_of="spam"),
    }


class Reader(CausalLM):
    """The language model with the optimizer of an arm."""

    def __init__(self, make_optimizer: Callable[..., Optimizer], **settings: Any) -> None:
        super().__init__(LLAMA, schedule="constant", rewarm=False, **settings)
        self.make_optimizer = make_optimizer

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters(), lr=self.learning_rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": task_scheduler(optimizer, self.schedule, self), "interval": "step"},
        }


# ---------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    """A run and what it gave.

    Args:
        arm: Name of the arm.
        spikes: Whether spikes were planted.
        seed: Of the weights, of the samples' order and of the spikes.
        learning_rate: Peak.
        val_loss: Loss on each domain (columns) after each task (rows), in nats a byte.
        curve: Means of the training loss over ``EVERY`` steps.
        planted: Spikes, each of them in one tensor and one step.
        median_factor: Median of what their gradients were multiplied by.
        median_remaining: The same as the step was made with, after all clipping.
        unclipped: Share of the spikes that nothing clipped.
        lowered: Share of the gradient's elements that were clipped in steps without spikes.
        seconds: Of the processor.
    """

    arm: str
    spikes: bool
    seed: int
    learning_rate: float
    val_loss: list[list[float]]
    curve: list[float]
    planted: int
    median_factor: float | None
    median_remaining: float | None
    unclipped: float | None
    lowered: float
    seconds: float

    @property
    def key(self) -> tuple[str, bool, int, float]:
        return self.arm, self.spikes, self.seed, self.learning_rate

    @property
    def learned(self) -> float:
        """Mean over the domains of the loss right after the domain's task."""
        return statistics.fmean(self.val_loss[task][task] for task in range(len(self.val_loss)))

    @property
    def final(self) -> float:
        """Mean over the domains of the loss after the last task."""
        return statistics.fmean(self.val_loss[-1])

    @property
    def forgotten(self) -> float:
        """Rise of the loss of the first domain since its task."""
        return self.val_loss[-1][0] - self.val_loss[0][0]


def train(
    name: str, spikes: bool, seed: int, learning_rate: float, settings: Settings, texts: dict[str, tuple[Path, Path]]
) -> Run:
    """Fit the stream once."""
    arm = arms(settings)[name]
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        source = partial(PackedTextSource, block_size=BLOCK, across_documents=True, drop_tails=True)
        val_tokens = BLOCK * settings.val_blocks
        cache = texts["Python"][0].parent
        stream = TaskStreamDataModule(
            [source(str(train), cache_dir=cache) for train, _ in texts.values()],
            [source(str(val), max_tokens=val_tokens, cache_dir=cache) for _, val in texts.values()],
            scenario=Predefined(list(texts)),
            batch_size=BATCH,
            steps_per_task=settings.steps,
            seed=seed,
            evaluate="all",
        )
        planted, losses = PlantedSpikes(settings, seed, plant=spikes), Losses()
        metrics = ContinualMetrics("val_loss", mode="min", directory=folder)
        callbacks = [planted, losses, *arm.callbacks(), metrics]
        trainer = quiet_trainer(callbacks=callbacks, default_root_dir=folder, **arm.trainer)
        module = Reader(arm.optimizer, learning_rate=learning_rate, warmup=settings.warmup, seed=seed)
        trainer.fit(module, datamodule=stream)
    ratios = [left / factor for left, factor in zip(planted.remaining, planted.factors, strict=True)]
    curve = [statistics.fmean(losses.values[i : i + EVERY]) for i in range(0, len(losses.values), EVERY)]
    return Run(
        name,
        spikes,
        seed,
        learning_rate,
        val_loss=[[round(loss, 4) for loss in row] for row in metrics.matrix.tolist()],
        curve=[round(loss, 4) for loss in curve],
        planted=len(ratios),
        median_factor=round(statistics.median(planted.factors), 1) if ratios else None,
        median_remaining=round(statistics.median(planted.remaining), 2) if ratios else None,
        unclipped=round(statistics.fmean(ratio > 0.99 for ratio in ratios), 3) if ratios else None,
        lowered=round(statistics.fmean(planted.lowered), 6),
        seconds=round(time.process_time() - started, 1),
    )
