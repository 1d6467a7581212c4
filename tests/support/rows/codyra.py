"""CoDyRA as a plain loop."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from contract import Row
from gated_loops import final_weights, learn, mixed, num_steps
from lightning_cl import CoDyRA
from lightning_cl.core.rng import derived_seed
from lora_loops import PlainLora, fresh_start, plain_layers
from reference import TASKS
from toys import LoraToy


def first_gates(layer: PlainLora, task: int) -> Tensor:
    """The normal draws that a task begins with."""
    generator = torch.Generator().manual_seed(derived_seed("gates", 0, layer.name, task))
    return torch.randn(len(layer.down), generator=generator).requires_grad_()


def codyra(largest: float, *, batch_size: int = 8, world_size: int = 1) -> Tensor:
    """Gates shrink towards 0 in the second half of a task."""
    layers = plain_layers()
    for task in range(len(TASKS)):
        gates = {layer.name: first_gates(layer, task) for layer in layers}
        count = num_steps(task, batch_size, world_size)

        def forward(inputs: Tensor, gates: dict[str, Tensor] = gates) -> Tensor:
            for layer, activation in zip(layers, (torch.relu, lambda x: x), strict=True):
                inputs = activation(mixed(layer, inputs, gates[layer.name].mul))
            return inputs

        def shrink(step: int, gates: dict[str, Tensor] = gates, count: int = count) -> None:
            threshold = largest * (step - count / 2) / (count / 2)
            if threshold > 0:
                for gate in gates.values():
                    gate.data = gate.sign() * (gate.abs() - threshold).clamp(min=0)

        trained = [p.requires_grad_() for layer in layers for p in (layer.down, layer.up, gates[layer.name])]
        learn(
            task,
            forward,
            trained,
            batch_size=batch_size,
            world_size=world_size,
            learning_rate=0.03,
            after=shrink,
        )
        for layer in layers:
            gate = gates[layer.name].detach()
            layer.finished.append(((gate[:, None] * layer.down).detach()[gate != 0], layer.up.detach()[:, gate != 0]))
            layer.down = fresh_start(layer, task + 1)
            layer.up = torch.zeros_like(layer.up)
    return final_weights(layers)


def slow_sgd(parameters: Iterable[Tensor], lr: float) -> torch.optim.Optimizer:
    """Gates multiply the steps of the factors: at the toy's own rate they run away."""
    return torch.optim.SGD(parameters, lr=0.3 * lr, momentum=0.9)


ROWS = {
    "codyra": Row(
        CoDyRA,
        {"threshold": 0.2, "capacity": 8},
        functools.partial(codyra, 0.2),
        optimizer=slow_sgd,
        toy=LoraToy,
    )
}
