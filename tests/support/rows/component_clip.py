"""Component-wise clipping as a plain loop."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from contract import Row
from lightning_cl import ComponentClip
from reference import TASKS, steps
from toys import ToyModule, toy_data, weights


def component_clip(max_norm: float, *, batch_size: int = 8, world_size: int = 1) -> Tensor:
    """The first layer clipped as one component, weights and biases of the second each by themselves."""
    inputs, labels = toy_data().tensors
    module = ToyModule()
    optimizer = module.configure_optimizers()
    for task in range(len(TASKS)):
        for rows in steps(task, batch_size, world_size):
            optimizer.zero_grad()
            (sum(cross_entropy(module.model(inputs[r]), labels[r]) for r in rows) / len(rows)).backward()
            for component in (module.model[0].parameters(), module.model[3].weight, module.model[3].bias):
                torch.nn.utils.clip_grad_norm_(component, max_norm)
            optimizer.step()
    return weights(module)


ROWS = {
    "component-clip": Row(
        ComponentClip, {"max_norm": 0.2, "components": ["*.[01].*"]}, functools.partial(component_clip, 0.2)
    ),
}
