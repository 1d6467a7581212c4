"""Spike-aware clipping, resets and warm-up as a plain loop of Adam."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from contract import Row
from lightning_cl import SpikeAware
from reference import TASKS, steps
from toys import ToyModule, toy_data, weights

DECAY = 0.1


def adamw(parameters: object, lr: float) -> torch.optim.Optimizer:
    """A fifth of the toy's learning rate, and a decay that shows."""
    return torch.optim.AdamW(parameters, lr=lr / 5, weight_decay=DECAY)  # type: ignore[arg-type]


def spike_aware(
    threshold: float, interval: int, warmup: int, delay: int, *, batch_size: int = 8, world_size: int = 1
) -> Tensor:
    """Adam with decoupled decay, clipped; its moments are dropped at intervals and for the second task."""
    inputs, labels = toy_data().tensors
    module = ToyModule()
    parameters, rate = list(module.parameters()), module.learning_rate / 5
    first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    age, resets = 0, 0
    for task in range(len(TASKS)):
        for number, rows in enumerate(steps(task, batch_size, world_size)):
            if age == interval or (task > 0 and number == 0):
                first, second = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
                age, resets = 0, resets + 1
            scale = 1.0
            if resets and age < warmup:
                scale = 1 - 0.99 * (1 + math.cos(math.pi * age / (warmup + 1))) / 2
            losses = [cross_entropy(module.model(inputs[r]), labels[r]) for r in rows]
            gradients = torch.autograd.grad(sum(losses) / len(rows), parameters)  # type: ignore[arg-type]
            age += 1
            with torch.no_grad():
                for p, g, m, v in zip(parameters, gradients, first, second, strict=True):
                    if age > delay:
                        spikes = (g.square() > threshold * v) & (v > 0)
                        g = torch.where(spikes, g.sign() * (threshold * v).sqrt(), g)
                    m.copy_(0.9 * m + 0.1 * g)
                    v.copy_(0.999 * v + 0.001 * g.square())
                    update = m / (1 - 0.9**age) / ((v / (1 - 0.999**age)).sqrt() + 1e-8)
                    p.copy_(p * (1 - rate * DECAY) - rate * scale * update)
    return weights(module)


ROWS = {
    "spike-aware": Row(
        SpikeAware,
        {"threshold": 300.0, "reset_interval": 4, "warmup_steps": 3, "clip_delay": 1},
        functools.partial(spike_aware, 300.0, 4, 3, 1),
        optimizer=adamw,
    ),
}
