"""Chains of LoRA as a plain loop."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from contract import Row
from lightning_cl import PeriodicLoRA
from lightning_cl.core.rng import derived_seed
from lora_loops import PlainLora, fresh_start, logits, plain_layers, vector
from reference import TASKS, steps
from toys import LoraToy, toy_data


def fresh(layers: list[PlainLora]) -> torch.optim.SGD:
    """An optimizer that knows nothing of what was before."""
    parameters = [p.requires_grad_() for layer in layers for p in (layer.down, layer.up)]
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def unload(layer: PlainLora, momentum: float, seed: int) -> None:
    """Move a part of a layer's update to what is finished."""
    down, up = layer.down.detach(), layer.up.detach()
    layer.finished.append((down, momentum * up))
    layer.past = layer.past + momentum * up @ down
    layer.down = fresh_start(layer, seed) if momentum == 1 else down.clone()
    layer.up = (1 - momentum) * up


def loop(every: int, momentum: float = 1.0, *, batch_size: int = 8, world_size: int = 1) -> Tensor:
    """The whole stream, a restart after every few steps of a task that others of the task follow."""
    inputs, labels = toy_data().tensors
    layers = plain_layers()
    for task in range(len(TASKS)):
        optimizer = fresh(layers)
        for step, rows in enumerate(steps(task, batch_size, world_size)):
            if step and step % every == 0:
                for layer in layers:
                    unload(layer, momentum, derived_seed("restart", task, step // every - 1))
                optimizer = fresh(layers)
            loss = sum(cross_entropy(logits(layers, inputs[r]), labels[r]) for r in rows) / len(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for layer in layers:
            layer.restart(fresh_start(layer, task + 1))
    return vector(layers)


ROWS = {
    "periodic-lora": Row(
        PeriodicLoRA, {"every": 2, "capacity": 12}, functools.partial(loop, 2), tolerance=1e-5, toy=LoraToy
    ),
    "periodic-lora-momentum": Row(
        PeriodicLoRA,
        {"every": 2, "momentum": 0.25, "capacity": 12},
        functools.partial(loop, 2, 0.25),
        tolerance=1e-5,
        toy=LoraToy,
    ),
}
