"""What plain loops over the toy module with LoRA share, where something stands between the factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from lora_loops import SCALING, PlainLora
from reference import steps
from toys import toy_data


def mixed(layer: PlainLora, inputs: Tensor, mix: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the layer's output, with something done to what comes out of A; summed in the order of PEFT."""
    output = linear(inputs, layer.weight, layer.bias) + linear(mix(linear(inputs, layer.down)), layer.up) * SCALING
    return output + past_output(layer, inputs, lambda values: values)


def past_output(layer: PlainLora, inputs: Tensor, mix: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what finished tasks left of a layer's output."""
    if not layer.finished:
        return inputs.new_zeros(())
    down, up = torch.cat([down for down, _ in layer.finished]), torch.cat([up for _, up in layer.finished], 1)
    return linear(mix(linear(inputs, down)), up) * SCALING


def learn(
    task: int,
    forward: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    *,
    batch_size: int,
    world_size: int,
    learning_rate: float = 0.1,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Train on a task of the toy stream, with moments of its own; ``after`` gets the number of each step, from 1."""
    inputs, labels = toy_data().tensors
    optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9)
    for number, rows in enumerate(steps(task, batch_size, world_size), start=1):
        loss = sum(cross_entropy(forward(inputs[r]), labels[r]) for r in rows) / len(rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after(number)


def num_steps(task: int, batch_size: int, world_size: int) -> int:
    """Return the optimizer steps of a task."""
    return sum(1 for _ in steps(task, batch_size, world_size))


def final_weights(layers: Sequence[PlainLora]) -> Tensor:
    """Return the weights as `toys.weights` does, of what finished tasks left."""
    parts = []
    for layer in layers:
        delta = sum((up @ down for down, up in layer.finished), torch.zeros_like(layer.weight))
        parts += [(layer.weight + SCALING * delta).detach().flatten(), layer.bias]
    return torch.cat(parts)
