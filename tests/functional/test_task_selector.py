"""The selector against the conditions of its minimum, a closed form and a change of units."""

from __future__ import annotations

import pytest
import torch

from lightning_cl.functional.task_selector import train_selector


def data(tasks: int = 3, samples: int = 45, width: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian clusters that overlap."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.arange(samples) % tasks
    return torch.randn(tasks, width, generator=generator)[labels] + torch.randn(
        samples, width, generator=generator
    ), labels


@pytest.mark.parametrize("penalty", [1.0, 0.01])
def test_the_gradient_is_zero(penalty: float) -> None:
    """In features of mean 0 and variance 1; the loss is convex, so it is the minimum."""
    features, tasks = data()
    weight, bias = (part.double() for part in train_selector(features, tasks, 3, penalty))
    features = features.double()
    deviation = features.std(0, correction=0)
    standard = (features - features.mean(0)) / deviation
    errors = (features @ weight.T + bias).softmax(1) - torch.nn.functional.one_hot(tasks, 3)
    own = weight * deviation
    assert (errors.T @ standard / len(features) + penalty * own).abs().max() < 1e-6
    assert errors.mean(0).abs().max() < 1e-6


def test_only_the_bias_without_information() -> None:
    """Features that never vary: the odds are those of the counts, here 3 to 1."""
    weight, bias = train_selector(torch.full((8, 2), 7.0), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1]), 2, 0.01)
    assert not weight.any()
    torch.testing.assert_close((bias[0] - bias[1]).exp(), torch.tensor(3.0))


def test_units_of_features_do_not_matter() -> None:
    """One feature in thousands and shifted: the same scores."""
    features, tasks = data()
    weight, bias = train_selector(features, tasks, 3, 0.1)
    other = features * torch.tensor([1000.0, 1, 1, 0.001]) + torch.tensor([5.0, 0, -3, 0])
    scores = other @ train_selector(other, tasks, 3, 0.1)[0].T + train_selector(other, tasks, 3, 0.1)[1]
    torch.testing.assert_close(scores, features @ weight.T + bias, rtol=1e-3, atol=1e-3)


def test_works_where_gradients_are_off() -> None:
    """As at a task's boundary, and leaves none behind."""
    features, tasks = data()
    with torch.no_grad():
        weight, _ = train_selector(features, tasks, 3, 0.1)
    expected = train_selector(features, tasks, 3, 0.1)
    assert torch.equal(weight, expected[0])
    assert not weight.requires_grad
