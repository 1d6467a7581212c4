"""What plain loops over the toy module with LoRA share: factors and what finished tasks left, as plain matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from lightning_cl.core.rng import derived_seed
from reference import TASKS, steps
from toys import LoraToy, toy_data

SCALING = 2.0
LAYERS = ("model.base_model.model.0", "model.base_model.model.3")


@dataclass
class PlainLora:
    """A layer of the toy module: its base, the factors that train, and the sum of those that finished tasks left."""

    name: str
    weight: Tensor
    bias: Tensor
    down: Tensor
    up: Tensor
    past: Tensor
    # the factors of finished tasks, each [r, in] and [out, r]
    finished: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def effective(self) -> Tensor:
        """Return the weight that the layer computes with."""
        return self.weight + SCALING * (self.past + self.up @ self.down)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the layer's output, summed in the order of PEFT: rounding grows over the steps of a loop."""
        output = linear(inputs, self.weight, self.bias) + linear(linear(inputs, self.down), self.up) * SCALING
        if self.finished:
            down = torch.cat([down for down, _ in self.finished])
            up = torch.cat([up for _, up in self.finished], 1)
            output = output + linear(linear(inputs, down), up) * SCALING
        return output

    def restart(self, down: Tensor) -> None:
        """Add the factors to what finished tasks left, and begin anew."""
        self.finished.append((self.down.detach().clone(), self.up.detach().clone()))
        self.past = self.past + self.up.detach() @ self.down.detach()
        self.down, self.up = down.clone().requires_grad_(), torch.zeros_like(self.up).requires_grad_()


def plain_layers() -> list[PlainLora]:
    """Return the layers of the toy module as a fit finds them."""
    module = LoraToy()
    found = []
    for name in LAYERS:
        layer = module.get_submodule(name)
        base = layer.base_layer
        down, up = (factor["default"].weight.detach().clone() for factor in (layer.lora_A, layer.lora_B))
        past = torch.zeros_like(base.weight)
        found.append(PlainLora(name, base.weight.detach(), base.bias.detach(), down, up, past))
    return found


def fresh_start(layer: PlainLora, task: int) -> Tensor:
    """Return the factor A that the slots draw for a task."""
    generator = torch.Generator().manual_seed(derived_seed("slot", 0, layer.name, task))
    bound = layer.down.shape[1] ** -0.5
    return torch.empty(layer.down.shape).uniform_(-bound, bound, generator=generator)


def logits(layers: list[PlainLora], inputs: Tensor) -> Tensor:
    """Return what the module says."""
    first, second = layers
    return second.forward(first.forward(inputs).relu())


def vector(layers: list[PlainLora]) -> Tensor:
    """Return the weights as `toys.weights` does."""
    return torch.cat([part.detach().flatten() for layer in layers for part in (layer.effective(), layer.bias)])


def slots_loop(
    *,
    batch_size: int = 8,
    world_size: int = 1,
    trained: Callable[[PlainLora], list[Tensor]] = lambda layer: [layer.down, layer.up],
    begin: Callable[[list[PlainLora], int], None] = lambda layers, task: None,
    penalty: Callable[[list[PlainLora]], Tensor | float] = lambda layers: 0.0,
    start: Callable[[PlainLora, int], Tensor] = fresh_start,
) -> Tensor:
    """Learn the toy stream with slots, folded at a task's end, and return the weights.

    Args:
        batch_size: Samples of a rank in a step.
        world_size: Ranks.
        trained: What the optimizer steps of a layer.
        begin: Called at the start of each task.
        penalty: Added to the loss.
        start: Returns the factor A that a later task begins with.
    """
    inputs, labels = toy_data().tensors
    layers = plain_layers()
    for task in range(len(TASKS)):
        begin(layers, task)
        parameters = [p.requires_grad_() for layer in layers for p in trained(layer)]
        # fresh moments for every task
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        for rows in steps(task, batch_size, world_size):
            loss = sum(cross_entropy(logits(layers, inputs[r]), labels[r]) for r in rows) / len(rows)
            optimizer.zero_grad()
            (loss + penalty(layers)).backward()
            optimizer.step()
        for layer in layers:
            layer.restart(start(layer, task + 1))
    return vector(layers)
