"""Linear probes against scikit-learn, and the reading of layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_cl.unlearning import LayerProbe, linear_probe, probe_layers
from toys import ToyModule, toy_data

pytest.importorskip("sklearn", reason="needs the extra `metrics`")


def clusters(samples: int = 40, distance: float = 6.0) -> tuple[Tensor, Tensor]:
    """Return features [n, 3] and labels of two clusters, in turn."""
    labels = torch.arange(samples) % 2
    return torch.randn(samples, 3) + distance * labels.unsqueeze(1), labels


def test_separate_clusters_are_read_and_noise_is_not() -> None:
    """Accuracy 1 and about one half; chance is the largest label's share of the half that is scored."""
    torch.manual_seed(0)
    assert linear_probe(*clusters()) == LayerProbe(1.0, 0.5)
    features, labels = torch.randn(400, 3), torch.arange(400) % 4 == 0
    noise = linear_probe(features, labels.long())
    assert noise.chance == 0.75
    assert abs(noise.accuracy - 0.75) < 0.06


def test_half_that_is_fitted_is_not_scored() -> None:
    """Labels drawn at random can be fitted in many dimensions, and not foretold."""
    torch.manual_seed(0)
    features, labels = torch.randn(80, 200), torch.randint(0, 2, (80,))
    assert linear_probe(features, labels).accuracy < 0.75


def test_is_that_of_scikit_learn() -> None:
    """On the halves that are drawn: standardised by the first one, default penalty."""
    from sklearn.linear_model import LogisticRegression

    from lightning_cl.unlearning.probing import _halves

    torch.manual_seed(1)
    features, labels = clusters(60, distance=0.0)
    # what tells the labels apart is too small for a penalised weight as it stands
    features[:, 0] = 1e-3 * (features[:, 0] + 2 * labels)
    first, second = _halves(labels, seed=3)
    mean, deviation = features[first].mean(0), features[first].std(0, correction=0)
    x = ((features - mean) / deviation).numpy()
    expected = LogisticRegression().fit(x[first], labels[first]).score(x[second], labels[second])
    assert linear_probe(features, labels, seed=3).accuracy == pytest.approx(expected)
    assert 0.5 < expected < 1


@pytest.mark.parametrize("seed", [0, 1])
def test_halves_share_each_label(seed) -> None:
    """Every row is in one of them, each label in both, an odd one more often in the first; the seed draws them."""
    from lightning_cl.unlearning.probing import _halves

    labels = torch.tensor([5, 5, 5, 2, 2, 9, 9, 9, 9, 9])
    first, second = _halves(labels, seed)
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(10))
    assert sorted(labels[first].tolist()) == [2, 5, 5, 9, 9, 9]
    assert sorted(first.tolist()) != sorted(_halves(labels, seed + 2)[0].tolist())


def test_refuses() -> None:
    """Shapes that do not fit, numbers that are none, labels without a second sample."""
    features, labels = clusters(8)
    with pytest.raises(ValueError, match=r"`features` must be Tensor\[N, D\]"):
        linear_probe(features, labels[:-1])
    with pytest.raises(ValueError, match="finite"):
        linear_probe(features.clone().fill_(torch.inf), labels)
    for wrong in (torch.zeros(8, dtype=torch.int64), torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])):
        with pytest.raises(ValueError, match="at least two samples each"):
            linear_probe(features, wrong)


def test_layers_of_a_module() -> None:
    """What each returns for the module's own inputs, in evaluation mode; the module stays as it is."""
    data = toy_data(40, classes=2)
    module = ToyModule(dropout=0.5)
    batches = [tuple(tensor[i : i + 16] for tensor in data.tensors) for i in range(0, 40, 16)]
    state = torch.get_rng_state()
    found = probe_layers(module, batches, data.tensors[1], layers=["model.2", "model.0"])
    assert list(found) == ["model.2", "model.0"]
    with torch.no_grad():
        expected = linear_probe(module.model[0](data.tensors[0]), data.tensors[1])
        hidden = linear_probe(module.model[0](data.tensors[0]).relu(), data.tensors[1])
    assert found == {"model.0": expected, "model.2": hidden}
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not module.model[0]._forward_hooks


class Sequences(ToyModule):
    """Answers mappings with positions; a layer that returns a tuple, and one that returns an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.recurrent = nn.GRU(3, 4, batch_first=True)
        self.image = nn.Identity()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return states [B, T, 4]."""
        states = self.recurrent(self.embed(input_ids))[0]
        self.image(states.transpose(1, 2).unsqueeze(-1))
        return states


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_positions_are_pooled_over_the_mask(pooling) -> None:
    """Padding has no part; the last position is the last one that is no padding."""
    torch.manual_seed(0)
    module = Sequences()
    tokens, lengths = torch.randint(0, 7, (24, 5)), torch.arange(24) % 4 + 2
    mask = (torch.arange(5) < lengths.unsqueeze(1)).long()
    labels = torch.arange(24) % 2
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    found = probe_layers(module, [batch], labels, layers=["recurrent", "image"], pooling=pooling)
    with torch.no_grad():
        states = module(tokens, mask)
    rows = [states[i, :n].mean(0) if pooling == "mean" else states[i, n - 1] for i, n in enumerate(lengths)]
    assert found["recurrent"] == linear_probe(torch.stack(rows), labels)
    assert found["image"] == linear_probe(states.mean(1), labels)


def test_a_layer_that_is_called_for_some_batches_only() -> None:
    """What it returned before is not taken for what it did not return now."""
    data = toy_data(16, classes=2)
    module = ToyModule()
    module.once = nn.Identity()
    calls = iter([True, False])
    module.register_forward_pre_hook(lambda _, inputs: (module.once(inputs[0]),) if next(calls) else None)
    batches = [tuple(tensor[rows] for tensor in data.tensors) for rows in (slice(0, 8), slice(8, 16))]
    with pytest.raises(ValueError, match=r"'once'.*was not called"):
        probe_layers(module, batches, data.tensors[1], layers=["once"])


def test_layers_refuse() -> None:
    """Nothing named, an unknown name, a layer that is not called, other labels, an unknown pooling."""
    data = toy_data(16, classes=2)
    module, batches = ToyModule(), [data.tensors]
    with pytest.raises(ValueError, match="`layers` names no submodule"):
        probe_layers(module, batches, data.tensors[1], layers=[])
    with pytest.raises(ValueError, match=r"'model\.9' names no submodule"):
        probe_layers(module, batches, data.tensors[1], layers=["model.9"])
    module.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'unused'.*was not called"):
        probe_layers(module, batches, data.tensors[1], layers=["unused"])
    with pytest.raises(ValueError, match=r"`labels` Tensor\[N\]"):
        probe_layers(module, batches, data.tensors[1][:4], layers=["model.0"])
    with pytest.raises(ValueError, match=r"pooling.*'max'"):
        probe_layers(module, batches, data.tensors[1], layers=["model.0"], pooling="max")
