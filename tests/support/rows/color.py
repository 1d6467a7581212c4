"""An adapter for each task as a plain loop."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from contract import Row
from lightning_cl.adapters import CoLoR, DynamicConPET
from lora_loops import fresh_start, logits, plain_layers, vector
from reference import TASKS, steps
from toys import LoraToy, toy_data


def adapter_for_each_task(*, batch_size: int = 8, world_size: int = 1) -> Tensor:
    """Fresh factors on the base alone, among the classes of the task; what is compared is the sum of all."""
    inputs, labels = toy_data().tensors
    layers = plain_layers()
    for task in range(len(TASKS)):
        parameters = [p.requires_grad_() for layer in layers for p in (layer.down, layer.up)]
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        for rows in steps(task, batch_size, world_size):
            own = [logits(layers, inputs[r])[:, 2 * task : 2 * task + 2] for r in rows]
            loss = sum(cross_entropy(o, labels[r] - 2 * task) for o, r in zip(own, rows, strict=True)) / len(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for layer in layers:
            layer.restart(fresh_start(layer, task + 1))
            # which acts in none of the tasks that follow
            layer.finished.clear()
    return vector(layers)


ROWS = {
    "color": Row(CoLoR, {"capacity": 8, "k": 2}, adapter_for_each_task, toy=LoraToy),
    # the selector acts in evaluation
    "dynamic-conpet": Row(DynamicConPET, {"capacity": 8, "top_k": 2}, adapter_for_each_task, toy=LoraToy),
}
