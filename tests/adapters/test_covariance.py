"""One matrix for each different input of adapted layers, over all samples and no padding."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

from lightning_cl.adapters import AdapterSlots
from lightning_cl.adapters.covariance import covariance_dtype, input_covariances
from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.rng import rng_state
from toys import LoraToy, fit_stream, toy_data, trainer


class Collect(AdapterSlots):
    """Reads the inputs when a task starts, and keeps what it found."""

    def __init__(self, n_samples=None):
        super().__init__(capacity=8)
        self.n_samples = n_samples
        self.found = []
        self.states = []

    def on_task_start(self, trainer, pl_module, task):
        super().on_task_start(trainer, pl_module, task)
        self.states.append(rng_state()["torch"])
        self.found.append(input_covariances(trainer, pl_module, self.slots, BatchAdapter(), self.n_samples))
        self.states.append(rng_state()["torch"])
        assert pl_module.training
        assert all(p.grad is None for p in pl_module.parameters())


class Attention(nn.Module):
    """Three projections of one input, and one of what they make of it."""

    def __init__(self, sometimes=False):
        super().__init__()
        self.q, self.k, self.v, self.o, self.idle = (nn.Linear(4, 4) for _ in range(5))
        self.sometimes = sometimes
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        queries = self.q(inputs)
        # the second batch has keys of another input
        keys = self.k(2 * inputs if self.sometimes and self.calls % 2 == 0 else inputs)
        scores = queries @ keys.mT
        return self.o(scores.softmax(-1) @ self.v(inputs))


class Sequences(LightningModule):
    """Dict batches with a mask; a step that logs and has dropout."""

    def __init__(self, sometimes=False, targets="qkvo"):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = LoraConfig(r=2, target_modules=list(targets) if targets != "idle" else ["idle"])
            self.model = get_peft_model(Attention(sometimes), config)

    def training_step(self, batch, batch_idx):
        loss = self.model(nn.functional.dropout(batch["input_ids"], 0.5, self.training)).square().mean()
        self.log("loss", loss)
        # an adapter that the step does not call has no gradient
        return loss + 0 * sum(p.sum() for p in self.parameters() if p.requires_grad)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def sequences():
    """Six texts of three tokens, some of them padding, in batches of two."""
    inputs = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]] * 2)
    rows = [{"input_ids": x, "attention_mask": m} for x, m in zip(inputs, mask, strict=True)]
    return inputs, mask.bool(), DataLoader(rows, batch_size=2)


def collected(tmp_path, module, **settings):
    """What a fit of one epoch finds."""
    callback = Collect(**settings)
    trainer(tmp_path, [callback], max_epochs=1).fit(module, sequences()[2])
    return {name.rpartition(".")[2]: found for name, found in callback.found[0].items()}


def test_they_are_means_over_the_task(tmp_path):
    """Of the network's inputs, and of the hidden layer's as the network computes them then."""
    callback = Collect()
    fit_stream(tmp_path, [callback], module=LoraToy(dropout=0.3))
    inputs, labels = toy_data().tensors
    network = LoraToy().model.base_model.model
    for task, pair in enumerate(([0, 1], [2, 3])):
        x = inputs[torch.isin(labels, torch.tensor(pair))]
        first, second = callback.found[task].values()
        torch.testing.assert_close(first, (x.T @ x / 24).double(), rtol=1e-6, atol=1e-6)
        if task == 0:
            hidden = network[0](x).relu().detach()
            torch.testing.assert_close(second, (hidden.T @ hidden / 24).double(), rtol=1e-6, atol=1e-6)
    assert torch.equal(callback.states[0], callback.states[1])
    assert torch.equal(callback.states[2], callback.states[3])


def test_some_samples_are_enough(tmp_path):
    """As many of the task as were asked for: a matrix of no higher rank."""
    callback = Collect(n_samples=3)
    fit_stream(tmp_path, [callback], module=LoraToy())
    assert int(torch.linalg.matrix_rank(next(iter(callback.found[0].values())))) == 3


def test_padding_does_not_count_and_one_input_has_one_matrix(tmp_path):
    """Queries, keys and values share it; the output has its own."""
    found = collected(tmp_path, Sequences())
    inputs, mask, _ = sequences()
    x = inputs[mask].double()
    torch.testing.assert_close(found["q"], x.T @ x / len(x))
    assert found["q"] is found["k"] is found["v"]
    assert (found["o"] - found["q"]).abs().max() > 0.01


def test_layers_that_share_their_input_in_some_batches_only_have_their_own(tmp_path):
    """Another pass finds both right."""
    module = Sequences(sometimes=True)
    found = collected(tmp_path, module)
    inputs, mask, _ = sequences()
    x = inputs[mask].double()
    torch.testing.assert_close(found["q"], x.T @ x / len(x))
    torch.testing.assert_close(found["v"], found["q"])
    assert found["v"] is not found["q"]
    scales = torch.ones(6, 3)
    # the counter of calls begins anew for the second pass
    scales[[2, 3]] = 2.0
    y = (scales[..., None] * inputs)[mask].double()
    torch.testing.assert_close(found["k"], y.T @ y / len(y))


def test_an_input_changed_in_place_is_another(tmp_path):
    """The same tensor with other values, as a fused residual makes it."""
    module = Sequences(targets="qo")
    network = module.model.base_model.model
    network.forward = lambda inputs: network.o(inputs.mul_(2) if network.q(inputs).sum().isfinite() else inputs)
    found = collected(tmp_path, module)
    torch.testing.assert_close(found["o"], 4 * found["q"])


def test_a_layer_that_is_not_called_has_zeros(tmp_path):
    """And a step that calls none of them is refused before the first step."""
    found = collected(tmp_path, Sequences(targets=["q", "idle"]))
    assert not found["idle"].any()
    assert found["q"].any()
    with pytest.raises(ValueError, match=r"Sequences calls none of its adapted layers.*idle"):
        collected(tmp_path, Sequences(targets="idle"))


def test_wide_layers_are_summed_in_single_precision():
    """A matrix of 4096 inputs has 64 MB then."""
    cpu = torch.device("cpu")
    assert covariance_dtype(2048, cpu) == torch.float64
    assert covariance_dtype(2049, cpu) == torch.float32
