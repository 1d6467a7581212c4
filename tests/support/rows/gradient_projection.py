"""Gradient projection memory as a plain loop: the paper's SVD of stored inputs, and each update projected."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from contract import Row
from lightning_cl import GradientProjection
from reference import TASKS, steps
from toys import ToyModule, toy_data, weights


def gradient_projection(threshold: float, *, batch_size: int = 8, world_size: int = 1) -> Tensor:
    """GPM with a constant input of 1 for each bias."""
    inputs, labels = toy_data().tensors
    module = ToyModule()
    optimizer = module.configure_optimizers()
    layers = [module.model[0], module.model[3]]
    bases = [torch.zeros(7, 0), torch.zeros(9, 0)]
    for task, rows_of_task in enumerate(TASKS):
        for rows in steps(task, batch_size, world_size):
            loss = sum(cross_entropy(module.model(inputs[r]), labels[r]) for r in rows) / len(rows)
            optimizer.zero_grad()
            loss.backward()
            before = [torch.cat([layer.weight, layer.bias[:, None]], 1).detach() for layer in layers]
            optimizer.step()
            with torch.no_grad():
                for layer, old, basis in zip(layers, before, bases, strict=True):
                    moved = torch.cat([layer.weight, layer.bias[:, None]], 1) - old
                    new = old + moved - moved @ basis @ basis.T
                    layer.weight.copy_(new[:, :-1])
                    layer.bias.copy_(new[:, -1])
        with torch.no_grad():
            x = inputs[rows_of_task]
            for number, features in enumerate((x, torch.relu(layers[0](x)))):
                stored = torch.cat([features, torch.ones(len(x), 1)], 1).T
                rest = stored - bases[number] @ bases[number].T @ stored
                left, singular, _ = torch.linalg.svd(rest)
                energy = stored.square().sum()
                captured, taken = energy - rest.square().sum(), 0
                while captured < threshold * energy:
                    captured = captured + singular[taken] ** 2
                    taken += 1
                bases[number] = torch.cat([bases[number], left[:, :taken]], 1)
    return weights(module)


ROWS = {
    "gradient-projection": Row(
        GradientProjection,
        {"threshold": 0.9, "threshold_step": 0.0},
        functools.partial(gradient_projection, 0.9),
    ),
}
