"""What the reference modules give to their optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer

__all__ = ["OptimizerFactory", "decay_groups"]

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]


def decay_groups(module: nn.Module, trainable: Mapping[str, Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups: matrices with weight decay; biases, norms and embeddings without."""
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    decayed: list[Parameter] = []
    others: list[Parameter] = []
    for parameter in trainable.values():
        (decayed if parameter.ndim > 1 and id(parameter) not in embeddings else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
