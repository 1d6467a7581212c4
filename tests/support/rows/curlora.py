"""CURLoRA as a plain loop."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from contract import Row
from gated_loops import final_weights, learn, mixed
from lightning_cl import CURLoRA
from lightning_cl.core.rng import derived_seed
from lora_loops import PlainLora, plain_layers
from reference import TASKS
from toys import LoraToy


def draw(layer: PlainLora, task: int) -> None:
    """Choose columns and rows of the base weight, those of small norm first."""
    generator = torch.Generator().manual_seed(derived_seed("cur", 0, layer.name, task))
    chosen = []
    for dim in (0, 1):
        inverse = layer.weight.double().norm(dim=dim).pow(-2)
        probabilities = (inverse / inverse.sum()).float()
        chosen.append(torch.multinomial(probabilities, len(layer.down), generator=generator).sort().values)
    layer.down, layer.up = layer.weight[chosen[1]], layer.weight[:, chosen[0]]


def curlora(*, batch_size: int = 8, world_size: int = 1) -> Tensor:
    """Only the matrices between columns and rows train."""
    layers = plain_layers()
    for task in range(len(TASKS)):
        for layer in layers:
            draw(layer, task)
        squares = {layer.name: torch.zeros(len(layer.down), len(layer.down), requires_grad=True) for layer in layers}

        def forward(inputs: Tensor, squares: dict[str, Tensor] = squares) -> Tensor:
            first, second = layers
            hidden = mixed(first, inputs, lambda values: linear(values, squares[first.name])).relu()
            return mixed(second, hidden, lambda values: linear(values, squares[second.name]))

        learn(task, forward, list(squares.values()), batch_size=batch_size, world_size=world_size)
        for layer in layers:
            layer.finished.append((squares[layer.name].detach() @ layer.down, layer.up))
    return final_weights(layers)


ROWS = {"curlora": Row(CURLoRA, {"capacity": 8}, curlora, toy=LoraToy)}
