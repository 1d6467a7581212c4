"""What the plain loops in `rows` share: torch without Lightning, where every run must end, on any number of ranks.

Ranks are simulated in one process: the gradient of a step is the mean of the gradients of the ranks' losses.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_cl.datamodules.samplers import TaskSampler
from toys import ToyModule

EPOCHS = 2
TASKS = [np.array([i for i in range(48) if i % 4 in pair]) for pair in ((0, 1), (2, 3))]


def steps(task: int, batch_size: int, world_size: int) -> Iterator[np.ndarray]:
    """Yield the rows of each step of a task, int64 [ranks, n]."""
    sampler = TaskSampler(TASKS[task], task=task, batch_size=batch_size, seed=0, world_size=world_size)
    for epoch in range(EPOCHS):
        sampler.set_position(epoch=epoch)
        yield from (sampler.global_rows(step) for step in range(len(sampler)))


def per_sample_fisher(module: ToyModule, inputs: Tensor, labels: Tensor) -> list[Tensor]:
    """Return the mean over samples of the squared gradients, one backward pass for each sample."""
    sums = [torch.zeros_like(p) for p in module.parameters()]
    for x, y in zip(inputs, labels, strict=True):
        loss = cross_entropy(module.model(x[None]), y[None])
        for total, grad in zip(sums, torch.autograd.grad(loss, list(module.parameters())), strict=True):
            total += grad.square()
    return [total / len(inputs) for total in sums]
