"""Half fine-tuning beyond the contract: which half, and when it changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from language import llama, token_stream
from lightning_cl import ContinualCallback, HalfFineTuning
from toys import ToyModule, fit_stream, toy_loaders, toy_stream, trainer


class Record(ContinualCallback):
    """Keeps what is frozen at the end of every epoch, and what moved in it."""

    boundaries = "evaluation"
    needs_state = False

    def __init__(self, method: HalfFineTuning) -> None:
        self.method = method
        self.frozen: list[set[str]] = []
        self.moved: list[set[str]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.frozen.append(set(self.method.frozen))
        self.moved.append({n for n, p in pl_module.named_parameters() if not torch.equal(p, self.before[n])})


def test_categories_of_a_language_model(tmp_path: Path) -> None:
    """Two of four, one or two of three, half of the normalisations; embeddings and head train; another half later."""
    method = HalfFineTuning(seed=3)
    record = Record(method)
    module = llama(learning_rate=0.01)
    trainer(tmp_path, [method, record]).fit(module, datamodule=token_stream())
    names = [name for name, _ in module.named_parameters()]
    for frozen, moved in zip(record.frozen, record.moved, strict=True):
        layers = [[name for name in frozen if f".layers.{block}." in name] for block in range(2)]
        for layer in layers:
            assert sum("self_attn" in name for name in layer) == 2
        assert sorted(sum("mlp" in name for name in layer) for layer in layers) == [1, 2]
        assert sum("norm" in name for name in frozen) == 2
        assert sum(map(len, layers)) == len(frozen)
        assert moved == set(names) - frozen
    assert record.frozen[0] == record.frozen[1] != record.frozen[2] == record.frozen[3]


def test_an_epoch_as_a_round(tmp_path: Path) -> None:
    """The choice changes with it, hidden boundaries or not, and not with the generators of the process."""
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        method = HalfFineTuning(round="epoch")
        record = Record(method)
        fit_stream(tmp_path, [method, record], stream=toy_stream(epochs_per_task=4))
        runs.append(record.frozen)
    assert runs[0] == runs[1]
    assert len({frozenset(frozen) for frozen in runs[0]}) == 2
    assert HalfFineTuning(round="epoch").boundaries == "unused"
    assert HalfFineTuning().boundaries == "required"


def test_a_bias_goes_with_its_weight_and_exceptions_train(tmp_path: Path) -> None:
    """One of two layers is frozen; of what `include` and `exclude` leave out nothing."""
    method = HalfFineTuning(seed=1)
    fit_stream(tmp_path, [method])
    assert method.frozen in ({"model.0.weight", "model.0.bias"}, {"model.3.weight", "model.3.bias"})
    for settings in ({"exclude": ["*.bias"]}, {"include": ["*.weight"]}):
        method = HalfFineTuning(seed=1, **settings)
        fit_stream(tmp_path, [method])
        assert len(method.frozen) == 1


class Normed(ToyModule):
    """Every category, in blocks that a pattern names, and a frozen layer, which nobody chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(
            {name: nn.ModuleDict({"attn": nn.Linear(6, 6), "norm": nn.LayerNorm(6)}) for name in ("a", "b")}
        )
        self.blocks["a"]["attn"].requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        inputs, labels = batch
        for block in self.blocks.values():
            inputs = inputs + block["attn"](block["norm"](inputs))
        return cross_entropy(self(inputs), labels)


def test_blocks_by_patterns(tmp_path: Path) -> None:
    """What lies outside of them trains."""
    method = HalfFineTuning(blocks=["blocks.*"])
    with pytest.raises(ValueError, match="select one"):
        fit_stream(tmp_path, [method], module=Normed())
    method = HalfFineTuning(blocks=["blocks.?"])
    record = Record(method)
    fit_stream(tmp_path, [method, record], module=Normed())
    assert all({"model.0.weight", "model.3.bias"} <= moved for moved in record.moved)
    assert all(sum("norm.weight" in name for name in frozen) == 1 for frozen in record.frozen)
    assert not any("attn" in name for frozen in record.frozen for name in frozen)


def test_a_round_must_be_known() -> None:
    """With the choices."""
    with pytest.raises(ValueError, match="`round` must be one of 'task', 'epoch', got 'step'"):
        HalfFineTuning(round="step")  # type: ignore[arg-type]


def test_rounds_of_epochs_go_on_over_fits(tmp_path: Path) -> None:
    """One fit of one epoch for each task freezes another half in each, as one fit of all tasks does."""
    method, module, halves = HalfFineTuning(round="epoch"), ToyModule(), []
    for loader in toy_loaders() * 4:
        trainer(tmp_path, [method], max_epochs=1).fit(module, loader, loader)
        halves.append(frozenset(method.frozen))
    assert len(set(halves)) == 2
