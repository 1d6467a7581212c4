"""Distances between a student and a teacher, against values by hand and autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from lightning_cl.functional.distillation import distillation_loss, feature_distance

GENERATOR = torch.Generator().manual_seed(3)
STUDENT, TEACHER = torch.randn(5, 4, generator=GENERATOR), torch.randn(5, 4, generator=GENERATOR)


def gradient(student: Tensor, teacher: Tensor, **settings: object) -> Tensor:
    """The gradient of the loss with respect to the student's scores."""
    student = student.clone().requires_grad_()
    distillation_loss(student, teacher, **settings).backward()
    return student.grad


def test_two_classes_by_hand() -> None:
    """The logistic function of the difference, at a temperature."""
    p, q = 1 / (1 + math.exp(-3 / 2)), 1 / (1 + math.exp(1 / 2))
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    found = distillation_loss(torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0, 0.0]]), temperature=2.0)
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_has_the_gradients_of_the_papers_cross_entropy(temperature: float) -> None:
    """Which are those of the divergence; a mean over samples, not over classes."""
    student = STUDENT.clone().requires_grad_()
    cross_entropy(student / temperature, (TEACHER / temperature).softmax(1)).backward()
    found = gradient(STUDENT, TEACHER, temperature=temperature)
    torch.testing.assert_close(found, student.grad)
    p, q = ((z / temperature).softmax(1) for z in (TEACHER, STUDENT))
    torch.testing.assert_close(found, (q - p) / (temperature * len(STUDENT)))
    assert distillation_loss(TEACHER, TEACHER, temperature) == 0


def test_squared_temperature_keeps_the_size_of_gradients() -> None:
    """At high temperatures the gradient is that of scores without their mean, and does not shrink."""
    centred = STUDENT - TEACHER - (STUDENT - TEACHER).mean(1, keepdim=True)
    limit = centred / (4 * len(STUDENT))
    found = gradient(STUDENT, TEACHER, temperature=1000.0, temperature_squared=True)
    torch.testing.assert_close(found, limit, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(gradient(STUDENT, TEACHER, temperature=1000.0), found / 1e6)


def test_only_the_classes_are_compared() -> None:
    """As if the others did not exist: no gradient reaches them."""
    classes = torch.tensor([0, 2])
    expected = distillation_loss(STUDENT[:, classes], TEACHER[:, classes])
    torch.testing.assert_close(distillation_loss(STUDENT, TEACHER, classes=classes), expected)
    assert (gradient(STUDENT, TEACHER, classes=classes)[:, [1, 3]] == 0).all()


def test_a_head_that_grew_is_compared_where_the_teacher_has_classes() -> None:
    """Its new classes have no teacher."""
    grown = torch.cat([STUDENT, torch.full((5, 2), 100.0)], dim=1)
    torch.testing.assert_close(distillation_loss(grown, TEACHER), distillation_loss(STUDENT, TEACHER))
    few, more = torch.tensor([1, 3]), torch.tensor([1, 3, 5])
    expected = distillation_loss(STUDENT, TEACHER, classes=few)
    torch.testing.assert_close(distillation_loss(grown, TEACHER, classes=more), expected)


@pytest.mark.parametrize("where", ["both", "student", "teacher"])
def test_masked_scores_leave_their_class_out(where: str) -> None:
    """Whoever masks them, without NaN in value or gradient."""
    student, teacher = STUDENT.clone(), TEACHER.clone()
    for scores, name in ((student, "student"), (teacher, "teacher")):
        if where in (name, "both"):
            scores[:, 1] = -torch.inf
    rest = torch.tensor([0, 2, 3])
    expected = distillation_loss(STUDENT, TEACHER, classes=rest)
    torch.testing.assert_close(distillation_loss(student, teacher), expected)
    torch.testing.assert_close(gradient(student, teacher), gradient(STUDENT, TEACHER, classes=rest))


def test_a_row_of_masked_scores_counts_as_zero() -> None:
    """It has no softmax, and must not spoil the other rows."""
    student, teacher = STUDENT.clone(), TEACHER.clone()
    student[0] = teacher[0] = -torch.inf
    expected = distillation_loss(STUDENT[1:], TEACHER[1:]) * 4 / 5
    torch.testing.assert_close(distillation_loss(student, teacher), expected)
    assert (gradient(student, teacher)[0] == 0).all()
    # scores of a masked head, far below all others, are no class either
    student[:, 1] = teacher[:, 1] = -1e9
    assert distillation_loss(student, teacher).isfinite()


def test_a_student_that_diverged_is_seen() -> None:
    """NaN is no mask."""
    student = STUDENT.clone()
    student[0, 0] = torch.nan
    assert distillation_loss(student, TEACHER).isnan()


def test_positions_count_alone() -> None:
    """A mean over supervised tokens; without any, a zero with a graph."""
    student, teacher = STUDENT.view(1, 5, 4), TEACHER.view(1, 5, 4)
    positions = torch.tensor([[True, False, True, True, False]])
    expected = distillation_loss(STUDENT[[0, 2, 3]], TEACHER[[0, 2, 3]])
    torch.testing.assert_close(distillation_loss(student, teacher, positions=positions), expected)
    student = student.clone().requires_grad_()
    none = distillation_loss(student, teacher, positions=torch.zeros(1, 5, dtype=torch.bool))
    assert none == 0
    none.backward()
    assert (student.grad == 0).all()


def test_half_precision_is_compared_in_float32() -> None:
    """Inside autocast as well."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = distillation_loss(STUDENT.bfloat16(), TEACHER.bfloat16())
        features = feature_distance(STUDENT, TEACHER, weight=torch.eye(4))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, distillation_loss(STUDENT.bfloat16().float(), TEACHER.bfloat16().float()))
    torch.testing.assert_close(features, (STUDENT - TEACHER).square().mean())


def test_features_by_hand() -> None:
    """Means over samples, positions and features; cosines over the last dimension; a filter on both."""
    student, teacher = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [0.0, 2.0]])
    assert feature_distance(student, teacher) == (1 + 1 + 1 + 4) / 4
    torch.testing.assert_close(feature_distance(student, teacher, "cosine"), torch.tensor((1 - 0.96 + 1) / 2))
    weight = torch.tensor([[1.0, 1.0]])
    assert feature_distance(student, teacher, weight=weight) == (0 + 1) / 2
    torch.testing.assert_close(feature_distance(student, -teacher, "cosine", weight=weight), torch.tensor(2.0))


def test_padding_changes_no_distance() -> None:
    """Positions that are left out count in no mean; without any, a zero with a graph."""
    padded = torch.cat([STUDENT[None], torch.full((1, 2, 4), 7.0)], dim=1)
    positions = torch.tensor([[True] * 5 + [False] * 2])
    teacher = pad(TEACHER[None], (0, 0, 0, 2))
    for kind in ("mse", "cosine"):
        found = feature_distance(padded, teacher, kind, positions=positions)
        torch.testing.assert_close(found, feature_distance(STUDENT, TEACHER, kind))
    student = STUDENT.clone().requires_grad_()
    feature_distance(student, TEACHER, positions=torch.zeros(5, dtype=torch.bool)).backward()
    assert (student.grad == 0).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    """A head that shrank, other samples, other features."""
    with pytest.raises(ValueError, match=r"\[5, 3\] must be those of the teacher's samples and classes \[5, 4\]"):
        distillation_loss(STUDENT[:, :3], TEACHER)
    with pytest.raises(ValueError, match=r"\[4, 4\] must be those"):
        distillation_loss(STUDENT[:4], TEACHER)
    with pytest.raises(ValueError, match=r"\[5, 3\] have not the shape \[5, 4\]"):
        feature_distance(STUDENT[:, :3], TEACHER)
