"""L2 anchors as a plain loop."""

from __future__ import annotations

import functools

from torch import Tensor
from torch.nn.functional import cross_entropy

from contract import Row
from lightning_cl import L2Anchor
from reference import TASKS, steps
from toys import ToyModule, toy_data, weights


def l2(strength: float, *, batch_size: int = 8, world_size: int = 1, pretrained: bool = False) -> Tensor:
    """The penalty in the loss, around the weights before the first step or at the end of the task before."""
    inputs, labels = toy_data().tensors
    module = ToyModule()
    optimizer = module.configure_optimizers()
    anchors = [p.detach().clone() for p in module.parameters()] if pretrained else []
    for task in range(len(TASKS)):
        for rows in steps(task, batch_size, world_size):
            loss = sum(cross_entropy(module.model(inputs[r]), labels[r]) for r in rows) / len(rows)
            for anchor, parameter in zip(anchors, module.parameters(), strict=False):
                loss = loss + strength / 2 * (parameter - anchor).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if not pretrained:
            anchors = [p.detach().clone() for p in module.parameters()]
    return weights(module)


ROWS = {
    "l2": Row(L2Anchor, {"strength": 0.5}, functools.partial(l2, 0.5)),
    "l2-pretrained": Row(
        L2Anchor, {"strength": 0.5, "anchor": "pretrained"}, functools.partial(l2, 0.5, pretrained=True)
    ),
}
