"""SD-LoRA as a plain loop: directions and magnitudes of whole matrices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from contract import Row
from gated_loops import final_weights, learn, mixed
from lightning_cl import SDLoRA
from lora_loops import SCALING, PlainLora, fresh_start, plain_layers
from reference import TASKS
from toys import LoraToy


def sd_lora(*, batch_size: int = 8, world_size: int = 1) -> Tensor:
    """One magnitude per task, each a parameter of its own."""
    layers = plain_layers()
    directions: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    magnitudes: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    for task in range(len(TASKS)):
        scales = {layer.name: torch.ones(1, requires_grad=True) for layer in layers}

        def output(layer: PlainLora, inputs: Tensor, scales: dict[str, Tensor] = scales) -> Tensor:
            found = mixed(layer, inputs, lambda values: values * scales[layer.name])
            for magnitude, direction in zip(magnitudes[layer.name], directions[layer.name], strict=True):
                found = found + SCALING * magnitude * linear(inputs, direction)
            return found

        def forward(inputs: Tensor) -> Tensor:
            return output(layers[1], output(layers[0], inputs).relu())

        trained = [p.requires_grad_() for layer in layers for p in (layer.down, layer.up, scales[layer.name])]
        old = [magnitude for layer in layers for magnitude in magnitudes[layer.name]]
        learn(task, forward, trained + old, batch_size=batch_size, world_size=world_size)
        for layer in layers:
            update = (layer.up @ layer.down * scales[layer.name]).detach()
            directions[layer.name].append(update / update.norm())
            magnitudes[layer.name].append(update.norm().requires_grad_())
            layer.down = fresh_start(layer, task + 1)
            layer.up = torch.zeros_like(layer.up)
    for layer in layers:
        pairs = zip(directions[layer.name], magnitudes[layer.name], strict=True)
        layer.finished = [(direction, magnitude * torch.eye(len(direction))) for direction, magnitude in pairs]
    return final_weights(layers)


ROWS = {"sd-lora": Row(SDLoRA, {"capacity": 8}, sd_lora, tolerance=1e-5, toy=LoraToy)}
