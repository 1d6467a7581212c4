"""Component-wise clipping in runs of every kind."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from lightning_cl import ComponentClip, ContinualCallback, FSDP2Strategy
from lightning_cl.core.update import OptimizerStep
from ranks import Ranks
from toys import ToyModule, fit_stream, toy_loaders, toy_stream, trainer, weights
from traffic import Traffic
from users import Manual, Texts, loader

MAX_NORM = 0.1


class ClippedByHand(Callback):
    """What the callback must do, parameter by parameter, in Lightning's own hook."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: LightningModule, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                clip_grad_norm_(parameter, MAX_NORM)


class Fused(ToyModule):
    """AdamW in one kernel; it forgets the size of gradients, but not how that changes from step to step."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05, fused=True)


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "clipped on": {"gradient_clip_val": 0.12},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
}


@pytest.mark.parametrize("kind", [ToyModule, Fused])
@pytest.mark.parametrize("name", RUNS)
def test_every_parameter_is_a_component(name: str, kind: type[ToyModule], tmp_path: Path) -> None:
    """As torch clips it, before what Lightning clips."""
    data = toy_loaders(batch_size=6)[0]

    def run(*callbacks: Callback) -> Tensor:
        module = kind()
        trainer(tmp_path, callbacks, max_epochs=2, **RUNS[name]).fit(module, data, data)
        return weights(module).float()

    # a norm in half precision is rounded, which ours is not
    tolerance = 2e-2 if name == "bf16-true" else 1e-6
    torch.testing.assert_close(run(ComponentClip(MAX_NORM)), run(ClippedByHand()), rtol=0, atol=tolerance)
    assert (run(ComponentClip(MAX_NORM)) - run()).abs().max() > 1e-2


def test_one_component_is_the_clipping_of_lightning(tmp_path: Path) -> None:
    """All parameters by one pattern, over a stream."""
    ours = fit_stream(tmp_path, [ComponentClip(MAX_NORM, components=["*"])])
    torch.testing.assert_close(ours, fit_stream(tmp_path, gradient_clip_val=MAX_NORM), rtol=0, atol=1e-6)


def test_gradients_are_unscaled_under_fp16(tmp_path: Path) -> None:
    """Not clipped by the scale of the loss."""

    def run(*callbacks: Callback) -> Tensor:
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
        module, data = ToyModule(), toy_loaders()[0]
        trainer(tmp_path, callbacks, max_epochs=2, plugins=[plugin]).fit(module, data, data)
        return weights(module)

    torch.testing.assert_close(run(ComponentClip(MAX_NORM)), run(ClippedByHand()), rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", [Manual, Texts])
def test_several_optimizers_and_batches_in_mappings(kind: type[Any], tmp_path: Path) -> None:
    """Under manual optimization each optimizer clips its own; a parameter that none owns is left alone."""

    def run(*callbacks: Callback) -> Tensor:
        module, data = kind(), loader(kind)
        trainer(tmp_path, callbacks, max_epochs=2).fit(module, data, data)
        return weights(module)

    torch.testing.assert_close(run(ComponentClip(MAX_NORM)), run(ClippedByHand()), rtol=0, atol=1e-6)
    assert (run(ComponentClip(MAX_NORM)) - run()).abs().max() > 1e-3


class Branches(ToyModule):
    """One layer is frozen, one takes no part in the loss of every other step."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(6, 4)
        nn.init.eye_(self.extra.weight)
        nn.init.zeros_(self.extra.bias)
        self.model[0].bias.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        odd = self.trainer.global_step % 2
        return self.model(inputs) + (self.extra(inputs) if odd else 0)


def test_parameters_without_a_gradient(tmp_path: Path) -> None:
    """They have no part in any norm, and the others keep the numbers of their components."""

    class WeightsTogether(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: LightningModule, optimizer: Any) -> None:
            named = dict(pl_module.named_parameters())
            clip_grad_norm_([p for name, p in named.items() if name.endswith("weight")], MAX_NORM)
            for name in named.keys() - {name for name in named if name.endswith("weight")}:
                clip_grad_norm_(named[name], MAX_NORM)

    def run(*callbacks: Callback) -> Tensor:
        module, data = Branches(), toy_loaders()[0]
        trainer(tmp_path, callbacks, max_epochs=2).fit(module, data, data)
        return weights(module)

    ours = ComponentClip(MAX_NORM, components=["*.weight"])
    torch.testing.assert_close(run(ours), run(WeightsTogether()), rtol=0, atol=1e-6)


class Norms(ContinualCallback):
    """Notes the norms of gradients that the optimizer gets; it comes behind the clipping."""

    needs_state = False

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def limit_gradients(self, trainer: Any, pl_module: LightningModule, step: OptimizerStep) -> None:
        self.seen.append({name: float(p.grad.norm()) for name, p in step.parameters.items() if p.grad is not None})


class Adds(ContinualCallback):
    """Stands behind the clipping in the list, and adds to the gradients before it all the same."""

    needs_state = False

    def change_gradients(self, trainer: Any, pl_module: LightningModule, step: OptimizerStep) -> None:
        for parameter in step.parameters.values():
            parameter.grad.add_(1.0)  # type: ignore[union-attr]


def joined(norms: dict[str, float], names: Iterable[str]) -> float:
    """The norm of several gradients together."""
    return sum(norms[name] ** 2 for name in names) ** 0.5


def test_patterns_take_what_the_ones_before_left(tmp_path: Path) -> None:
    """All biases are one component, the first layer's weight another, the last weight one by itself."""
    norms = Norms()
    fit_stream(tmp_path, [ComponentClip(0.5, components=["*.bias", "model.0.*"]), norms, Adds()])
    for seen in norms.seen:
        assert joined(seen, ["model.0.bias", "model.3.bias"]) == pytest.approx(0.5, abs=1e-5)
        assert seen["model.0.weight"] == pytest.approx(0.5, abs=1e-5)
        assert seen["model.3.weight"] == pytest.approx(0.5, abs=1e-5)
    assert len(norms.seen) == 12


def test_an_optimizer_of_tensors_outside_the_module(tmp_path: Path) -> None:
    """It has no components."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    ComponentClip().limit_gradients(trainer(tmp_path), ToyModule(), OptimizerStep(optimizer, {}))


# ---------------------------------------------------------------------- two ranks


def traffic_of_a_fit(root: Path, clip: bool) -> tuple[list[Any], Tensor]:
    """All collectives of a fit over shards, and this rank's shards at its end."""
    module = ToyModule()
    callbacks = [ComponentClip(MAX_NORM)] if clip else []
    with Traffic() as traffic:
        fit = trainer(root, callbacks, strategy=FSDP2Strategy(wrap=["Linear"]), devices=2)
        fit.fit(module, datamodule=toy_stream(batch_size=4))
    return [one for one in traffic.seen if one.kind == "all-reduce"], weights(module)


@pytest.mark.distributed
def test_one_reduction_in_a_step(tmp_path: Path) -> None:
    """However many components: 4 norms of float32 in each of the 12 steps."""
    ranks = Ranks(2)
    with_clip = ranks.run(traffic_of_a_fit, tmp_path, True)[0][0]
    without = ranks.run(traffic_of_a_fit, tmp_path, False)[0][0]
    ranks.close()
    assert len(with_clip) - len(without) == 12
    assert sum(one.size for one in with_clip) - sum(one.size for one in without) == 12 * 16


# ---------------------------------------------------------------------- refusals


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    """With the name of the setting and what was given."""
    with pytest.raises(ValueError, match=r"`max_norm` must be above 0, got 0\.0"):
        ComponentClip(0.0)
    with pytest.raises(ValueError, match=r"`components` must be a list of patterns, such as \['\*'\], got '\*'"):
        ComponentClip(components="*")  # type: ignore[arg-type]
    for components in (["encoder"], ["*", "model.0.*"]):
        with pytest.raises(ValueError, match=f"pattern '{components[-1]}' matches no parameter of ToyModule that"):
            fit_stream(tmp_path, [ComponentClip(components=components)])
