"""Freezing beyond the contract: for a whole fit, and from a task on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from language import llama, token_stream
from lightning_cl import EWC, FreezeExcept
from toys import ToyModule, fit_stream, trainer
from users import Images


class Look(Callback):
    """Keeps what requires a gradient, and what has one, in the first step."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.trains = {name for name, p in pl_module.named_parameters() if p.requires_grad}

    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.state = len(optimizer.state)


def test_frozen_for_the_whole_fit(tmp_path: Path) -> None:
    """No gradient and no moments; afterwards the module is as it was, with what was frozen before still frozen."""
    look, module = Look(), ToyModule()
    # one that is named, and one that is not
    for parameter in (module.model[0].bias, module.model[3].weight):
        parameter.requires_grad_(False)
    fit_stream(tmp_path, [FreezeExcept(["*.bias"]), look], module=module)
    assert look.trains == {"model.3.bias"}
    assert look.state == 1
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {"model.0.weight", "model.3.bias"}


def test_a_network_built_for_the_fit(tmp_path: Path) -> None:
    """In `configure_model`, after this callback's set-up: normalisations only."""
    look, module = Look(), llama()
    trainer(tmp_path, [FreezeExcept(norms=True), look]).fit(module, datamodule=token_stream())
    assert look.trains == {name for name, _ in module.named_parameters() if "norm" in name}
    assert len(look.trains) == 5
    assert all(p.requires_grad for p in module.parameters())
    assert "configure_model" not in vars(module)


def test_last_blocks_and_patterns_together(tmp_path: Path) -> None:
    """The last blocks in the order of the network, and what is named beside them."""
    look, module = Look(), llama()
    method = FreezeExcept(["*lm_head*"], last_blocks=1)
    trainer(tmp_path, [method, look]).fit(module, datamodule=token_stream())
    assert look.trains == {n for n, _ in module.named_parameters() if ".layers.1." in n or "lm_head" in n}


def test_batch_normalisation_is_one(tmp_path: Path) -> None:
    """By class, in a network of single layers."""
    look, module = Look(), Images()
    loader = torch.utils.data.DataLoader(Images.samples(6), batch_size=3)
    trainer(tmp_path, [FreezeExcept(norms=True), look], max_epochs=1).fit(module, loader, loader)
    assert look.trains == {"body.1.weight", "body.1.bias"}


class Fails(ToyModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise RuntimeError("out of memory")


def test_an_exception_thaws_the_module(tmp_path: Path) -> None:
    """Lightning calls no teardown then."""
    module = Fails()
    with pytest.raises(RuntimeError, match="out of memory"):
        fit_stream(tmp_path, [FreezeExcept(["*.bias"])], module=module)
    assert all(p.requires_grad for p in module.parameters())


def test_beside_a_penalty(tmp_path: Path) -> None:
    """EWC protects what trains; from a task on, its gradient moves nothing that is held."""
    ewc, module = EWC(20.0), ToyModule()
    fit_stream(tmp_path, [FreezeExcept(["model.3.*"]), ewc], module=module)
    assert set(ewc.importance) == {"model.3.weight", "model.3.bias"}
    weights = fit_stream(tmp_path, [FreezeExcept(["model.3.*"], from_task=1), EWC(20.0)])
    assert torch.equal(weights, fit_stream(tmp_path, [EWC(20.0), FreezeExcept(["model.3.*"], from_task=1)]))


class Bare(ToyModule):
    def __init__(self) -> None:
        super().__init__()
        self.model[2] = nn.LayerNorm(8, elementwise_affine=False)


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    """With the way out."""
    for settings, message in (
        ({}, "`FreezeExcept` would hold everything: name what trains"),
        ({"trainable": "*.bias"}, r"`trainable` must be a list of patterns, such as \['\*.bias'\]"),
        ({"last_blocks": -1}, "`last_blocks` must be a number of blocks, 0 or above, got -1"),
        ({"norms": True, "blocks": ["a"]}, r"`blocks=\['a'\]` belongs to `last_blocks`, which is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            FreezeExcept(**settings)  # type: ignore[arg-type]
    for from_task in (0, 1):
        with pytest.raises(ValueError, match="`trainable` pattern 'encoder' matches no parameter of ToyModule"):
            fit_stream(tmp_path, [FreezeExcept(["encoder"], from_task=from_task)])
        with pytest.raises(ValueError, match="`norms=True`, but Bare has no normalisation with weights"):
            fit_stream(tmp_path, [FreezeExcept(norms=True, from_task=from_task)], module=Bare())
        with pytest.raises(ValueError, match="`last_blocks=3`, but ToyModule has 2 blocks"):
            fit_stream(tmp_path, [FreezeExcept(last_blocks=3, from_task=from_task)])
