"""Estimators of the Fisher diagonal: closed form, plain loops, invariances."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_cl.functional import (
    FisherSums,
    LayerTape,
    SampleLoop,
    batched_fisher,
    empirical_fisher,
    exact_fisher,
    sampled_fisher,
)

CLASSES = 4


def _classifier():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(True), nn.Linear(6, CLASSES)).double()
    return model, torch.randn(7, 3, dtype=torch.float64), torch.randint(0, CLASSES, (7,))


def _language_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 5), nn.LayerNorm(5), nn.Linear(5, CLASSES)).double()
    labels = torch.randint(0, CLASSES, (6, 8))
    labels[0, 3:] = labels[1, :2] = -100
    labels[2] = -100
    return model, torch.randint(0, 9, (6, 8)), labels


def _names(model):
    return [name for name, _ in model.named_parameters()]


def _squares(model, loss):
    grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return {name: grad.square() for name, grad in zip(_names(model), grads, strict=True)}


def _total(rows):
    rows = list(rows)
    return {name: sum(row[name] for row in rows) for name in rows[0]}


def test_exact_fisher_of_softmax_regression_in_closed_form():
    """Logits W x + b: sum over x of x_j^2 p_k (1 - p_k) for W, and of p_k (1 - p_k) for b."""
    torch.manual_seed(0)
    model, inputs = nn.Linear(3, CLASSES).double(), torch.randn(7, 3, dtype=torch.float64)
    with LayerTape(model, _names(model)) as tape:
        logits = model(inputs)
        fisher = exact_fisher(tape, logits)
    variance = logits.softmax(1) * (1 - logits.softmax(1))
    torch.testing.assert_close(fisher.sums["weight"], variance.T @ inputs.square())
    torch.testing.assert_close(fisher.sums["bias"], variance.sum(0))
    assert fisher.count == 7


def test_exact_fisher_is_the_expectation_over_labels():
    """A loop over samples and classes, by autograd through log-softmax; the slow source gives the same."""
    model, inputs, _ = _classifier()
    log_p = model(inputs).log_softmax(1)
    rows = []
    for row in log_p:
        for value in row:
            rows.append({name: value.exp() * square for name, square in _squares(model, value).items()})
    expected = {name: value.detach() for name, value in _total(rows).items()}
    with LayerTape(model, expected) as tape:
        torch.testing.assert_close(exact_fisher(tape, model(inputs)).sums, expected)
    loop = SampleLoop(dict(model.named_parameters()))
    torch.testing.assert_close(_total(exact_fisher(loop, model(row)).sums for row in inputs.split(1)), expected)


def test_exact_fisher_with_classes_masked_out():
    """A logit of minus infinity is a class of probability 0, and no NaN."""
    model, inputs, _ = _classifier()
    with LayerTape(model, _names(model)) as tape:
        masked = exact_fisher(tape, model(inputs).masked_fill(torch.arange(CLASSES) == 1, -math.inf)).sums
        chosen = exact_fisher(tape, model(inputs)[:, [0, 2, 3]]).sums
    torch.testing.assert_close(masked, chosen)


def test_exact_fisher_refuses_positions():
    """The error names the way out."""
    model, inputs, _ = _language_model()
    with LayerTape(model, _names(model)) as tape, pytest.raises(ValueError, match=r"\(6, 8, 4\).*`sampled`"):
        exact_fisher(tape, model(inputs))


def test_empirical_fisher_is_the_square_of_true_gradients():
    """The loss of a sample is the sum over its supervised positions; one without any does not count."""
    for model, inputs, labels in (_classifier(), _language_model()):
        logits = model(inputs)
        losses = [
            F.cross_entropy(row.view(-1, CLASSES), label.view(-1), reduction="sum")
            for row, label in zip(logits, labels, strict=True)
        ]
        expected = _total(_squares(model, loss) for loss in losses)
        with LayerTape(model, expected) as tape:
            actual = empirical_fisher(tape, model(inputs), labels)
        torch.testing.assert_close(actual.sums, expected)
        assert actual.count == (7 if labels.dim() == 1 else 5)


def test_ignored_labels_and_padding_change_nothing():
    """Rows and positions of label -100 add exactly nothing, in both estimators that take labels."""
    model, inputs, labels = _language_model()
    more, none = torch.full((6, 3), 8), torch.full((6, 3), -100)
    wide, wide_labels = torch.cat([inputs, more], 1), torch.cat([labels, none], 1)
    keep = [0, 1, 3, 4, 5]
    with LayerTape(model, _names(model)) as tape:
        expected = empirical_fisher(tape, model(inputs[keep]), labels[keep])
        actual = empirical_fisher(tape, model(wide), wide_labels)
        torch.testing.assert_close(actual.sums, expected.sums)
        assert actual.count == expected.count == 5
        nothing = sampled_fisher(tape, model(inputs), torch.rand(6, 8), labels=torch.full_like(labels, -100))
    assert nothing.count == 0
    assert all(not value.any() for value in nothing.sums.values())


def test_sampled_fisher_uses_one_label_per_position():
    """The labels drawn, put in as true labels, give the same; left-out positions keep the draws of the others."""
    model, inputs, labels = _language_model()
    with LayerTape(model, _names(model)) as tape:
        logits = model(inputs)
        uniform = torch.rand(6, 8)
        drawn = (logits.softmax(-1).cumsum(-1) <= uniform.unsqueeze(-1)).sum(-1)
        assert drawn.unique().tolist() == [0, 1, 2, 3]
        for given in (None, labels):
            expected = empirical_fisher(tape, model(inputs), drawn if given is None else drawn.where(given >= 0, -100))
            actual = sampled_fisher(tape, model(inputs), uniform, labels=given)
            torch.testing.assert_close(actual.sums, expected.sums)
            assert actual.count == expected.count


def test_sampled_fisher_has_the_exact_one_as_its_mean():
    """4000 draws of one label for each sample."""
    model, inputs, _ = _classifier()
    with LayerTape(model, _names(model)) as tape:
        exact = exact_fisher(tape, model(inputs)).sums
        drawn = sampled_fisher(tape, model(inputs.repeat(4000, 1)), torch.rand(28000)).sums
    for name, value in exact.items():
        torch.testing.assert_close(drawn[name] / 4000, value, rtol=0.1, atol=0.02 * value.max().item())


def test_sampled_labels_avoid_classes_of_probability_zero():
    """At both ends of the uniform interval, of which rounding may reach the upper one."""
    model = nn.Linear(1, CLASSES)
    for number in (0.0, 1.0):
        with LayerTape(model, ["bias"]) as tape:
            logits = model(torch.ones(50, 1)) + torch.tensor([-math.inf, 0.0, 0.0, -math.inf])
            sums = sampled_fisher(tape, logits, torch.full((50,), number)).sums["bias"]
        assert sums[0] == sums[3] == 0
        assert sums[1] > 0


@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_batch_size_changes_nothing(estimator, size):
    """The same sums in batches of any size, in the accumulators given."""
    model, inputs, labels = _classifier()
    uniform = torch.rand(7)

    def estimate(tape, x, y, random, into):
        logits = model(x)
        if estimator == "exact":
            return exact_fisher(tape, logits, into=into)
        if estimator == "sampled":
            return sampled_fisher(tape, logits, random, into=into)
        return empirical_fisher(tape, logits, y, into=into)

    with LayerTape(model, _names(model)) as tape:
        expected = estimate(tape, inputs, labels, uniform, None)
        into = {name: torch.zeros_like(value) for name, value in expected.sums.items()}
        batches = zip(inputs.split(size), labels.split(size), uniform.split(size), strict=True)
        count = sum(estimate(tape, x, y, u, into).count for x, y, u in batches)
    torch.testing.assert_close(into, expected.sums)
    assert count == 7


def test_batched_fisher_is_the_square_of_the_sum():
    """By hand: gradients 1 and -3 give (1 - 3)^2, not 1 + 9; one sample at a time gives the empirical Fisher."""
    layer = nn.Linear(1, 1, bias=False)
    loss = layer(torch.tensor([[1.0], [-3.0]])).sum()
    assert batched_fisher({"weight": layer.weight}, loss, 2) == FisherSums({"weight": torch.tensor([[4.0]])}, 2)

    model, inputs, labels = _classifier()
    params = dict(model.named_parameters())
    rows = zip(inputs.split(1), labels.split(1), strict=True)
    single = _total(batched_fisher(params, F.cross_entropy(model(x), y), 1).sums for x, y in rows)
    with LayerTape(model, params) as tape:
        torch.testing.assert_close(single, empirical_fisher(tape, model(inputs), labels).sums)


def test_half_precision_logits_use_float32():
    """Softmax and squares are float32 whatever the model's dtype."""
    model, inputs, labels = _classifier()
    with LayerTape(model, _names(model)) as tape:
        expected = empirical_fisher(tape, model(inputs), labels).sums
    with LayerTape(model.bfloat16(), _names(model)) as tape:
        actual = empirical_fisher(tape, model(inputs.bfloat16()), labels).sums
    for name, value in expected.items():
        assert actual[name].dtype == torch.float32
        torch.testing.assert_close(actual[name].double(), value, rtol=0.1, atol=0.02 * value.max().item())


def test_labels_must_fit():
    """One label, or one random number, for each position."""
    model, inputs, labels = _language_model()
    with LayerTape(model, _names(model)) as tape, pytest.raises(ValueError, match=r"`uniform` of shape \(6,\)"):
        sampled_fisher(tape, model(inputs), torch.rand(6))
    with LayerTape(model, _names(model)) as tape, pytest.raises(ValueError, match=r"\(6, 7\) do not fit.*\(6, 8, 4\)"):
        empirical_fisher(tape, model(inputs), labels[:, 1:])
