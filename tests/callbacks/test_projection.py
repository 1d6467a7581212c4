"""What projections share: they neither move what is held, nor act on what is gone, nor stand beside a mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_cl import (
    ContinualCallback,
    FreezeExcept,
    GradientMask,
    GradientProjection,
    HalfFineTuning,
    SingularSubspaceProjection,
    SoftMask,
)
from lightning_cl.callbacks.projection import spread_over_ranks
from lightning_cl.core.task import Task
from lightning_cl.core.update import OptimizerStep
from lightning_cl.functional.subspaces import Subspace
from toys import ToyModule, fit_stream, toy_loaders, trainer

METHODS: dict[str, Any] = {
    "inputs": lambda **settings: GradientProjection(threshold=0.6, threshold_step=0.0, **settings),
    "directions": lambda **settings: SingularSubspaceProjection(min_ratio=0.5, target_ratio=0.5, **settings),
}
methods = pytest.mark.parametrize("method", METHODS)


# ---------------------------------------------------------------------- beside what holds weights


@methods
@pytest.mark.parametrize("mask", [lambda **s: GradientMask(fraction=0.3, **s), SoftMask], ids=["mask", "soft mask"])
@pytest.mark.parametrize("first", [True, False])
def test_masks_of_coordinates_are_refused(method: str, mask: Any, first: bool, tmp_path: Path) -> None:
    """In both orders, before a step; not on other parameters."""
    module, start = ToyModule(), ToyModule().state_dict()

    def both(**settings: Any) -> list[Any]:
        return [mask(**settings), METHODS[method]()][:: 1 if first else -1]

    with pytest.raises(ValueError, match=r"holds single coordinates of \['model.0.*in the `exclude` of one"):
        fit_stream(tmp_path, both(), module=module)
    assert all(torch.equal(value, start[name]) for name, value in module.state_dict().items())
    method_of_others = METHODS[method](exclude=["model.3.*"])
    fit_stream(tmp_path, [mask(include=["model.3.*"]), method_of_others], module=module)
    assert method_of_others.units.keys() == {"model.0.weight"}


class HoldInTurns(ContinualCallback):
    """Holds the first layer in every second step, and notes what each step moved of it, before and after others."""

    needs_state = False

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.steps = 0
        self.held: list[float] = []
        self.free: list[float] = []

    def limit_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        step.keep(self.names)
        self.steps += 1
        for name in self.names if self.steps % 2 == 0 else []:
            step.parameters[name].grad = None

    def observe_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        moved = max(float((step.parameters[name] - step.before(name)).abs().max()) for name in self.names)
        (self.free if self.steps % 2 else self.held).append(moved)


def protected(method: Any, old: dict[str, Tensor], new: dict[str, Tensor]) -> float:
    """The part of a layer's change that lies in the subspace."""
    changes = [new[name] - old[name] for name in method.units["model.0.weight"]]
    return max(float(part.abs().max()) for part in method.protected_part("model.0.weight", changes))


class Subspaces(ContinualCallback):
    """Measures the protected part of the first layer's change since the task's start in every step of the task."""

    needs_state = False

    def __init__(self, method: Any) -> None:
        self.method = method
        self.parts: list[float] = []

    def observe_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        if self.method.anchors:
            weights = {name: p.detach() for name, p in step.parameters.items()}
            self.parts.append(protected(self.method, self.method.anchors, weights))


@methods
@pytest.mark.parametrize("first", [True, False])
def test_a_layer_that_is_held_does_not_move_by_a_bit(method: str, first: bool, tmp_path: Path) -> None:
    """In the steps that hold it, wherever the holder stands; in the others it moves, and stays out of the subspace."""
    projection = METHODS[method]()
    holder = HoldInTurns(["model.0.weight", "model.0.bias"])
    order = [holder, projection] if first else [projection, holder]
    watch = Subspaces(projection)
    fit_stream(tmp_path, [*order, watch])
    assert len(holder.held) >= 3
    assert set(holder.held) == {0.0}
    assert min(holder.free) > 1e-4
    assert len(watch.parts) >= 3
    assert max(watch.parts) < 1e-6


@methods
def test_half_fine_tuning_holds_its_half(method: str, tmp_path: Path) -> None:
    """Beside a projection, on either side of it."""
    for first in (True, False):
        half, module = HalfFineTuning(), ToyModule()
        order = [half, METHODS[method]()] if first else [METHODS[method](), half]
        data, second = toy_loaders()
        trainer(tmp_path, order, max_epochs=1).fit(module, data, data)
        old = {name: p.detach().clone() for name, p in module.named_parameters()}
        trainer(tmp_path, order, max_epochs=2).fit(module, second, second)
        still = {name for name, p in module.named_parameters() if torch.equal(p, old[name])}
        assert still == half.frozen
        assert len(still) == 2


def test_half_of_what_is_projected_together_cannot_be_held(tmp_path: Path) -> None:
    """Projecting weight and bias would move the one that is held; with the way out it runs."""
    biases = FreezeExcept(["*.bias"], from_task=1)
    with pytest.raises(
        ValueError, match=r"\['model.0.weight', 'model.0.bias'\] together, but \['model.0.weight'\] had"
    ):
        fit_stream(tmp_path, [METHODS["inputs"](), biases])
    fit_stream(tmp_path, [METHODS["inputs"](exclude=["*.bias"]), FreezeExcept(["*.bias"], from_task=1)])


# ---------------------------------------------------------------------- parameters that are replaced


class NewHead(ContinualCallback):
    """Puts a wider head into the module and its optimizer at the start of the second task."""

    needs_state = False

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        if task.index == 1:
            old = list(pl_module.model[3].parameters())
            pl_module.model[3] = nn.Linear(8, 6)
            (optimizer,) = trainer.optimizers
            (group,) = optimizer.param_groups
            group["params"] = [p for p in group["params"] if all(p is not gone for gone in old)]
            optimizer.add_param_group({"params": list(pl_module.model[3].parameters())})


@methods
def test_a_head_that_was_replaced_is_refused(method: str, tmp_path: Path) -> None:
    """The projection would act on weights that nothing uses any more; excluded, the head may be replaced."""
    module = ToyModule()
    with pytest.raises(ValueError, match=r"projects \['model.3.weight'.*were replaced.*in `exclude`"):
        fit_stream(tmp_path, [METHODS[method](), NewHead()], module=module)
    excluding = METHODS[method](exclude=["model.3.*"])
    module = ToyModule()
    fit_stream(tmp_path, [excluding, NewHead()], module=module)
    assert module.model[3].out_features == 6
    # a fit of its own finds the new head
    again = METHODS[method]()
    fit_stream(tmp_path, [again], module=module)
    assert again.parameters["model.3.weight"] is module.model[3].weight


# ---------------------------------------------------------------------- devices


def test_what_goes_to_other_ranks_is_on_the_cpu() -> None:
    """Wherever it was made: a tensor of a GPU would arrive on the GPU of its sender."""
    with FakeTensorMode():
        made = spread_over_ranks(
            ["a", "b"],
            lambda name: torch.empty(1, 3, 2, device="cuda:1"),
            lambda name, source: [Subspace(source), Subspace(source, complement=True)],
        )
    assert [subspace.matrix.device.type for name in ("a", "b") for subspace in made[name]] == ["cpu"] * 4
    assert [subspace.complement for subspace in made["b"]] == [False, True]
