"""The methods that let only some weights move, as plain loops."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from contract import Row
from lightning_cl import FreezeExcept, GradientMask, HalfFineTuning, SalientLayers, SoftMask
from lightning_cl.core.rng import derived_seed
from reference import TASKS, steps
from toys import ToyModule, toy_data, weights

# from the task, the number of the step in the run, weights and gradients by name: a share for each weight
Shares = Callable[[int, int, ToyModule], dict[str, Tensor | float]]


def masked_loop(
    shares: Shares,
    *,
    at_task_end: Callable[[ToyModule, Tensor, Tensor], None] = lambda *_: None,
    batch_size: int = 8,
    world_size: int = 1,
) -> Tensor:
    """SGD that leaves out tensors of share 0, and moves the others by their share of the step."""
    inputs, labels = toy_data().tensors
    module, number = ToyModule(), 0
    optimizer = module.configure_optimizers()
    for task, rows_of_task in enumerate(TASKS):
        for rows in steps(task, batch_size, world_size):
            optimizer.zero_grad()
            (sum(cross_entropy(module.model(inputs[r]), labels[r]) for r in rows) / len(rows)).backward()
            found = shares(task, number, module)
            before = {name: p.detach().clone() for name, p in module.named_parameters()}
            for name, p in module.named_parameters():
                share = found.get(name, 1.0)
                p.grad = None if isinstance(share, float) and share == 0 else p.grad * (torch.as_tensor(share) > 0)
            optimizer.step()
            with torch.no_grad():
                for name, p in module.named_parameters():
                    p.copy_(before[name] + torch.as_tensor(found.get(name, 1.0)) * (p - before[name]))
            number += 1
        at_task_end(module, inputs[rows_of_task], labels[rows_of_task])
    return weights(module)


def largest_gradients(fraction: float, task: int, number: int, module: ToyModule) -> dict[str, Tensor | float]:
    """Gradient-mask tuning, by sorting."""
    masks: dict[str, Tensor | float] = {}
    for name, p in module.named_parameters():
        size = p.grad.abs()
        least = size.flatten().sort(descending=True).values[math.ceil(fraction * p.numel()) - 1]
        masks[name] = ((size >= least) & (size > 0)).float()
    return masks


def half_of_the_layers(seed: int, task: int, number: int, module: ToyModule) -> dict[str, Tensor | float]:
    """Half fine-tuning: of two layers, one is frozen."""
    generator = torch.Generator().manual_seed(derived_seed("half", seed, task, 0, "feed-forward"))
    frozen = ("model.0", "model.3")[int(torch.randperm(2, generator=generator)[0])]
    return {f"{frozen}.weight": 0.0, f"{frozen}.bias": 0.0}


def steepest_layer(every: int) -> Shares:
    """Only the layer with the largest gradient trains, chosen in every so many steps."""
    chosen = [""]

    def shares(task: int, number: int, module: ToyModule) -> dict[str, Tensor | float]:
        layers = {"model.0": module.model[0], "model.3": module.model[3]}
        norms = {n: torch.cat([p.grad.flatten() for p in layer.parameters()]).norm() for n, layer in layers.items()}
        if number % every == 0:
            chosen[0] = max(norms, key=lambda name: norms[name])
        return {n: 0.0 for n, _ in module.named_parameters() if not n.startswith(chosen[0])}

    return shares


def soft_mask(**settings: int) -> Tensor:
    """The gate of a unit feels the gradients of its weights, times the weights."""
    importance: dict[str, Tensor] = {}

    def measure(module: ToyModule, inputs: Tensor, labels: Tensor) -> None:
        for path in ("model.0", "model.3"):
            layer = module.get_submodule(path)
            sums = torch.zeros(len(layer.weight))
            for x, y in zip(inputs, labels, strict=True):
                loss = cross_entropy(module.model(x[None]), y[None])
                weight, bias = torch.autograd.grad(loss, [layer.weight, layer.bias])
                sums += ((weight * layer.weight).sum(1) + bias * layer.bias).detach().abs()
            new = ((sums - sums.mean()) / sums.std()).tanh().abs()
            importance[path] = torch.maximum(importance.get(path, new), new)

    def shares(task: int, number: int, module: ToyModule) -> dict[str, Tensor | float]:
        free = {f"{path}.bias": 1 - units for path, units in importance.items()}
        return free | {f"{path}.weight": 1 - units[:, None] for path, units in importance.items()}

    return masked_loop(shares, at_task_end=measure, **settings)


def first_layer_held(task: int, number: int, module: ToyModule) -> dict[str, Tensor | float]:
    """From the second task on only the last layer trains."""
    return {"model.0.weight": 0.0, "model.0.bias": 0.0} if task else {}


def biases_only(task: int, number: int, module: ToyModule) -> dict[str, Tensor | float]:
    """No matrix trains."""
    return {"model.0.weight": 0.0, "model.3.weight": 0.0}


def salient_layers(**settings: int) -> Tensor:
    """A fresh choice for each run."""
    return masked_loop(steepest_layer(3), **settings)


ROWS = {
    "gradient-mask": Row(
        GradientMask,
        {"fraction": 0.4},
        functools.partial(masked_loop, functools.partial(largest_gradients, 0.4)),
    ),
    "hft": Row(HalfFineTuning, {"seed": 1}, functools.partial(masked_loop, functools.partial(half_of_the_layers, 1))),
    "soft-mask": Row(SoftMask, {"n_samples": 24}, soft_mask),
    "salient-layers": Row(SalientLayers, {"every_n_steps": 3}, salient_layers),
    "freeze-except": Row(
        FreezeExcept, {"last_blocks": 1, "from_task": 1}, functools.partial(masked_loop, first_layer_held)
    ),
    "freeze-except-always": Row(FreezeExcept, {"trainable": ["*.bias"]}, functools.partial(masked_loop, biases_only)),
}
