"""A-GEM and GEM as plain loops."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from contract import Row
from lightning_cl import AGEM, GEM
from lightning_cl.datamodules.samplers import TaskSampler
from lightning_cl.memory import ReplayBuffer
from reference import EPOCHS, TASKS
from toys import ToyModule, toy_data, weights


def gradient(module: ToyModule, loss: Tensor) -> Tensor:
    """The gradient of a loss as one vector."""
    return parameters_to_vector(torch.autograd.grad(loss, list(module.parameters())))


def averaged(g: Tensor, references: list[Tensor]) -> Tensor:
    """A-GEM's step, as the paper's equation says it."""
    (r,) = references
    return g - (g @ r) / (r @ r) * r if g @ r < 0 else g


def constrained(g: Tensor, references: list[Tensor], margin: float = 0.0) -> Tensor:
    """GEM's step, by trying every set of constraints that may hold with equality."""
    rows, wide = torch.stack(references).double(), g.double()
    if (rows @ wide >= 0).all():
        return g
    # the length of a reference moves no constraint
    units = rows / rows.norm(dim=1, keepdim=True)
    sets = itertools.chain.from_iterable(itertools.combinations(range(len(rows)), n) for n in range(len(rows) + 1))
    found = []
    for active in map(list, sets):
        v = torch.zeros(len(rows), dtype=torch.float64)
        if active:
            v[active] = torch.linalg.solve(units[active] @ units[active].T, -(units[active] @ wide))
        step = wide + v @ units
        if (v >= 0).all() and (units @ step >= -1e-9).all():
            found.append(((step - wide).norm().item(), step))
    return (min(found, key=lambda pair: pair[0])[1] + margin * rows.sum(0)).float()


def batches(rows: np.ndarray, task: int, batch_size: int, world_size: int) -> Iterator[np.ndarray]:
    """Yield the rows of each step of a task, [ranks, n]."""
    sampler = TaskSampler(rows, task=task, batch_size=batch_size, seed=0, world_size=world_size)
    for epoch in range(EPOCHS):
        sampler.set_position(epoch=epoch)
        yield from (sampler.global_rows(step) for step in range(len(sampler)))


def turned(
    turn: Callable[[Tensor, list[Tensor]], Tensor],
    capacity: int,
    policy: str,
    *,
    per_task: bool,
    draw_size: int | None,
    batch_size: int = 8,
    world_size: int = 1,
    accumulated: int = 1,
    tasks: Sequence[np.ndarray] = tuple(TASKS),
) -> Tensor:
    """Steps turned by the gradients of a memory's losses: a draw from all earlier tasks, or from each."""
    inputs, labels = toy_data().tensors
    module = ToyModule()
    optimizer = module.configure_optimizers()
    memories = [ReplayBuffer(capacity, policy, rank=rank, world_size=world_size) for rank in range(world_size)]
    step = conflicts = 0
    for task, rows_of_task in enumerate(tasks):
        drawn_from = [[k] for k in range(task)] if per_task else [list(range(task))]
        g = torch.zeros_like(weights(module))
        for number, rows in enumerate(batches(rows_of_task, task, batch_size, world_size)):
            loss = sum(cross_entropy(module.model(inputs[r]), labels[r]) for r in rows) / world_size / accumulated
            g += gradient(module, loss)
            if (number + 1) % accumulated == 0:
                references = []
                for earlier in drawn_from:
                    settings = {"step": task * 2**40 + step, "stream": (earlier or [0])[0], "tasks": earlier}
                    draws = [memory.draw(draw_size or len(rows[0]), **settings) for memory in memories]
                    kept = [drawn.columns for drawn in draws if drawn is not None]
                    if kept:
                        x, y = (torch.cat([columns[name] for columns in kept]) for name in "xy")
                        references.append(gradient(module, cross_entropy(module.model(x), y)))
                new = turn(g, references) if references else g
                conflicts += not torch.equal(new, g)
                start = 0
                for p in module.parameters():
                    p.grad = new[start : start + p.numel()].view_as(p).clone()
                    start += p.numel()
                optimizer.step()
                g.zero_()
            owners = torch.arange(world_size).repeat_interleave(rows.shape[1])
            ids = torch.from_numpy(rows.reshape(-1).copy())
            for memory, mine in zip(memories, rows, strict=True):
                columns = {"x": inputs[mine], "y": labels[mine]}
                memory.insert(columns, ids, labels=labels[ids], task=task, owners=owners)
            step += 1
    # else the row would show nothing
    assert conflicts >= 2, conflicts
    return weights(module)


ROWS = {
    "agem": Row(
        AGEM,
        {"capacity": 12},
        functools.partial(turned, averaged, 12, "reservoir", per_task=False, draw_size=None),
    ),
    "gem": Row(
        GEM,
        {"capacity": 12, "margin": 0.1},
        functools.partial(turned, functools.partial(constrained, margin=0.1), 12, "ring", per_task=True, draw_size=12),
    ),
}
