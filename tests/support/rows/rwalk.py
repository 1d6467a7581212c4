"""RWalk as a plain loop."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from contract import Row
from lightning_cl import RWalk
from reference import TASKS, steps
from toys import ToyModule, toy_data, weights


def rwalk(
    strength: float, alpha: float, interval: int, damping: float, *, batch_size: int = 8, world_size: int = 1
) -> Tensor:
    """RWalk over all weights as one vector, with the penalty in the loss."""
    inputs, labels = toy_data().tensors
    module = ToyModule()
    optimizer = module.configure_optimizers()
    params = list(module.parameters())
    fisher = score = importance = anchor = None
    for task in range(len(TASKS)):
        task_score, drop, squares, start = torch.zeros(()), torch.zeros(()), [], weights(module)
        batches = list(steps(task, batch_size, world_size))
        for number, rows in enumerate(batches, start=1):
            loss = sum(cross_entropy(module.model(inputs[r]), labels[r]) for r in rows) / len(rows)
            grad = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, retain_graph=True)])
            old = weights(module)
            if importance is not None:
                present = torch.cat([p.flatten() for p in params])
                loss = loss + strength * (importance * (present - anchor).square()).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            new = weights(module)
            drop = drop - grad * (new - old)
            squares.append(grad.square())
            if number % interval == 0 or number == len(batches):
                mean = torch.stack(squares).mean(0)
                fisher = mean if fisher is None else alpha * mean + (1 - alpha) * fisher
                task_score = task_score + drop / (0.5 * fisher * (new - start).square() + damping)
                drop, squares, start = torch.zeros(()), [], new
        positive = task_score.clamp(min=0)
        score = positive if score is None else (score + positive) / 2
        importance = fisher / fisher.max() + score / score.max()
        anchor = weights(module)
    return weights(module)


ROWS = {
    "rwalk": Row(
        RWalk,
        {"strength": 0.2, "alpha": 0.8, "interval": 4, "damping": 0.001},
        functools.partial(rwalk, 0.2, 0.8, 4, 0.001),
    ),
}
