"""A schedule of its own for every task as a plain loop."""

from __future__ import annotations

import functools
import math

from torch import Tensor
from torch.nn.functional import cross_entropy

from contract import Row
from lightning_cl import Rewarm
from reference import TASKS, steps
from toys import ToyModule, toy_data, weights


def rewarmed(warmup: int, floor: float, *, batch_size: int = 8, world_size: int = 1) -> Tensor:
    """Warm-up from 0, then from the floor; a cosine to the floor; an optimizer without memory of the task before."""
    inputs, labels = toy_data().tensors
    module = ToyModule()
    peak = module.learning_rate
    for task in range(len(TASKS)):
        optimizer = module.configure_optimizers()
        (group,) = optimizer.param_groups
        rows_of_steps = list(steps(task, batch_size, world_size))
        for step, rows in enumerate(rows_of_steps):
            if step < warmup:
                start = floor if task else 0.0
                group["lr"] = peak * (start + (1 - start) * (step + 1) / (warmup + 1))
            else:
                progress = (step - warmup) / (len(rows_of_steps) - warmup - 1)
                group["lr"] = peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)
            loss = sum(cross_entropy(module.model(inputs[r]), labels[r]) for r in rows) / len(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return weights(module)


ROWS = {
    "rewarm": Row(
        Rewarm,
        {"shape": "cosine", "warmup": 2, "floor": 0.1, "reset_at_task": True},
        functools.partial(rewarmed, 2, 0.1),
    ),
}
