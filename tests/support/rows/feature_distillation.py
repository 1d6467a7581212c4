"""Feature distillation as a plain loop."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from contract import Row
from lightning_cl import FeatureDistillation
from lightning_cl.core.rng import derived_seed
from reference import TASKS, steps
from toys import ToyModule, toy_data, weights


def trained_filter(features: Tensor, labels: Tensor, name: str, steps: int) -> Tensor:
    """The filter of a layer and a classifier behind it, trained on all samples at once."""
    width = features.shape[1]
    generator = torch.Generator().manual_seed(derived_seed(0, "filter", name))
    weight = ((torch.rand(width, width, generator=generator) * 2 - 1) / width**0.5).requires_grad_()
    head, bias = torch.zeros(2, width, requires_grad=True), torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([weight, head, bias], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy((features @ weight.T) @ head.T + bias, labels).backward()
        optimizer.step()
    weight = weight.detach()
    return weight * (width / weight.square().sum()).sqrt()


def feature_distillation(strength: float, *, batch_size: int = 8, world_size: int = 1, filter_steps: int = 0) -> Tensor:
    """Squared error of the first layer's outputs and of the scores, the mean of both, filtered or plain."""
    inputs, labels = toy_data().tensors
    module = ToyModule()
    optimizer = module.configure_optimizers()
    teacher, filters = None, [torch.eye(8), torch.eye(4)]
    for task, rows_of_task in enumerate(TASKS):
        if task == 1:
            teacher = copy.deepcopy(module)
        for rows in steps(task, batch_size, world_size):
            losses = []
            for mine in rows:
                hidden = module.model[0](inputs[mine])
                logits = module.model[1:](hidden)
                loss = cross_entropy(logits, labels[mine])
                if teacher is not None:
                    with torch.no_grad():
                        old_hidden = teacher.model[0](inputs[mine])
                        old_logits = teacher.model[1:](old_hidden)
                    errors = [(hidden - old_hidden) @ filters[0].T, (logits - old_logits) @ filters[1].T]
                    loss = loss + strength * sum(error.square().mean() for error in errors) / 2
                losses.append(loss)
            optimizer.zero_grad()
            (sum(losses) / world_size).backward()
            optimizer.step()
        if filter_steps and task == 0:
            with torch.no_grad():
                hidden = module.model[0](inputs[rows_of_task])
                outputs = {"model.0": hidden, "model.3": module.model[1:](hidden)}
            filters = [trained_filter(f, labels[rows_of_task], name, filter_steps) for name, f in outputs.items()]
    return weights(module)


ROWS = {
    "feature-distillation": Row(
        FeatureDistillation,
        {"strength": 0.3, "layers": ["*.[03]"]},
        functools.partial(feature_distillation, 0.3),
    ),
    "feature-distillation-filters": Row(
        FeatureDistillation,
        {"strength": 0.3, "layers": ["*.[03]"], "filters": True, "filter_steps": 20},
        functools.partial(feature_distillation, 0.3, filter_steps=20),
        tolerance=1e-5,
    ),
}
