"""The reference classifier: an ordinary module that the command line can build."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_cl import ContinualMetrics
from lightning_cl.datamodules import TaskIncremental
from lightning_cl.modules import MLP, Classifier, TextClassifierNetwork
from lightning_cl.optim import SPAM
from toys import fit_stream, toy_data, toy_stream, trainer, weights


def classifier(**settings: object) -> Classifier:
    """A small classifier of the toy data, always with the same weights."""
    torch.manual_seed(2)
    return Classifier(MLP(6, 4, hidden=[8]), **settings)


@pytest.mark.parametrize(
    ("settings", "make"),
    [
        ({}, lambda p: torch.optim.Adam(p, lr=1e-3)),
        ({"learning_rate": 0.1, "optimizer": "sgd"}, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        (
            {"learning_rate": 0.01, "optimizer": "adamw", "weight_decay": 0.1},
            lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
        ),
        (
            {"learning_rate": 0.01, "optimizer": SPAM, "weight_decay": 0.1},
            lambda p: SPAM(p, lr=0.01, weight_decay=0.1),
        ),
    ],
    ids=["adam", "sgd", "adamw", "another"],
)
def test_trains_like_a_plain_loop(settings: dict[str, object], make: object, tmp_path: Path) -> None:
    """Cross-entropy and the optimizer that its settings name, over the stream's first task."""
    module, plain = classifier(**settings), classifier(**settings)
    optimizer = make(plain.parameters())
    seen = []

    class Keeping(Classifier):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            seen.append(batch)
            return super().training_step(batch, batch_idx)

    module.__class__ = Keeping
    fit_stream(tmp_path, module=module)
    for inputs, labels in seen:
        optimizer.zero_grad()
        cross_entropy(plain.network(inputs), labels).backward()
        optimizer.step()
    assert len(seen) == 12
    assert torch.equal(weights(module), weights(plain))


def test_logs_accuracy_and_loss_of_each_loader(tmp_path: Path) -> None:
    """In validation and in test, as means over samples."""
    module, metrics = classifier(), ContinualMetrics(directory=tmp_path)
    fit = trainer(tmp_path, [metrics])
    fit.fit(module, datamodule=toy_stream(batch_size=3, epochs_per_task=1))
    results = fit.test(module, datamodule=toy_stream(batch_size=3), verbose=False)
    inputs, labels = toy_data(16, seed=2).tensors
    for loader, (result, classes) in enumerate(zip(results, ([0, 1], [2, 3]), strict=True)):
        rows = torch.isin(labels, torch.tensor(classes))
        logits = module.network(inputs[rows]).detach()
        accuracy = (logits.argmax(-1) == labels[rows]).float().mean()
        assert result[f"test_acc/dataloader_idx_{loader}"] == pytest.approx(float(accuracy))
        loss = float(cross_entropy(logits, labels[rows]))
        assert result[f"test_loss/dataloader_idx_{loader}"] == pytest.approx(loss, rel=1e-5)


def test_predicts_classes(tmp_path: Path) -> None:
    """One label for each sample of the test set."""
    module = classifier()
    predicted = torch.cat(trainer(tmp_path).predict(module, datamodule=toy_stream()))
    assert torch.equal(predicted, module.network(toy_data(16, seed=2).tensors[0]).argmax(-1))


def test_masks_its_head_where_asked(tmp_path: Path) -> None:
    """Task-incremental with a mask is easier than without; masked it answers in the task only."""
    accuracy = {}
    for head_mask in ("none", "task"):
        module, metrics = classifier(head_mask=head_mask, learning_rate=0.05), ContinualMetrics(directory=tmp_path)
        fit_stream(tmp_path, [metrics], module=module, stream=toy_stream(scenario=TaskIncremental(n_tasks=2)))
        accuracy[head_mask] = metrics.compute()["average_accuracy"]
    assert accuracy["task"] > accuracy["none"] + 0.2


def test_batches_as_mappings() -> None:
    """Inputs go to the network by their names."""

    class Named(nn.Module):
        def forward(self, input_ids: Tensor, scale: Tensor) -> Tensor:
            return input_ids * scale

    module = Classifier(Named())
    batch = {"input_ids": torch.eye(3), "scale": torch.tensor(2.0), "labels": torch.arange(3)}
    loss, logits, labels = module._loss(batch)
    assert torch.equal(logits, 2 * torch.eye(3))
    assert loss == pytest.approx(-math.log(math.e**2 / (math.e**2 + 2)))
    assert torch.equal(labels, torch.arange(3))
    with pytest.raises(ValueError, match="needs batches"):
        module._loss(torch.eye(3))


def test_frozen_parameters_are_left_to_themselves() -> None:
    """The optimizer steps what trains."""
    module = classifier()
    module.network[1].requires_grad_(False)
    (group,) = module.configure_optimizers().param_groups
    assert [p.shape for p in group["params"]] == [p.shape for p in module.network[3].parameters()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "`learning_rate` must be above 0, got 0.0"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be above 0, got nan"),
        ({"optimizer": "lion"}, "`optimizer` must be.*got 'lion'"),
        ({"head_mask": "all"}, "`head_mask` must be.*got 'all'"),
        ({"weight_decay": -0.1}, "`weight_decay` must be at least 0, got -0.1"),
    ],
)
def test_settings_out_of_range(settings: dict[str, object], message: str) -> None:
    """Named, with what was given."""
    with pytest.raises(ValueError, match=message):
        classifier(**settings)


def test_adapters_from_a_config(tmp_path: Path) -> None:
    """All else is frozen, but what `modules_to_save` names; only that goes to the optimizer."""
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["1"], "modules_to_save": ["3"]}
    module = classifier(adapter=config)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    fit_stream(tmp_path, module=module)
    moved = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    path = "network.base_model.model"
    factors = {f"{path}.1.lora_{factor}.default.weight" for factor in "AB"}
    assert moved == factors | {f"{path}.3.modules_to_save.default.{name}" for name in ("weight", "bias")}


# ---------------------------------------------------------------------- networks


def test_mlp() -> None:
    """Linear layers with ReLU between them; no hidden layer gives a linear model."""
    network = MLP(6, 4, hidden=[8, 5])
    inputs = torch.randn(3, 2, 3)
    hidden = torch.relu(network[3](torch.relu(network[1](inputs.flatten(1)))))
    assert torch.equal(network(inputs), network[5](hidden))
    assert [type(layer).__name__ for layer in MLP(6, 4, hidden=[])] == ["Flatten", "Linear"]


def test_text_network_ignores_padding() -> None:
    """Padding on the right changes no logit; an empty text gives finite ones."""
    network = TextClassifierNetwork(vocabulary_size=20, num_outputs=3, width=8)
    tokens = torch.tensor([[3, 7, 1], [5, 5, 2]])
    padded = torch.cat([tokens, torch.zeros(2, 4, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(network(padded), network(tokens))
    mean = network.embedding(tokens).mean(1)
    torch.testing.assert_close(network(tokens), network.head(torch.relu(network.hidden(mean))))
    assert network(torch.zeros(1, 3, dtype=torch.int64)).isfinite().all()
