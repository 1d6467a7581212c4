"""SI as a plain loop."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from contract import Row
from lightning_cl import SI
from reference import TASKS, steps
from toys import ToyModule, toy_data, weights


def si(strength: float, damping: float, *, batch_size: int = 8, world_size: int = 1) -> Tensor:
    """SI with the penalty in the loss, and the gradient of the task's loss taken apart from it."""
    inputs, labels = toy_data().tensors
    module = ToyModule()
    optimizer = module.configure_optimizers()
    params = list(module.parameters())
    importance = [torch.zeros_like(p) for p in params]
    anchors = [p.detach().clone() for p in params]
    for task in range(len(TASKS)):
        path = [torch.zeros_like(p) for p in params]
        for rows in steps(task, batch_size, world_size):
            loss = sum(cross_entropy(module.model(inputs[r]), labels[r]) for r in rows) / len(rows)
            grads = torch.autograd.grad(loss, params, retain_graph=True)
            old = [p.detach().clone() for p in params]
            if task > 0:
                for f, a, p in zip(importance, anchors, params, strict=True):
                    loss = loss + strength * (f * (p - a).square()).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for drop, grad, before, p in zip(path, grads, old, params, strict=True):
                drop -= grad * (p.detach() - before)
        for total, drop, a, p in zip(importance, path, anchors, params, strict=True):
            total += drop / ((p.detach() - a).square() + damping)
            a.copy_(p.detach())
    return weights(module)


ROWS = {"si": Row(SI, {"strength": 1.0, "damping": 0.1}, functools.partial(si, 1.0, 0.1))}
