"""Ranks that grow by need as a plain loop: the gradient of the whole weight is at hand there."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import linear

from contract import Row
from gated_loops import final_weights, learn
from lightning_cl import GrowingLoRA
from lora_loops import SCALING, PlainLora, fresh_start, plain_layers
from reference import TASKS
from toys import LoraToy


def directions_outside(gradient: Tensor, rows: Tensor, threshold: float) -> Tensor:
    """Leading right singular vectors of a gradient without its part in the span of rows."""
    basis = torch.linalg.qr(rows.double().T).Q
    left = gradient.double() - gradient.double() @ basis @ basis.T
    _, singular, vectors = torch.linalg.svd(left)
    shares = singular.square() / gradient.double().square().sum()
    return vectors[: len(singular)][shares > threshold].float()


def growing_lora(every: int, threshold: float, *, batch_size: int = 8, world_size: int = 1) -> Tensor:
    """One rank at first; the factors of all ranks are there, and a mask says which act."""
    layers = plain_layers()
    for task in range(len(TASKS)):
        used = {layer.name: torch.arange(len(layer.down)) < 1 for layer in layers}
        # ones, added to the weights, whose gradients are those of the weights
        extra = {layer.name: torch.zeros_like(layer.weight, requires_grad=True) for layer in layers}

        def output(
            layer: PlainLora, inputs: Tensor, used: dict[str, Tensor] = used, extra: dict[str, Tensor] = extra
        ) -> Tensor:
            gates = used[layer.name].float()
            found = linear(inputs, layer.weight + extra[layer.name], layer.bias)
            found = found + linear(linear(inputs, layer.down) * gates, layer.up) * SCALING
            for down, up in layer.finished:
                found = found + linear(linear(inputs, down), up) * SCALING
            return found

        def forward(inputs: Tensor) -> Tensor:
            return output(layers[1], output(layers[0], inputs).relu())

        def grow(step: int, used: dict[str, Tensor] = used, extra: dict[str, Tensor] = extra) -> None:
            for layer in layers:
                gradient, mask = extra[layer.name].grad, used[layer.name]
                assert gradient is not None
                extra[layer.name].grad = None
                if step % every or mask.all():
                    continue
                found = directions_outside(gradient, layer.down.detach()[mask], threshold)
                free = (~mask).nonzero().flatten()[: len(found)]
                layer.down.data[free] = found[: len(free)] / 3**0.5
                mask[free] = True

        trained = [p.requires_grad_() for layer in layers for p in (layer.down, layer.up)]
        learn(task, forward, trained, batch_size=batch_size, world_size=world_size, after=grow)
        for layer in layers:
            mask = used[layer.name]
            layer.finished.append((layer.down.detach()[mask], layer.up.detach()[:, mask]))
            layer.down = fresh_start(layer, task + 1)
            layer.up = torch.zeros_like(layer.up)
    return final_weights(layers)


ROWS = {
    "growing-lora": Row(
        GrowingLoRA,
        {"every": 2, "threshold": 0.2, "capacity": 8},
        functools.partial(growing_lora, 2, 0.2),
        tolerance=1e-5,
        toy=LoraToy,
    ),
}
