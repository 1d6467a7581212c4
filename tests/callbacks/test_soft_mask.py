"""Soft masks beyond the contract: what is measured, of which units, and what is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.functional import cross_entropy

from language import llama, token_stream
from lightning_cl import SoftMask
from lightning_cl.callbacks.soft_mask import _spread
from lightning_cl.functional.masks import unit_importance
from ranks import Ranks
from toys import ToyModule, fit_stream, toy_data, toy_loaders, toy_stream, trainer
from users import Images


class Conv1D(nn.Module):
    """The linear layer of GPT-2, whose weight is [inputs, outputs]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 2)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Layers(ToyModule):
    """A convolution, an activation in place, a layer called twice, and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.conv, self.twice, self.last = nn.Conv1d(1, 5, 3), nn.Linear(4, 4), Conv1D(20, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = nn.functional.relu_(self.conv(inputs[:, None]))
        return self.last(torch.tanh(self.twice(self.twice(hidden))).flatten(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])


def by_weights(module: ToyModule, dims: dict[str, int]) -> dict[str, Tensor]:
    """A unit's gate feels, on a sample, the product of its weights and their gradients."""
    inputs, labels = toy_data().tensors
    sums = {path: torch.zeros(module.get_submodule(path).weight.shape[dim]) for path, dim in dims.items()}
    for x, y in zip(inputs[labels < 2], labels[labels < 2], strict=True):
        module.zero_grad()
        cross_entropy(module(x[None]), y[None]).backward()
        for path, dim in dims.items():
            layer = module.get_submodule(path)
            units = (layer.weight * layer.weight.grad).transpose(0, dim).flatten(1).sum(1)
            sums[path] += (units + layer.bias * layer.bias.grad).detach().abs()
    return {path: unit_importance(total) for path, total in sums.items()}


@pytest.mark.parametrize("batch_size", [24, 7])
def test_importance_of_units(batch_size: int, tmp_path: Path) -> None:
    """From gates, whatever the batch, what single samples give by their weights."""
    method, module = SoftMask(exclude=["model.*"]), Layers()
    loader = toy_loaders(batch_size)[0]
    trainer(tmp_path, [method], max_epochs=1).fit(module, loader, loader)
    expected = by_weights(module, {"conv": 0, "twice": 0, "last": 1})
    assert method.importance.keys() == expected.keys()
    for path, importance in method.importance.items():
        torch.testing.assert_close(importance, expected[path], rtol=0, atol=2e-5)
    masks = method._masks
    assert {n: tuple(m.shape) for n, m in masks.items()} == {
        **{"conv.weight": (5, 1, 1), "conv.bias": (5,), "twice.weight": (4, 1), "twice.bias": (4,)},
        **{"last.weight": (1, 4), "last.bias": (4,)},
    }
    torch.testing.assert_close(masks["last.weight"][0], 1 - expected["last"], rtol=0, atol=2e-5)


def test_the_first_task_is_undisturbed(tmp_path: Path) -> None:
    """Weights, statistics, dropout and generators are those of a run without it; the second task is held."""

    def run(callbacks: list[Any], tasks: int) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(2)
        module = Images()
        # a shuffled loader draws from the global generator, too
        data, check = (torch.utils.data.DataLoader(Images.samples(12), 4, shuffle=shuffle) for shuffle in (True, False))
        for _ in range(tasks):
            trainer(tmp_path, callbacks, max_epochs=2).fit(module, data, check)
        return module.state_dict(), torch.get_rng_state()

    (plain, rng), (masked, masked_rng) = run([], 1), run([SoftMask()], 1)
    assert all(torch.equal(value, masked[name]) for name, value in plain.items())
    assert torch.equal(rng, masked_rng)
    assert not torch.equal(run([], 2)[0]["head.weight"], run([SoftMask()], 2)[0]["head.weight"])


def test_importance_only_grows(tmp_path: Path) -> None:
    """The largest of all tasks; between 0 and 1."""
    method, module = SoftMask(), ToyModule()
    for number, loader in enumerate(toy_loaders()):
        before = {name: value.clone() for name, value in method.importance.items()}
        trainer(tmp_path, [method], max_epochs=1).fit(module, loader, loader)
        for name, value in method.importance.items():
            assert ((value >= 0) & (value <= 1)).all()
            assert number == 0 or ((value >= before[name]).all() and (value > before[name]).any())


def test_tokens_without_labels_do_not_count(tmp_path: Path) -> None:
    """Of a language model by its projections: padding and the size of batches change nothing."""
    found = []
    for batch_size in (2, 4):
        module, method = llama(learning_rate=1e-9), SoftMask(include=["*.up_proj.weight", "*.down_proj.weight"])
        stream = token_stream(padded=True, batch_size=batch_size, epochs_per_task=1)
        trainer(tmp_path, [method]).fit(module, datamodule=stream)
        assert len(method.importance) == 4
        found.append(method.importance)
    for name, importance in found[0].items():
        torch.testing.assert_close(importance, found[1][name], rtol=0, atol=1e-3)


class Summed(ToyModule):
    """A loss that is no mean over samples."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1], reduction="sum")


def test_a_loss_that_is_no_mean_is_measured_sample_by_sample(tmp_path: Path) -> None:
    """Found out before the first step, and kept in the state."""
    method, module = SoftMask(), Summed(learning_rate=0.001)
    loader = toy_loaders()[0]
    trainer(tmp_path, [method], max_epochs=1).fit(module, loader, loader)
    assert method.state_dict()["by_sample"] is True
    expected = by_weights(module, {"model.0": 0, "model.3": 0})
    for path, importance in method.importance.items():
        torch.testing.assert_close(importance, expected[path], rtol=0, atol=2e-5)


class Manual(ToyModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Unused(ToyModule):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


def test_what_cannot_be_served_is_refused(tmp_path: Path) -> None:
    """Before the first step."""
    with pytest.raises(ValueError, match="`n_samples` must be above 0, got 0"):
        SoftMask(n_samples=0)
    with pytest.raises(ValueError, match=r"`SoftMask\(\)` needs automatic optimization"):
        fit_stream(tmp_path, [SoftMask()], module=Manual())
    with pytest.raises(ValueError, match="found no trainable linear layer or convolution in ToyModule by"):
        fit_stream(tmp_path, [SoftMask(include=["*.bias"])])
    with pytest.raises(ValueError, match=r"No call of \['spare'\] was seen in a step of Unused"):
        fit_stream(tmp_path, [SoftMask(include=["spare.*"])], module=Unused())
    method = SoftMask()
    fit_stream(tmp_path, [method], module=Unused(), stream=toy_stream())
    with pytest.raises(ValueError, match="is of a layer 'spare' that the module has not"):
        fit_stream(tmp_path, [method], module=ToyModule())


def rows_on_this_rank(shape: list[int], dim: int) -> tuple[Tensor, Tensor]:
    """Spread one value for each unit over a weight sharded on its first dimension; return it and the weight's shard."""
    mesh = init_device_mesh("cpu", (2,))
    parameter = nn.Parameter(distribute_tensor(torch.zeros(shape), mesh, [Shard(0)]))
    spread = _spread(torch.arange(shape[dim], dtype=torch.float32), parameter, dim)
    return spread, spread.expand(parameter.to_local().shape)


@pytest.mark.distributed
def test_units_of_sharded_weights() -> None:
    """A rank holds the values of its rows, and those of all columns; uneven shards included."""
    ranks = Ranks(2)
    (first, whole_first), (second, whole_second) = ranks.run(rows_on_this_rank, [5, 3], 0)
    assert (first.flatten().tolist(), second.flatten().tolist()) == ([0.0, 1.0, 2.0], [3.0, 4.0])
    assert torch.equal(torch.cat([whole_first, whole_second]), torch.arange(5.0)[:, None].expand(5, 3))
    (_, whole_first), (_, whole_second) = ranks.run(rows_on_this_rank, [5, 3], 1)
    ranks.close()
    assert torch.equal(torch.cat([whole_first, whole_second]), torch.arange(3.0).expand(5, 3))


def test_a_layer_that_was_not_measured_is_refused(tmp_path: Path) -> None:
    """A later fit with another trainable layer would train it unmasked."""
    method, module = SoftMask(), ToyModule()
    module.model[0].requires_grad_(False)
    first, second = toy_loaders()
    trainer(tmp_path, [method], max_epochs=1).fit(module, first, first)
    module.model[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"importance of `SoftMask` has no entry for the layers \['model\.0'\]"):
        trainer(tmp_path, [method], max_epochs=1).fit(module, second, second)
