"""What the tests of SI and RWalk share: a loss whose way downhill has a closed form, and the way of a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, Subset

from lightning_cl import ContinualCallback
from lightning_cl.core.update import OptimizerStep
from toys import weights

# gradient, weights before and weights after a step, each as one vector
Move = tuple[Tensor, Tensor, Tensor]


class Quadratic(LightningModule):
    r"""The loss :math:`\frac{1}{2} \sum_i a_i \theta_i^2`, whatever the batch, under plain SGD."""

    curvature = (0.5, 1.0, 4.0)
    start = (1.0, -2.0, 0.5)
    learning_rate = 0.1

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.tensor(self.start[:2]))
        self.last = nn.Parameter(torch.tensor(self.start[2:]))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        theta = torch.cat([self.first, self.last])
        return 0.5 * (theta.new_tensor(self.curvature) * theta.square()).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


def empty_batches(count: int) -> DataLoader[Any]:
    """As many batches, of which the loss takes nothing."""
    return DataLoader(torch.zeros(count, 1), batch_size=1)


def without_batch(loader: DataLoader[Any], number: int) -> DataLoader[Any]:
    """The same batches, in the same order, less one."""
    size = loader.batch_size
    rows = [row for row in range(len(loader.dataset)) if row // size != number]
    return DataLoader(Subset(loader.dataset, rows), batch_size=size)


def in_closed_form() -> tuple[Tensor, Tensor, Tensor]:
    """Return curvatures, starting weights and the factor that a step multiplies them by, float64 [3] each."""
    curvature, start = torch.tensor([Quadratic.curvature, Quadratic.start], dtype=torch.float64)
    return curvature, start, 1 - Quadratic.learning_rate * curvature


def moves(
    module: Any,
    batches: Iterable[Any],
    *,
    penalty: Callable[[Tensor], Tensor] | None = None,
    accumulate: int = 1,
    clip: float | None = None,
    meddle: bool = False,
) -> list[Move]:
    """Train an epoch in a plain loop, with the penalty in the loss, and return its steps."""
    params, optimizer, done = list(module.parameters()), module.configure_optimizers(), []
    batches = list(batches)
    for start in range(0, len(batches), accumulate):
        part = batches[start : start + accumulate]
        loss = sum(cross_entropy(module(x), y) for x, y in part) / accumulate
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, retain_graph=True)])
        before = weights(module)
        if penalty is not None:
            loss = loss + penalty(torch.cat([p.flatten() for p in params]))
        optimizer.zero_grad()
        loss.backward()
        if meddle:
            for p in params:
                p.grad *= -0.5
        if clip is not None:
            clip_grad_norm_(params, clip)
        optimizer.step()
        if meddle:
            with torch.no_grad():
                for p in params:
                    p += 0.01
        done.append((flat, before, weights(module)))
    return done


class Meddler(ContinualCallback):
    """Turns all gradients round, and corrects all weights after the step."""

    def limit_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        for parameter in step.parameters.values():
            parameter.grad.mul_(-0.5)

    def change_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        for parameter in step.parameters.values():
            parameter.add_(0.01)


def as_vector(state: dict[str, Tensor], module: nn.Module) -> Tensor:
    """A state by names as one vector, in the order of the module's parameters."""
    return torch.cat([state[name].flatten() for name, _ in module.named_parameters()])
