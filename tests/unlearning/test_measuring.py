"""What a request did, in numbers."""

from __future__ import annotations

import pytest
import torch

from lightning_cl.unlearning.measuring import Scores, measured


def scores(labels: list[int], probability: list[float], loss: list[float], ids: list[int] | None = None) -> Scores:
    """Scores of samples, all on top."""
    rows = torch.tensor([[p, 1.0, value, value] for p, value in zip(probability, loss, strict=True)])
    return Scores(rows, torch.tensor([ids or list(range(len(labels))), labels]).T)


def test_samples_never_learned_are_of_the_forgotten_classes() -> None:
    """Of a class that is forgotten the unseen samples of others say nothing."""
    forget = scores([3, 3], [0.2, 0.4], [2.0, 1.0])
    holdout = scores([3, 5, 3, 5], [0.1, 0.9, 0.3, 0.9], [3.0, 0.1, 1.5, 0.1])
    found = measured({"forget": forget, "holdout": holdout})
    assert found["holdout/samples"] == 2
    assert found["holdout/probability"] == pytest.approx(0.2)
    # three of the four pairs have the higher loss unseen
    assert found["forget/membership_auc"] == pytest.approx(0.75)


def test_without_classes_all_count() -> None:
    """As for sequences, whose label is -1."""
    found = measured({"forget": scores([-1], [0.5], [1.0]), "holdout": scores([-1, -1], [0.2, 0.4], [2.0, 0.5])})
    assert found["holdout/samples"] == 2
    assert found["forget/membership_auc"] == pytest.approx(0.5)


def test_no_unseen_sample_of_the_class_is_no_measurement() -> None:
    """Nothing is said of them, nor of membership."""
    found = measured({"forget": scores([3], [0.5], [1.0]), "holdout": scores([5], [0.2], [2.0])})
    assert found.keys() == {"forget/samples", "forget/probability", "forget/accuracy"}


def test_each_identity_once() -> None:
    """However many ranks have read it."""
    once = scores([1, 2, 1, 2], [0.5, 0.7, 0.5, 0.7], [1.0, 2.0, 1.0, 2.0], ids=[8, 4, 8, 4]).once()
    assert once.ids.tolist() == [4, 8]
    assert once.labels.tolist() == [2, 1]
    assert once.probability.tolist() == pytest.approx([0.7, 0.5])
