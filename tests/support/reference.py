"""The methods as plain torch loops without Lightning: what every run must end at, on any number of ranks.

Ranks are simulated in one process: the gradient of a step is the mean of the gradients of the ranks' losses.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_cl.datamodules.samplers import TaskSampler
from lightning_cl.memory import ReplayBuffer
from toys import ToyModule, toy_data, weights

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


def ewc(strength: float, *, batch_size: int = 8, world_size: int = 1, separate: bool = False) -> Tensor:
    """EWC with the penalty in the loss, one term per task if ``separate``."""
    inputs, labels = toy_data().tensors
    module = ToyModule()
    optimizer = module.configure_optimizers()
    terms: list[tuple[list[Tensor], list[Tensor]]] = []
    for task, rows_of_task in enumerate(TASKS):
        for rows in steps(task, batch_size, world_size):
            loss = sum(cross_entropy(module.model(inputs[r]), labels[r]) for r in rows) / len(rows)
            for fisher, anchors in terms:
                for f, a, p in zip(fisher, anchors, module.parameters(), strict=True):
                    loss = loss + strength / 2 * (f * (p - a).square()).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        fisher = per_sample_fisher(module, inputs[rows_of_task], labels[rows_of_task])
        anchors = [p.detach().clone() for p in module.parameters()]
        if terms and not separate:
            fisher = [old + new for old, new in zip(terms[0][0], fisher, strict=True)]
            terms = []
        terms.append((fisher, anchors))
    return weights(module)


def replay(capacity: int, *, batch_size: int = 8, world_size: int = 1, separate: float = 0.0) -> Tensor:
    """Experience replay by one memory for each rank; ``separate`` is the weight of a loss of its own."""
    inputs, labels = toy_data().tensors
    module = ToyModule()
    optimizer = module.configure_optimizers()
    memories = [ReplayBuffer(capacity, rank=rank, world_size=world_size) for rank in range(world_size)]
    step = 0
    for task in range(len(TASKS)):
        for rows in steps(task, batch_size, world_size):
            losses = []
            for memory, mine in zip(memories, rows, strict=True):
                x, y = inputs[mine], labels[mine]
                drawn = memory.draw(len(mine), step=task * 2**40 + step)
                if drawn is None:
                    losses.append(cross_entropy(module.model(x), y))
                elif separate:
                    replayed = cross_entropy(module.model(drawn.columns["x"]), drawn.columns["y"])
                    losses.append(cross_entropy(module.model(x), y) + separate * replayed)
                else:
                    x, y = torch.cat([x, drawn.columns["x"]]), torch.cat([y, drawn.columns["y"]])
                    losses.append(cross_entropy(module.model(x), y))
            optimizer.zero_grad()
            (sum(losses) / world_size).backward()
            optimizer.step()
            owners = torch.arange(world_size).repeat_interleave(rows.shape[1])
            for memory, mine in zip(memories, rows, strict=True):
                columns = {"x": inputs[mine], "y": labels[mine]}
                ids = torch.from_numpy(rows.reshape(-1).copy())
                memory.insert(columns, ids, labels=labels[ids], task=task, owners=owners)
            step += 1
    return weights(module)
