"""Updates orthogonal to leading singular directions as a plain loop: each update projected after the step."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from contract import Row
from lightning_cl import SingularSubspaceProjection
from reference import TASKS, steps
from toys import ToyModule, toy_data, weights


def singular_subspaces(ratio: float, *, batch_size: int = 8, world_size: int = 1) -> Tensor:
    """The same ratio in all layers, for none of the toy's has outputs like its inputs."""
    inputs, labels = toy_data().tensors
    module = ToyModule()
    optimizer = module.configure_optimizers()
    layers = [module.model[0], module.model[3]]
    for task in range(len(TASKS)):
        decomposed = [torch.linalg.svd(layer.weight.detach(), full_matrices=False) for layer in layers]
        for rows in steps(task, batch_size, world_size):
            loss = sum(cross_entropy(module.model(inputs[r]), labels[r]) for r in rows) / len(rows)
            optimizer.zero_grad()
            loss.backward()
            before = [layer.weight.detach().clone() for layer in layers]
            optimizer.step()
            if task == 0:
                continue
            with torch.no_grad():
                for layer, old, (left, singular, right) in zip(layers, before, decomposed, strict=True):
                    rank = round(ratio * len(singular))
                    u, v, moved = left[:, :rank], right[:rank].T, layer.weight - old
                    layer.weight.copy_(old + moved - u @ u.T @ moved @ v @ v.T)
    return weights(module)


ROWS = {
    "singular-subspaces": Row(
        SingularSubspaceProjection, {"target_ratio": 0.7}, functools.partial(singular_subspaces, 0.7)
    ),
}
