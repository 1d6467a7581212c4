"""A second set of weights, taken, averaged, used and saved, on one process and on shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_cl import ContinualCallback, FSDP2Strategy
from lightning_cl.core.copies import WeightCopy
from lightning_cl.core.step import run_in_forward
from ranks import Ranks
from toys import ToyModule, toy_data, toy_stream, trainer, weights

INPUTS = toy_data().tensors[0][:4]


class Normalised(ToyModule):
    """With running statistics, a constant table, and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.model.append(nn.BatchNorm1d(4))
        self.register_buffer("table", torch.ones(2), persistent=False)
        self.model[3].requires_grad_(False)


def changed(module: nn.Module) -> nn.Module:
    """Move every parameter and buffer."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.add_(1)
    return module


def test_the_module_computes_with_the_copy_and_gets_its_own_back() -> None:
    """Trainable weights and statistics are those of the copy inside; what is frozen or made anew is the module's."""
    module, copy = Normalised().eval(), WeightCopy("Test")
    assert not copy
    copy.take(module)
    assert copy
    changed(module)
    before, objects = weights(module), [id(p) for p in module.parameters()]
    statistics = module.model[4].running_mean.clone()
    with copy.in_place(module):
        assert [id(p) for p in module.parameters()] == objects
        expected = Normalised().eval()
        expected.model[3].load_state_dict(module.model[3].state_dict())
        assert torch.equal(module(INPUTS), expected(INPUTS))
        assert torch.equal(module.table, torch.full((2,), 2.0))
        module.model[4].train()(torch.randn(8, 4))
    assert torch.equal(weights(module), before)
    assert torch.equal(module.model[4].running_mean, statistics)


def test_weights_come_back_after_an_error() -> None:
    """A failing forward leaves no foreign weights."""
    module, copy = ToyModule(), WeightCopy("Test")
    copy.take(module)
    before = weights(changed(module))
    with pytest.raises(RuntimeError, match="shapes"), copy.in_place(module):
        module(torch.zeros(2, 3))
    assert torch.equal(weights(module), before)


def test_average() -> None:
    """The copy becomes c + w (theta - c), in float32 also for weights of half precision."""
    module = ToyModule()
    copy = WeightCopy("Test")
    copy.take(module)
    start = weights(module)
    changed(module)
    copy.move_towards(module, 0.25)
    copy.load_into(module)
    torch.testing.assert_close(weights(module), start + 0.25)
    half, average = nn.Linear(1, 1, bias=False).bfloat16(), WeightCopy("Test", float32=True)
    with torch.no_grad():
        half.weight.fill_(1.0)
        average.take(half)
        half.weight.fill_(2.0)
    for _ in range(10):
        average.move_towards(half, 1e-4)
    assert float(average.state_dict()["weights"]["weight"]) == pytest.approx(2 - (1 - 1e-4) ** 10)
    with average.in_place(half):
        assert half.weight.dtype == torch.bfloat16


def test_saved_and_restored() -> None:
    """A fresh object ends with the same copy; a module with other parameters is refused."""
    module, copy = Normalised(), WeightCopy("Test")
    copy.take(module)
    state = copy.state_dict()
    changed(module)
    fresh = WeightCopy("Test")
    fresh.load_state_dict(state)
    fresh.place(module)
    fresh.load_into(module)
    assert torch.equal(weights(module.model[0]), weights(Normalised().model[0]))
    assert torch.equal(module.model[4].running_mean, torch.zeros(4))
    fresh.load_state_dict(state)
    with pytest.raises(ValueError, match=r"weights kept by `Test` has no entry for \['model\.3"):
        fresh.place(ToyModule())


def test_widened() -> None:
    """What grew keeps its corner, beside what the module has; what shrank or went is left for `place` to refuse."""
    module, copy = ToyModule(), WeightCopy("Test")
    copy.take(module)
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    module.model[3] = nn.Linear(8, 6)
    changed(module)
    copy.widen(module)
    found = copy.state_dict()["weights"]
    for name in ("model.3.weight", "model.3.bias"):
        assert torch.equal(found[name][:4], start[name])
        assert torch.equal(found[name][4:], module.get_parameter(name)[4:])
    assert torch.equal(found["model.0.weight"], start["model.0.weight"])
    copy.place(module)
    module.model[3] = nn.Linear(8, 5)
    copy.widen(module)
    assert copy.state_dict()["weights"]["model.3.bias"].shape == (6,)
    del module.model[3]
    copy.widen(module)
    with pytest.raises(ValueError, match=r"weights kept by `Test` has 'model\.3.*no such trainable parameter"):
        copy.place(module)


def test_widened_buffers() -> None:
    """Of a mask the copy knows nothing more; other buffers take what the module's have more."""
    module, copy = ToyModule(), WeightCopy("Test")
    module.register_buffer("mask", torch.tensor([True, False]))
    module.register_buffer("counts", torch.tensor([3, 4]))
    copy.take(module)
    module.mask, module.counts = torch.ones(3, dtype=torch.bool), torch.tensor([5, 6, 7])
    copy.widen(module)
    found = copy.state_dict()["buffers"]
    assert found["mask"].tolist() == [True, False, False]
    assert found["counts"].tolist() == [3, 4, 7]


def test_placed_for_an_evaluation() -> None:
    """What trains plays no part then, but what is kept must be there, before and behind a checkpoint."""
    module, copy = Normalised(), WeightCopy("Test")
    copy.take(module)
    restored = WeightCopy("Test")
    restored.load_state_dict(copy.state_dict())
    module.requires_grad_(True)
    module.model[0].requires_grad_(False)
    for kept in (copy, restored):
        with pytest.raises(ValueError, match=r"has no entry for \['model\.3"):
            kept.place(module)
        kept.place(module, to_train=False)
        assert set(kept.state_dict()["weights"]) == {f"model.{i}.{kind}" for i in (0, 4) for kind in ("weight", "bias")}
        with pytest.raises(ValueError, match="no such trainable parameter"):
            kept.place(nn.Linear(2, 2), to_train=False)


def test_bytes_are_those_of_the_copy() -> None:
    """Trainable parameters and persistent buffers; frozen ones are shared."""
    module, copy = Normalised(), WeightCopy("Test")
    assert copy.num_bytes(module) == 4 * (6 * 8 + 8 + 2 * 4 + 2 * 4) + 8


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


class OldOutputs(ContinualCallback):
    """Computes with the copy of the first weights, before every step, inside what the strategy calls the forward."""

    def __init__(self) -> None:
        self.copy = WeightCopy("OldOutputs")
        self.outputs: list[Tensor] = []
        self.shards = True

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self.copy.take(pl_module)

    def around_step(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> Any:
        with self.copy.in_place(pl_module), torch.no_grad():
            self.outputs.append(run_in_forward(pl_module, pl_module.model, INPUTS).clone())
        return super().around_step(trainer, pl_module, batch, batch_idx)

    def on_validation_start(self, trainer: Any, pl_module: LightningModule) -> None:
        if self.copy:
            with self.copy.in_place(pl_module), torch.no_grad():
                self.outputs.append(run_in_forward(pl_module, pl_module.model, INPUTS).clone())

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        self.shards &= all(isinstance(p, DTensor) for p in pl_module.parameters())


class RootSharded(ToyModule):
    """All weights in one unit, which stays gathered after a forward."""

    def configure_model(self) -> None:
        if not isinstance(self.model[0].weight, DTensor):
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


STRATEGIES = {
    "blocks": lambda: FSDP2Strategy(wrap=["Linear"]),
    "root": lambda: FSDP2Strategy(wrap=["Dropout"]),
    "model-parallel": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
}


def fit_beside(root: Path, with_copy: bool, strategy: str) -> tuple[Tensor, list[Tensor], bool]:
    """Fit on this rank; return the weights, the outputs of the first weights, and whether weights stayed shards."""
    module, callback = (RootSharded if strategy == "model-parallel" else ToyModule)(), OldOutputs()
    callbacks = [callback] if with_copy else []
    trainer(root, callbacks, strategy=STRATEGIES[strategy](), devices=2).fit(module, datamodule=toy_stream())
    full = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return torch.cat([p.detach().flatten() for p in full]), callback.outputs, callback.shards


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_on_shards(two_ranks: Ranks, tmp_path: Path, strategy: str) -> None:
    """In blocks and in the root, in a step and in evaluation: the old outputs, and training as if nothing had been."""
    plain = two_ranks.run(fit_beside, tmp_path, False, strategy)[0][0]
    expected = ToyModule()(INPUTS).detach()
    for found, outputs, shards in two_ranks.run(fit_beside, tmp_path, True, strategy):
        assert torch.equal(found, plain)
        assert shards
        assert len(outputs) > 8
        for output in outputs:
            torch.testing.assert_close(output, expected)
