"""Learning without Forgetting as a plain loop."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from contract import Row
from lightning_cl import LwF
from reference import TASKS, steps
from toys import ToyModule, toy_data, weights


def lwf(
    strength: float,
    *,
    batch_size: int = 8,
    world_size: int = 1,
    temperature: float = 2.0,
    squared: bool = False,
    decay: float | None = None,
) -> Tensor:
    """LwF by its modified cross-entropy: of the classes of the first task, or of all seen with an average's scores."""
    inputs, labels = toy_data().tensors
    module = ToyModule()
    optimizer = module.configure_optimizers()
    teacher = None if decay is None else copy.deepcopy(module)
    factor = strength * (temperature**2 if squared else 1.0)
    for task in range(len(TASKS)):
        if decay is None and task == 1:
            teacher = copy.deepcopy(module)
        classes = slice(0, 2) if decay is None or task == 0 else slice(0, 4)
        for rows in steps(task, batch_size, world_size):
            losses = []
            for mine in rows:
                logits = module.model(inputs[mine])
                loss = cross_entropy(logits, labels[mine])
                if teacher is not None:
                    with torch.no_grad():
                        target = (teacher.model(inputs[mine])[:, classes] / temperature).softmax(1)
                    log_q = (logits[:, classes] / temperature).log_softmax(1)
                    loss = loss - factor * (target * log_q).sum(1).mean()
                losses.append(loss)
            optimizer.zero_grad()
            (sum(losses) / world_size).backward()
            optimizer.step()
            if decay is not None:
                for old, new in zip(teacher.parameters(), module.parameters(), strict=True):
                    old.data = decay * old.data + (1 - decay) * new.data
    return weights(module)


ROWS = {
    "lwf": Row(LwF, {"strength": 2.0, "temperature_squared": True}, functools.partial(lwf, 2.0, squared=True)),
    "lwf-ema": Row(
        LwF,
        {"strength": 5.0, "teacher": "ema", "decay": 0.8, "classes": "seen"},
        functools.partial(lwf, 5.0, decay=0.8),
    ),
}
