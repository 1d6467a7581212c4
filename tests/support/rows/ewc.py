"""EWC as a plain loop."""

from __future__ import annotations

import functools

from torch import Tensor
from torch.nn.functional import cross_entropy

from contract import Row
from lightning_cl import EWC
from reference import TASKS, per_sample_fisher, steps
from toys import ToyModule, toy_data, weights


def ewc(strength: float, *, batch_size: int = 8, world_size: int = 1, separate: bool = False) -> Tensor:
    """EWC with the penalty in the loss, one term per task if ``separate``."""
    inputs, labels = toy_data().tensors
    module = ToyModule()
    optimizer = module.configure_optimizers()
    terms: list[tuple[list[Tensor], list[Tensor]]] = []
    for task, rows_of_task in enumerate(TASKS):
        for rows in steps(task, batch_size, world_size):
            loss = sum(cross_entropy(module.model(inputs[r]), labels[r]) for r in rows) / len(rows)
            for fisher, anchors in terms:
                for f, a, p in zip(fisher, anchors, module.parameters(), strict=True):
                    loss = loss + strength / 2 * (f * (p - a).square()).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        fisher = per_sample_fisher(module, inputs[rows_of_task], labels[rows_of_task])
        anchors = [p.detach().clone() for p in module.parameters()]
        if terms and not separate:
            fisher = [old + new for old, new in zip(terms[0][0], fisher, strict=True)]
            terms = []
        terms.append((fisher, anchors))
    return weights(module)


ROWS = {
    "ewc": Row(EWC, {"strength": 20.0}, functools.partial(ewc, 20.0)),
    "ewc-separate": Row(EWC, {"strength": 20.0, "mode": "separate"}, functools.partial(ewc, 20.0, separate=True)),
}
