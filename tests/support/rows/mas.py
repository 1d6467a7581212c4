"""MAS as a plain loop."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from contract import Row
from lightning_cl import MAS
from reference import TASKS, steps
from toys import ToyModule, toy_data, weights


def sensitivity(module: ToyModule, inputs: Tensor) -> list[Tensor]:
    """Return the mean over samples of the absolute gradients of the squared norm of the output."""
    sums = [torch.zeros_like(p) for p in module.parameters()]
    for x in inputs:
        norm = module.model(x[None]).square().sum()
        for total, grad in zip(sums, torch.autograd.grad(norm, list(module.parameters())), strict=True):
            total += grad.abs()
    return [total / len(inputs) for total in sums]


def mas(strength: float, *, batch_size: int = 8, world_size: int = 1) -> Tensor:
    """MAS with the penalty in the loss."""
    inputs, labels = toy_data().tensors
    module = ToyModule()
    optimizer = module.configure_optimizers()
    importance = [torch.zeros_like(p) for p in module.parameters()]
    anchors = [p.detach().clone() for p in module.parameters()]
    for task, rows_of_task in enumerate(TASKS):
        for rows in steps(task, batch_size, world_size):
            loss = sum(cross_entropy(module.model(inputs[r]), labels[r]) for r in rows) / len(rows)
            for omega, a, p in zip(importance, anchors, module.parameters(), strict=True):
                loss = loss + strength * (omega * (p - a).square()).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for omega, new in zip(importance, sensitivity(module, inputs[rows_of_task]), strict=True):
            omega += new
        anchors = [p.detach().clone() for p in module.parameters()]
    return weights(module)


ROWS = {"mas": Row(MAS, {"strength": 0.02}, functools.partial(mas, 0.02))}
