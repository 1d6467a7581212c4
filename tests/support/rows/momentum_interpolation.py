"""Momentum interpolation as a plain loop."""

from __future__ import annotations

import functools

from torch import Tensor
from torch.nn.functional import cross_entropy

from contract import Row
from lightning_cl import MomentumInterpolation
from reference import TASKS, steps
from toys import ToyModule, toy_data, weights


def momentum_interpolation(momentum: float, *, batch_size: int = 8, world_size: int = 1) -> Tensor:
    """Fine-tuning, and the average that begins with the weights before it."""
    inputs, labels = toy_data().tensors
    module = ToyModule()
    optimizer = module.configure_optimizers()
    slow = weights(module)
    for task in range(len(TASKS)):
        for rows in steps(task, batch_size, world_size):
            optimizer.zero_grad()
            (sum(cross_entropy(module.model(inputs[r]), labels[r]) for r in rows) / len(rows)).backward()
            optimizer.step()
            slow = momentum * slow + (1 - momentum) * weights(module)
    return slow


ROWS = {
    "momentum-interpolation": Row(
        MomentumInterpolation, {"momentum": 0.8, "at_end": "slow"}, functools.partial(momentum_interpolation, 0.8)
    ),
}
