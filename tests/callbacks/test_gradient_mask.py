"""Gradient-mask tuning beyond the contract: what is counted, by which gradient, and over which ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import Parameter
from torch.nn.functional import cross_entropy

from lightning_cl import ContinualCallback, FreezeExcept, GradientMask
from lightning_cl.core import ParameterState
from lightning_cl.core.update import OptimizerStep
from ranks import Ranks
from toys import ToyModule, fit_stream, toy_data, toy_stream, trainer


class Movers(ContinualCallback):
    """Counts what every step moved."""

    boundaries = "unused"
    needs_state = False

    def __init__(self) -> None:
        self.moved: list[dict[str, Tensor]] = []

    def limit_gradients(self, trainer: Any, pl_module: Any, step: OptimizerStep) -> None:
        step.keep(step.parameters)

    def observe_update(self, trainer: Any, pl_module: Any, step: OptimizerStep) -> None:
        self.moved.append({name: p != step.before(name) for name, p in step.parameters.items()})


class Decayed(ToyModule):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.9])
def test_as_many_move_as_the_fraction_says(fraction: float, tmp_path: Path) -> None:
    """Of each tensor, rounded up; fewer where fewer have a gradient, despite weight decay and momentum."""
    movers = Movers()
    fit_stream(tmp_path, [GradientMask(fraction), movers], module=Decayed())
    assert len(movers.moved) == 12
    for moved in movers.moved:
        for tensor in moved.values():
            assert 0 < tensor.sum() <= math.ceil(fraction * tensor.numel())
    assert sum(int(moved["model.3.weight"].sum()) for moved in movers.moved) > 0.7 * 12 * fraction * 32


def test_the_largest_move(tmp_path: Path) -> None:
    """Those of the first batch's gradient."""
    movers, module = Movers(), ToyModule()
    trainer(tmp_path, [GradientMask(0.25), movers], max_steps=1).fit(module, datamodule=toy_stream(batch_size=24))
    plain, (inputs, labels) = ToyModule(), toy_data().tensors
    cross_entropy(plain.model(inputs[labels < 2]), labels[labels < 2]).backward()
    size = plain.model[3].weight.grad.abs()
    assert torch.equal(movers.moved[0]["model.3.weight"], size >= size.flatten().sort(descending=True).values[7])


def test_the_choice_is_of_the_task_alone(tmp_path: Path) -> None:
    """What another method holds does not come into it, and both are held, in either order."""
    movers = [Movers(), Movers()]
    weights = fit_stream(tmp_path, [FreezeExcept(["model.3.*"], from_task=1), GradientMask(0.25), movers[0]])
    assert torch.equal(
        weights, fit_stream(tmp_path, [GradientMask(0.25), FreezeExcept(["model.3.*"], from_task=1), movers[1]])
    )
    assert not any(moved["model.0.weight"].any() for moved in movers[0].moved[6:])
    assert all(moved["model.3.weight"].any() for moved in movers[0].moved)


def test_from_a_task_on_and_for_some_parameters(tmp_path: Path) -> None:
    """Before, and elsewhere, everything moves."""
    movers = Movers()
    fit_stream(tmp_path, [GradientMask(0.1, from_task=1, include=["*.weight"]), movers], module=Decayed())
    assert all(tensor.all() for moved in movers.moved[:6] for tensor in moved.values())
    for moved in movers.moved[6:]:
        assert moved["model.3.weight"].sum() <= 4
        assert moved["model.3.bias"].all()


def test_hidden_boundaries(tmp_path: Path) -> None:
    """Without `from_task` no boundary is asked for."""
    assert GradientMask(0.5).boundaries == "unused"
    assert GradientMask(0.5, from_task=1).boundaries == "required"


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, "half", 1])
def test_fractions_out_of_range_are_refused(fraction: Any) -> None:
    """None and all would be other methods."""
    with pytest.raises(ValueError, match="`fraction` must be above 0 and below 1, got"):
        GradientMask(fraction)


def masks_on_this_rank(layouts: list[list[Any]], shape: list[int]) -> list[Tensor]:
    """Choose on shards of gradients that are the same for all layouts; return whole masks."""
    found = []
    for mesh_shape, *placements in layouts:
        mesh = init_device_mesh("cpu", tuple(mesh_shape))
        generator, parameters = torch.Generator().manual_seed(0), {}
        for number in range(3):
            gradient = torch.randn(number + 1, *shape, generator=generator).round(decimals=1)
            parameter = Parameter(distribute_tensor(torch.zeros_like(gradient), mesh, placements))
            parameter.grad = distribute_tensor(gradient, mesh, placements)
            parameters[str(number)] = parameter
        parameters["whole"] = Parameter(torch.zeros(5))
        parameters["whole"].grad = torch.arange(5.0)
        found.append(torch.cat([mask.flatten() for mask in _choose(parameters)]))
    return found


def _choose(parameters: dict[str, Parameter]) -> list[Tensor]:
    method = GradientMask(0.3)
    method.parameters = parameters
    step = OptimizerStep(torch.optim.SGD(list(parameters.values()), lr=0.1), parameters)
    method.observe_gradients(None, None, step)  # type: ignore[arg-type]
    masks = ParameterState()
    masks.set(method.movability(None, None, step), parameters)  # type: ignore[arg-type]
    return [masks.full(name) for name in masks]


@pytest.mark.distributed
def test_shards_choose_what_one_process_chooses() -> None:
    """Of uneven and empty shards, replicas of shards and whole tensors together; ties included."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(number + 1, 3, 5, generator=generator).round(decimals=1) for number in range(3)]
    parameters = {str(number): Parameter(torch.zeros_like(g)) for number, g in enumerate(gradients)}
    parameters["whole"] = Parameter(torch.zeros(5))
    for parameter, gradient in zip(parameters.values(), [*gradients, torch.arange(5.0)], strict=True):
        parameter.grad = gradient
    expected = torch.cat([mask.flatten() for mask in _choose(parameters)])
    ranks = Ranks(2)
    layouts = [[[2], Shard(0)], [[2], Shard(2)], [[2, 1], Replicate(), Shard(0)], [[1, 2], Replicate(), Shard(0)]]
    found = ranks.run(masks_on_this_rank, layouts, [3, 5])
    ranks.close()
    assert all(torch.equal(masks, expected) for rank in found for masks in rank)
    assert len(found[0]) == 4
