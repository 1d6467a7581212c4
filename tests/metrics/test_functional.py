"""Metrics over the accuracy matrix: hand-worked numbers, missing entries, unfinished and recurring streams."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_cl import metrics

NAN = math.nan
# task 0 improves once and is then forgotten; task 1 is forgotten a little; the upper triangle was evaluated too
R = torch.tensor(
    [
        [0.80, 0.20, 0.10],
        [0.90, 0.70, 0.30],
        [0.40, 0.60, 0.80],
    ],
    dtype=torch.float64,
)
LOWER = torch.where(torch.ones(3, 3).tril().bool(), R, NAN)
# visits 0, 1, 0, 2: task 0 falls to 0.3 and is repaired to 0.7 before it falls again
RECURRING = torch.tensor(
    [
        [0.80, NAN, NAN],
        [0.30, 0.90, NAN],
        [0.70, 0.50, NAN],
        [0.60, 0.45, 0.95],
    ],
    dtype=torch.float64,
)
VISITS = [0, 1, 0, 2]


@pytest.mark.parametrize("matrix", [R, LOWER], ids=["full", "lower triangle"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("average_accuracy", (0.4 + 0.6 + 0.8) / 3),
        ("average_incremental_accuracy", (0.8 + (0.9 + 0.7) / 2 + (0.4 + 0.6 + 0.8) / 3) / 3),
        ("forgetting", ((0.9 - 0.4) + (0.7 - 0.6)) / 2),
        ("backward_transfer", ((0.4 - 0.8) + (0.6 - 0.7)) / 2),
        ("learning_accuracy", (0.8 + 0.7 + 0.8) / 3),
    ],
)
def test_hand_worked(name, expected, matrix):
    """The numbers of a three-task stream; what was measured before a task was learned plays no part."""
    actual = getattr(metrics, name)(matrix)
    assert actual.shape == ()
    assert actual.item() == pytest.approx(expected, abs=1e-12)


def test_forgetting_with_the_initial_reference_is_negative_backward_transfer():
    """0.8 - 0.4 and 0.7 - 0.6, the mean is 0.25."""
    assert metrics.forgetting(R, reference="initial").item() == pytest.approx(0.25)
    assert metrics.backward_transfer(R).item() == pytest.approx(-0.25)


def test_forgetting_per_task_marks_the_last_task_as_undefined():
    """One number for each previous task."""
    expected = torch.tensor([0.5, 0.1, NAN], dtype=torch.float64)
    torch.testing.assert_close(metrics.forgetting_per_task(R), expected, equal_nan=True)


def test_forgetting_is_negative_where_later_tasks_help():
    """The maximum stops before the last row, so an improvement shows."""
    assert metrics.forgetting(torch.tensor([[0.5, NAN], [0.75, 0.8]])).item() == pytest.approx(-0.25)


def test_forgetting_starts_where_the_task_was_learned():
    """The 0.95 on task 1 from before it was learned is no reference: 0.7 - 0.6 was lost, not 0.95 - 0.6."""
    matrix = R.clone()
    matrix[0, 1] = 0.95
    assert metrics.forgetting_per_task(matrix)[1].item() == pytest.approx(0.1)


def test_forward_transfer_compares_with_the_untrained_model():
    """R[0, 1] - b[1] = 0.1 and R[1, 2] - b[2] = 0.15; the first task has nothing before it."""
    baseline = torch.tensor([NAN, 0.10, 0.15], dtype=torch.float64)
    assert metrics.forward_transfer(R, baseline).item() == pytest.approx(0.125)


def test_intransigence_compares_with_the_joint_model():
    """0.95 - 0.8, 0.9 - 0.7 and 0.75 - 0.8, the mean is 0.1."""
    joint = torch.tensor([0.95, 0.90, 0.75], dtype=torch.float64)
    assert metrics.intransigence(R, joint).item() == pytest.approx(0.1)


def test_one_task_has_no_previous_tasks():
    """What is a mean over previous tasks is NaN, not 0; the rest is the score."""
    one = torch.tensor([[0.7]])
    for name in ("forgetting", "backward_transfer"):
        assert getattr(metrics, name)(one).isnan(), name
    assert metrics.forward_transfer(one, torch.zeros(1)).isnan()
    assert metrics.forgetting_per_task(one).isnan().all()
    for name in ("average_accuracy", "average_incremental_accuracy", "learning_accuracy"):
        assert getattr(metrics, name)(one).item() == pytest.approx(0.7), name


def test_unfinished_stream_gives_the_metrics_so_far():
    """Rows of NaN at the end do not count: the same numbers as from the rows learned."""
    allocated = torch.cat([LOWER[:2], torch.full((1, 3), NAN, dtype=torch.float64)])
    assert metrics.average_accuracy(allocated).item() == pytest.approx(0.8)
    assert metrics.forgetting(allocated).item() == pytest.approx(0.8 - 0.9)
    assert metrics.learning_accuracy(allocated).item() == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("name", "row", "task"),
    [
        ("average_accuracy", 2, 1),
        ("average_incremental_accuracy", 1, 0),
        ("forgetting", 2, 0),
        ("backward_transfer", 1, 1),
        ("learning_accuracy", 1, 1),
    ],
)
def test_missing_entry_that_is_needed_is_named(name, row, task):
    """The mean is never taken over what happens to be there."""
    holed = LOWER.clone()
    holed[row, task] = NAN
    with pytest.raises(ValueError, match=rf"{name} needs R\[{row}, {task}\]"):
        getattr(metrics, name)(holed)


def test_missing_entry_that_is_not_needed_is_ignored():
    """The maximum runs over the rows that were evaluated; the initial reference is needed when it is asked for."""
    holed = LOWER.clone()
    holed[0, 0] = NAN
    assert metrics.forgetting(holed).item() == pytest.approx(0.3)
    with pytest.raises(ValueError, match=r"R\[0, 0\]"):
        metrics.forgetting(holed, reference="initial")
    holed[1, 0] = NAN
    with pytest.raises(ValueError, match=r"R\[0, 0\]"):
        metrics.forgetting(holed)


def test_forward_transfer_and_intransigence_name_what_is_missing():
    """Entries above the diagonal, the baseline and the joint scores."""
    with pytest.raises(ValueError, match=r"forward_transfer needs R\[0, 1\]"):
        metrics.forward_transfer(LOWER, torch.zeros(3))
    with pytest.raises(ValueError, match=r"baseline\[2\] is NaN"):
        metrics.forward_transfer(R, torch.tensor([0.1, 0.1, NAN]))
    with pytest.raises(ValueError, match=r"joint\[0\] is NaN"):
        metrics.intransigence(R, torch.tensor([NAN, 0.1, 0.1]))
    with pytest.raises(ValueError, match=r"`joint` must be Tensor\[3\].*\(2,\)"):
        metrics.intransigence(R, torch.zeros(2))


def test_recurring_stream():
    """Tasks count from their first visit; the task visited last is not a previous one."""
    assert metrics.average_accuracy(RECURRING, trained=VISITS).item() == pytest.approx((0.6 + 0.45 + 0.95) / 3)
    incremental = (0.8 + (0.3 + 0.9) / 2 + (0.7 + 0.5) / 2 + (0.6 + 0.45 + 0.95) / 3) / 4
    assert metrics.average_incremental_accuracy(RECURRING, trained=VISITS).item() == pytest.approx(incremental)
    lost = metrics.forgetting_per_task(RECURRING, trained=VISITS)
    torch.testing.assert_close(lost, torch.tensor([0.2, 0.45, NAN], dtype=torch.float64), equal_nan=True)
    assert metrics.backward_transfer(RECURRING, trained=VISITS).item() == pytest.approx((-0.2 - 0.45) / 2)
    assert metrics.learning_accuracy(RECURRING, trained=VISITS).item() == pytest.approx((0.8 + 0.9 + 0.95) / 3)
    # after the third visit task 0 has just been trained again, so only task 1 can be forgotten
    assert metrics.forgetting(RECURRING[:3], trained=VISITS).item() == pytest.approx(0.4)


def test_joint_run_and_rows_that_learn_nothing():
    """One row may train all tasks; a row that learns none (a request to forget) leaves all tasks previous."""
    joint = torch.tensor([[0.9, 0.8, 0.7]])
    assert metrics.average_accuracy(joint, trained=[[0, 1, 2]]).item() == pytest.approx(0.8)
    assert metrics.learning_accuracy(joint, trained=[[0, 1, 2]]).item() == pytest.approx(0.8)
    assert metrics.forgetting(joint, trained=[[0, 1, 2]]).isnan()
    erased = torch.tensor([[0.9, NAN], [0.8, 0.7], [0.1, 0.6]])
    assert metrics.forgetting(erased, trained=[0, 1, []]).item() == pytest.approx((0.8 + 0.1) / 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.average_accuracy(torch.zeros(3)), r"`R` must be a floating-point.*\(3,\)"),
        (lambda: metrics.average_accuracy(torch.zeros(2, 2, dtype=torch.int64)), "int64"),
        (lambda: metrics.average_accuracy(torch.full((2, 2), NAN)), "holds no evaluation"),
        (lambda: metrics.average_accuracy(RECURRING), "4 rows were learned but there are 3 tasks; pass `trained`"),
        (lambda: metrics.average_accuracy(R, trained=[0]), "`trained` has 1 rows, but 3"),
        (lambda: metrics.average_accuracy(R, trained=[0, 1, 5]), "names task 5 in row 2; tasks go from 0 to 2"),
        (lambda: metrics.forgetting(R, reference="mean"), '"max" or "initial", got \'mean\''),
        (lambda: metrics.windowed_forgetting(torch.zeros(3), 1), "at least 2 evaluations, got 1"),
        (lambda: metrics.windowed_plasticity(torch.zeros(3, 1, 1), 2), "`curve` must be"),
        (lambda: metrics.min_accuracy(torch.zeros(3, 2), torch.zeros(2)), r"\(3, 2\) and \(2,\)"),
        (lambda: metrics.min_accuracy(torch.zeros(2, 2), torch.tensor([1, 0])), "must not decrease"),
    ],
)
def test_refuses_what_it_cannot_serve(call, message):
    """The message names the argument and what was given."""
    with pytest.raises(ValueError, match=message):
        call()


# evaluations during two tasks more than the first: each task dips within the next one and recovers
SCORES = torch.tensor(
    [
        [0.5, NAN, NAN],
        [0.9, NAN, NAN],  # end of task 0
        [0.2, 0.4, NAN],
        [0.8, 0.7, NAN],  # end of task 1
        [0.6, 0.1, 0.3],
        [0.7, 0.5, 0.8],  # end of task 2
    ],
    dtype=torch.float64,
)
TASKS = torch.tensor([0, 0, 1, 1, 2, 2])


def test_min_accuracy_takes_the_lowest_since_learned():
    """Task 0 fell to 0.2, task 1 to 0.1; 0.5 of task 0 and 0.4 of task 1 were measured before they were learned."""
    assert metrics.min_accuracy(SCORES, TASKS).item() == pytest.approx(0.15)
    assert metrics.min_accuracy(SCORES[:4], TASKS[:4]).item() == pytest.approx(0.2)
    assert metrics.min_accuracy(SCORES[:2], TASKS[:2]).isnan()


def test_worst_case_accuracy_weighs_the_current_task_with_one_over_k():
    """0.8 / 3 + 2 / 3 * 0.15; with one task it is the score."""
    assert metrics.worst_case_accuracy(SCORES, TASKS).item() == pytest.approx(0.8 / 3 + 2 / 3 * 0.15)
    assert metrics.worst_case_accuracy(SCORES[:2], TASKS[:2]).item() == pytest.approx(0.9)


def test_worst_case_accuracy_is_below_average_accuracy():
    """It bounds the average accuracy at the same moment from below."""
    assert metrics.worst_case_accuracy(SCORES, TASKS) < metrics.average_accuracy(SCORES[[1, 3, 5]])


def test_stability_over_a_recurring_stream():
    """In visits 0, 1, 0 the last visit trains task 0: only task 1 is previous, and its minimum is 0.4."""
    scores = torch.tensor([[0.9, NAN], [0.3, 0.8], [0.8, 0.4], [0.7, 0.6]])
    visits = torch.tensor([0, 1, 2, 2])
    assert metrics.min_accuracy(scores, visits, trained=[0, 1, 0]).item() == pytest.approx(0.4)
    assert metrics.worst_case_accuracy(scores, visits, trained=[0, 1, 0]).item() == pytest.approx((0.7 + 0.4) / 2)


def test_stability_names_what_is_missing():
    """A task never evaluated again, and a last evaluation without the current task."""
    with pytest.raises(ValueError, match="evaluation of task 0 after it was learned"):
        metrics.min_accuracy(torch.tensor([[0.9, NAN], [NAN, 0.8]]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"needs scores\[1, 1\]"):
        metrics.worst_case_accuracy(torch.tensor([[0.9, NAN], [0.5, NAN]]), torch.tensor([0, 1]))


def windowed_by_loops(curve: list[float], window: int, sign: int) -> float:
    """The definition as nested loops over windows and pairs."""
    largest = 0.0
    for end in range(len(curve)):
        start = max(0, end - window + 1)
        for m in range(start, end + 1):
            for n in range(m, end + 1):
                largest = max(largest, sign * (curve[m] - curve[n]))
    return largest


@pytest.mark.parametrize("window", [2, 3, 7, 100])
def test_windowed_metrics_equal_the_definition(window):
    """A random curve against nested loops, for windows shorter and longer than it."""
    curve = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    forgotten, gained = metrics.windowed_forgetting(curve, window), metrics.windowed_plasticity(curve, window)
    assert forgotten.item() == pytest.approx(windowed_by_loops(curve.tolist(), window, 1))
    assert gained.item() == pytest.approx(windowed_by_loops(curve.tolist(), window, -1))


def test_windowed_metrics_are_means_over_the_tasks_that_were_evaluated():
    """Window 2. Falls: 0.7, 0.6 and 0. Rises: 0.6, 0.4 and 0.5. A column without evaluations is left out."""
    scores = torch.cat([SCORES, torch.full((6, 1), NAN, dtype=torch.float64)], dim=1)
    assert metrics.windowed_forgetting(scores, 2).item() == pytest.approx((0.7 + 0.6 + 0.0) / 3)
    assert metrics.windowed_plasticity(scores, 2).item() == pytest.approx((0.6 + 0.4 + 0.5) / 3)
    assert metrics.windowed_forgetting(torch.full((4, 2), NAN), 2).isnan()


def test_windows_count_the_evaluations_of_the_task():
    """Gaps are closed first: 0.9 and 0.5 are neighbours."""
    assert metrics.windowed_forgetting(torch.tensor([0.9, NAN, NAN, 0.5]), 2).item() == pytest.approx(0.4)
