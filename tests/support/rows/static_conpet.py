"""Static ConPET as a plain loop."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from contract import Row
from lightning_cl.adapters import StaticConPET
from lightning_cl.memory import ReplayBuffer
from reference import TASKS, steps
from toys import ToyModule, toy_data, weights


def static_conpet(*, batch_size: int = 8, world_size: int = 1) -> Tensor:
    """One old sample for each two new ones, by one memory for each rank; none in the first task."""
    inputs, labels = toy_data().tensors
    module = ToyModule()
    optimizer = module.configure_optimizers()
    memories = [ReplayBuffer(12, recall="task_uniform", rank=rank, world_size=world_size) for rank in range(world_size)]
    step = 0
    for task in range(len(TASKS)):
        for rows in steps(task, batch_size, world_size):
            losses = []
            for memory, mine in zip(memories, rows, strict=True):
                x, y = inputs[mine], labels[mine]
                if task:
                    drawn = memory.draw(len(mine) // 2, step=task * 2**40 + step, task=task, tasks=range(task))
                    x, y = torch.cat([x, drawn.columns["x"]]), torch.cat([y, drawn.columns["y"]])
                losses.append(cross_entropy(module.model(x), y))
            optimizer.zero_grad()
            (sum(losses) / world_size).backward()
            optimizer.step()
            ids, owners = (
                torch.from_numpy(rows.reshape(-1).copy()),
                torch.arange(world_size).repeat_interleave(len(rows[0])),
            )
            for memory, mine in zip(memories, rows, strict=True):
                columns = {"x": inputs[mine], "y": labels[mine]}
                memory.insert(columns, ids, labels=labels[ids], task=task, owners=owners)
            step += 1
    return weights(module)


ROWS = {"static-conpet": Row(StaticConPET, {"capacity": 12, "new_old_ratio": 2.0}, static_conpet)}
