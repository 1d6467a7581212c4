"""I-LoRA as a plain loop."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from contract import Row
from lightning_cl import ILoRA
from lightning_cl.memory import ReplayBuffer
from reference import TASKS, steps
from toys import ToyModule, toy_data, weights


def features(module: ToyModule, inputs: Tensor) -> list[Tensor]:
    """What the two layers return."""
    first = module.model[0](inputs)
    return [first, module.model[3](first.relu())]


def ilora(
    capacity: int, decay: float, strength: float, weight: float, *, batch_size: int = 8, world_size: int = 1
) -> Tensor:
    """Fast weights with replay, and the slow ones, which are returned."""
    inputs, labels = toy_data().tensors
    fast, slow = ToyModule(), ToyModule()
    optimizer = fast.configure_optimizers()
    memories = [ReplayBuffer(capacity, rank=rank, world_size=world_size) for rank in range(world_size)]
    step = 0
    for task in range(len(TASKS)):
        for rows in steps(task, batch_size, world_size):
            draws = [memory.draw(rows.shape[1], step=task * 2**40 + step) for memory in memories]
            drawn_by_all = sum(len(drawn or ()) for drawn in draws)
            losses = []
            for mine, drawn in zip(rows, draws, strict=True):
                loss = cross_entropy(fast.model(inputs[mine]), labels[mine])
                if drawn is not None:
                    x, share = drawn.columns["x"], world_size / drawn_by_all
                    new = features(fast, x)
                    loss = loss + weight * share * cross_entropy(new[-1], drawn.columns["y"], reduction="sum")
                    with torch.no_grad():
                        old = features(slow, x)
                    distances = [(n - o).square().mean(1).sum() for n, o in zip(new, old, strict=True)]
                    loss = loss + strength * share * sum(distances) / 2
                losses.append(loss)
            optimizer.zero_grad()
            (sum(losses) / world_size).backward()
            optimizer.step()
            with torch.no_grad():
                for mine_slow, mine_fast in zip(slow.parameters(), fast.parameters(), strict=True):
                    mine_slow.copy_(decay * mine_slow + (1 - decay) * mine_fast)
            owners = torch.arange(world_size).repeat_interleave(rows.shape[1])
            for memory, mine in zip(memories, rows, strict=True):
                columns = {"x": inputs[mine], "y": labels[mine]}
                ids = torch.from_numpy(rows.reshape(-1).copy())
                memory.insert(columns, ids, labels=labels[ids], task=task, owners=owners)
            step += 1
    return weights(slow)


ROWS = {
    "i-lora": Row(
        ILoRA,
        {"capacity": 12, "decay": 0.8, "strength": 0.5, "weight": 0.7, "at_end": "slow"},
        functools.partial(ilora, 12, 0.8, 0.5, 0.7),
    ),
}
