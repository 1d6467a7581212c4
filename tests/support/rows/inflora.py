"""InfLoRA as a plain loop: singular value decompositions of stored inputs, as the paper has them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from contract import Row
from lightning_cl.adapters import InfLoRA
from lora_loops import PlainLora, slots_loop
from reference import TASKS
from toys import LoraToy, toy_data


def inflora(thresholds: list[float], **settings: Any) -> Tensor:
    """Each layer's A are directions outside of the memory of its inputs, and only B trains."""
    inputs = toy_data().tensors[0]
    memory = [torch.zeros(6, 0).double(), torch.zeros(8, 0).double()]

    def stored(layers: list[PlainLora], task: int) -> list[Tensor]:
        x = inputs[TASKS[task]]
        return [x.T.double(), layers[0].forward(x).relu().detach().T.double()]

    def outside(basis: Tensor, seen: Tensor) -> Tensor:
        return seen - basis @ basis.T @ seen

    def begin(layers: list[PlainLora], task: int) -> None:
        if task > 0:
            # with the weights that the task before left
            for number, seen in enumerate(stored(layers, task - 1)):
                left, singular, _ = torch.linalg.svd(outside(memory[number], seen))
                energy, taken = seen.square().sum(), 0
                captured = energy - singular.square().sum()
                while captured < thresholds[task - 1] * energy:
                    captured = captured + singular[taken] ** 2
                    taken += 1
                memory[number] = torch.cat([memory[number], left[:, :taken]], 1)
        for layer, basis, seen in zip(layers, memory, stored(layers, task), strict=True):
            layer.down = torch.linalg.svd(outside(basis, seen)).U[:, :2].T.float()

    return slots_loop(trained=lambda layer: [layer.up], begin=begin, start=lambda layer, task: layer.down, **settings)


ROWS = {
    "inflora": Row(
        InfLoRA,
        {"threshold": 0.9, "final_threshold": 1.0, "n_tasks": 2, "capacity": 8},
        functools.partial(inflora, [0.9, 0.95]),
        toy=LoraToy,
    ),
}
