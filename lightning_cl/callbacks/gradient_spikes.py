"""Gradient spikes of an optimizer step, counted by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lightning_cl.core.distributed import max_over_ranks_
from lightning_cl.core.state import local, sum_rows_over_shards
from lightning_cl.core.update import OptimizerStep
from lightning_cl.functional.spam import count_spikes
from lightning_cl.optim.spam import SPAM
from lightning_cl.optim.states import second_moment, steps_taken

__all__ = ["GradientSpikes", "add_by_layer", "measure_gradient_spikes"]


@dataclass
class GradientSpikes:
    """The spikes of one step.

    Args:
        largest: The largest ratio of a squared gradient to its second moment; infinity for what is not finite.
        counts: Number of spikes by layer, of the layers that have any.
        clipped: Number of elements that the optimizer clips, by layer.
    """

    largest: float
    counts: dict[str, int] = field(default_factory=dict)
    clipped: dict[str, int] = field(default_factory=dict)


def measure_gradient_spikes(step: OptimizerStep, threshold: float, delay: int) -> GradientSpikes | None:
    """Count the spikes in the gradients of a step, over all shards; all ranks must call it.

    Args:
        step: The step that is under way, its gradients not yet changed.
        threshold: Spikes are where the squared gradient is above this many times its second moment, or not finite.
        delay: Gradients that a second moment must hold to be compared with.

    Returns:
        The spikes, or ``None`` if the optimizer keeps no second moment (yet).
    """
    optimizer = step.optimizer
    settings = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    begun = {name: p for name, p in step.parameters.items() if optimizer.state.get(p)}
    known: list[str] = []
    rows: list[Tensor] = []
    for name, age in zip(begun, _ages(optimizer, list(begun.values())), strict=True):
        gradient, moment = begun[name].grad, second_moment(optimizer, begun[name])
        if moment is None:
            continue
        limits = _thresholds(optimizer, settings[id(begun[name])], age, threshold, delay)
        found = {
            limit: count_spikes(local(gradient), moment, limit)
            for limit in set(limits)
            if limit is not None and gradient is not None
        }
        none = torch.zeros(2, dtype=torch.float64, device=moment.device)
        counted, clipped = (none if limit is None else found.get(limit, none) for limit in limits)
        known.append(name)
        broken = none[:1] if gradient is None else _count_broken(local(gradient), moment)
        largest = torch.where(broken > 0, torch.inf, counted[1:])
        rows.append(torch.cat([counted[:1] + broken, largest, clipped[:1]]))
    if not known:
        return None
    parameters = [begun[name] for name in known]
    table = torch.stack(rows)
    largest = table[:, 1].amax()
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        max_over_ranks_(largest)
    counts = sum_rows_over_shards(table[:, [0, 2]], parameters).tolist()
    spikes = GradientSpikes(float(largest))
    add_by_layer(spikes.counts, zip(known, (int(row[0]) for row in counts), strict=True))
    add_by_layer(spikes.clipped, zip(known, (int(row[1]) for row in counts), strict=True))
    return spikes


def add_by_layer(totals: dict[str, int], numbers: Iterable[tuple[str, int]]) -> None:
    """Add numbers by the names of parameters to those of their layers, the modules that hold them."""
    for name, number in numbers:
        if number:
            path = name.replace("_orig_mod.", "")
            layer = path.rpartition(".")[0] or path
            totals[layer] = totals.get(layer, 0) + number


def _count_broken(gradient: Tensor, moment: Tensor) -> Tensor:
    """Return how many elements are not finite, but for those infinite where ``v > 0``, which count by their ratio."""
    # one cheap pass where its result need not be waited for
    if gradient.device.type == "cpu" and gradient.sum().isfinite():
        return torch.zeros(1, dtype=torch.float64)
    return torch.count_nonzero(torch.mul(gradient, moment > 0).isnan()).double()[None]


def _thresholds(
    optimizer: Optimizer, group: dict[str, Any], age: float, threshold: float, delay: int
) -> tuple[float | None, float | None]:
    """Return the threshold to count a parameter's spikes by and that of its optimizer, ``None`` where there is none."""
    clipped = None
    if isinstance(optimizer, SPAM) and age >= group["clip_delay"]:
        # a step that begins with a reset clips nothing
        resets = group["reset_interval"] is not None and age >= group["reset_interval"]
        clipped = None if resets else group["threshold"]
    return threshold if age >= delay else None, clipped


def _ages(optimizer: Optimizer, parameters: list[Parameter]) -> list[float]:
    """Return how many gradients the moments hold, infinity where the optimizer does not say; read at once."""
    ages = [steps_taken(optimizer, parameter) for parameter in parameters]
    tensors = [age for age in ages if isinstance(age, Tensor)]
    values = iter(torch.stack(tensors).tolist() if tensors else [])
    return [torch.inf if age is None else next(values) if isinstance(age, Tensor) else float(age) for age in ages]
