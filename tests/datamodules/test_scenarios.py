"""Splits against hand-worked cases, counts and plain loops."""

from __future__ import annotations

import pickle
import time
from collections import Counter
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_cl.datamodules.scenarios import (
    Blurry,
    ClassIncremental,
    DataIncremental,
    DataInfo,
    DomainIncremental,
    Joint,
    Online,
    Permutation,
    Permuted,
    Predefined,
    Recurring,
    Rotated,
    Rotation,
    Scenario,
    TaskIncremental,
    TaskPlan,
)

DOMAINS = np.array(["web", "mail", "chat"] * 20)
INFO = DataInfo(length=60, labels=np.arange(60) % 6, domains=DOMAINS, boundaries=(0, 10, 30))
SPLITTING = [
    ClassIncremental(4),
    ClassIncremental(3, order="shuffled"),
    TaskIncremental(2, order=[5, 0, 4, 1, 3, 2]),
    DomainIncremental(),
    DomainIncremental(order="shuffled"),
    DataIncremental(7),
    Predefined(),
    Blurry(3),
    Blurry(3, stochastic=True),
    Online(ClassIncremental(2)),
]
REPEATING = [Permuted(3), Rotated(3), Recurring(ClassIncremental(3), 9)]


def indices(plans):
    """Return the indices of all tasks as lists."""
    return [plan.indices.tolist() for plan in plans]


@pytest.mark.parametrize("scenario", SPLITTING, ids=repr)
def test_every_sample_is_in_exactly_one_task(scenario):
    """Nothing is dropped and nothing doubled, in training and in evaluation, and `classes` says what occurs."""
    plans = scenario.plan(INFO, seed=3)
    assert sorted(chain.from_iterable(indices(plans))) == list(range(60))
    assert sorted(np.concatenate(scenario.evaluation(plans, INFO, seed=3)).tolist()) == list(range(60))
    for plan in plans:
        assert set(plan.classes) == set(INFO.labels[plan.indices].tolist())
        assert plan.indices.dtype == np.int64
    assert len({plan.name for plan in plans}) == len(plans)


@pytest.mark.parametrize("scenario", SPLITTING + REPEATING, ids=repr)
def test_plan_is_a_pure_function_of_the_seed(scenario):
    """The same seed gives the same stream; no global generator is read or moved."""
    first = scenario.plan(INFO, seed=5)
    state = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    again = scenario.plan(INFO, seed=5)
    parts = scenario.evaluation(again, INFO, seed=5)
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == state
    assert indices(first) == indices(again)
    assert [plan.name for plan in first] == [plan.name for plan in again]
    assert [part.tolist() for part in parts] == [p.tolist() for p in scenario.evaluation(first, INFO, seed=5)]


@pytest.mark.parametrize(
    "scenario",
    [
        ClassIncremental(3, order="shuffled"),
        DomainIncremental(order="shuffled"),
        DataIncremental(2),
        Blurry(3),
        Recurring(ClassIncremental(3), 30),
    ],
    ids=repr,
)
def test_seed_changes_what_is_random(scenario):
    """Some of a few seeds give another stream."""
    streams = {str(indices(scenario.plan(INFO, seed))) for seed in range(5)}
    assert len(streams) > 1


@pytest.mark.parametrize("scenario", SPLITTING + REPEATING, ids=repr)
def test_plans_and_scenarios_travel_to_other_processes(scenario):
    """A worker process gets the transform, and a rank the scenario, by pickle."""
    plans = pickle.loads(pickle.dumps(scenario)).plan(INFO, seed=1)
    assert indices(pickle.loads(pickle.dumps(plans))) == indices(scenario.plan(INFO, seed=1))


def test_first_tasks_get_the_extra_class():
    """Seven classes in three tasks: 3, 2, 2."""
    labels = np.array([6, 0, 1, 2, 3, 4, 5, 0])
    plans = ClassIncremental(3).plan(DataInfo(8, labels), seed=0)
    assert [plan.classes for plan in plans] == [(0, 1, 2), (3, 4), (5, 6)]
    assert indices(plans) == [[1, 2, 3, 7], [4, 5], [0, 6]]
    assert [plan.name for plan in plans] == ["classes 0-2", "classes 3-4", "classes 5-6"]


def test_class_order_may_be_given():
    """Labels need be neither dense nor ascending; tasks follow the list."""
    labels = np.array([10, 700, 3, 3])
    plans = ClassIncremental(2, order=[700, 3, 10]).plan(DataInfo(4, labels), seed=0)
    assert [plan.classes for plan in plans] == [(700, 3), (10,)]
    assert indices(plans) == [[1, 2, 3], [0]]


def test_names_of_many_classes_stay_short_and_apart():
    """Long lists of classes are cut, and the first class tells tasks apart."""
    plans = ClassIncremental(2, order="shuffled").plan(DataInfo(40, np.arange(40) % 20), seed=0)
    assert all(len(plan.name) < 30 for plan in plans)
    assert plans[0].name != plans[1].name


def test_evaluation_follows_the_classes_of_training():
    """Labels that no task trains on are left out, with a warning that counts them."""
    scenario = ClassIncremental(2, order=[2, 0, 1, 3])
    plans = scenario.plan(DataInfo(4, np.array([0, 1, 2, 3])), seed=0)
    with pytest.warns(UserWarning, match=r"2 of 7 evaluation samples have a label .*\(9\)"):
        parts = scenario.evaluation(plans, DataInfo(7, np.array([9, 3, 0, 2, 1, 9, 0])), seed=0)
    assert [part.tolist() for part in parts] == [[2, 3, 6], [1, 4]]


def test_domains_are_tasks_in_the_order_asked_for():
    """By value, by appearance, or as listed; a list from a command line is text."""
    numbers = DataInfo(5, np.zeros(5, dtype=int), domains=np.array([20, 3, 20, 100, 3]))
    assert [p.name for p in DomainIncremental("year").plan(numbers, seed=0)] == ["3", "20", "100"]
    assert [p.name for p in DomainIncremental(order="appearance").plan(numbers, seed=0)] == ["20", "3", "100"]
    scenario = DomainIncremental(order=["100", "3", "20"])
    plans = scenario.plan(numbers, seed=0)
    assert indices(plans) == [[3], [1, 4], [0, 2]]
    parts = scenario.evaluation(plans, DataInfo(3, None, domains=np.array([20, 100, 3])), seed=0)
    assert [part.tolist() for part in parts] == [[1], [2], [0]]


def test_data_incremental_sizes_and_mixture():
    """Ten samples in four tasks: 3, 3, 2, 2, not in the order of the dataset."""
    plans = DataIncremental(4).plan(DataInfo(10, None), seed=0)
    assert [len(plan.indices) for plan in plans] == [3, 3, 2, 2]
    assert list(chain.from_iterable(indices(plans))) != list(range(10))
    assert plans[0].classes == ()


def test_predefined_takes_the_datasets_of_the_list():
    """Parts of 10, 20 and 30 samples."""
    plans = Predefined().plan(INFO, seed=0)
    assert [(int(plan.indices[0]), len(plan.indices)) for plan in plans] == [(0, 10), (10, 20), (30, 30)]


def test_permutations_are_bijections_that_differ_by_task_and_stay():
    """Task 0 sees the inputs as they are; each other task has one permutation for all batches and parts."""
    plans = Permuted(3).plan(INFO, seed=0)
    assert plans[0].transform is None
    features = torch.arange(48).view(1, 3, 4, 4)
    orders = [plan.transform(features) for plan in plans[1:]]
    for order in orders:
        assert order.shape == features.shape
        assert sorted(order.flatten().tolist()) == list(range(48))
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], features)
    batch = torch.rand(5, 3, 4, 4)
    expected = batch.flatten(1)[:, orders[0].flatten()].view(5, 3, 4, 4)
    assert torch.equal(plans[1].transform(batch), expected)
    assert torch.equal(Permuted(3).plan(INFO, seed=0)[1].transform(batch), expected)
    assert not torch.equal(Permutation(seed=1, task=1)(batch), expected)


@pytest.mark.parametrize("shape", [(2, 5, 5), (2, 3, 6, 6), (2, 1, 4, 6)])
def test_quarter_turns_are_those_of_torch(shape):
    """Counter-clockwise about the centre; a half turn also of images that are not square."""
    images = torch.rand(shape)
    for turns in (1, 2, 3) if shape[-1] == shape[-2] else (2,):
        torch.testing.assert_close(
            Rotation(90.0 * turns)(images), torch.rot90(images, turns, dims=(-2, -1)), atol=1e-5, rtol=0
        )


def test_rotation_of_wide_images_keeps_angles():
    """A point right of the centre goes straight up by as many pixels, whatever the ratio of the sides."""
    image = torch.zeros(1, 5, 11)
    image[0, 2, 7] = 1.0
    turned = Rotation(90.0)(image)
    assert turned[0].argmax().item() == 0 * 11 + 5
    torch.testing.assert_close(turned.sum(), torch.tensor(1.0), atol=1e-5, rtol=0)


def test_rotation_of_flat_images():
    """`image_shape` says how to read them; channels are rotated alike."""
    images = torch.rand(4, 3, 5, 5)
    rotated = Rotation(30.0)(images)
    flat = Rotation(30.0, image_shape=(3, 5, 5))(images.flatten(1))
    torch.testing.assert_close(flat, rotated.flatten(1))
    torch.testing.assert_close(Rotation(30.0, (5, 5))(images[:, 0].flatten(1)), rotated[:, 0].flatten(1))
    assert (rotated - images).abs().max() > 0.1


def test_rotated_angles():
    """Evenly spaced over half a turn, or as given; the first task is not touched."""
    assert Rotated(4).degrees == [0.0, 45.0, 90.0, 135.0]
    plans = Rotated(degrees=[0, 15]).plan(INFO, seed=0)
    assert [plan.name for plan in plans] == ["rotation 0", "rotation 15"]
    assert plans[0].transform is None
    assert plans[1].transform.degrees == 15.0
    assert len(plans[1].indices) == 60


def test_blurry_counts():
    """As in the published CIFAR-10 split (T=5, N=50, M=10): 500 of 5000 leave, a fifth of the pool is dealt to each."""
    labels = np.repeat(np.arange(10), 500)
    plans = Blurry(5).plan(DataInfo(5000, labels), seed=2)
    table = np.array([np.bincount(labels[plan.indices], minlength=10) for plan in plans])
    disjoint = (table == 500).any(axis=0)
    assert disjoint.sum() == 5
    # one disjoint class per task, no sample of it elsewhere
    assert (table[:, disjoint] > 0).sum(axis=1).tolist() == [1] * 5
    assert (table[:, disjoint].sum(axis=0) == 500).all()
    blurry = table[:, ~disjoint]
    # 450 stay home, of the 50 that leave a fifth comes back by chance
    assert (blurry.max(axis=0) >= 450).all()
    assert (np.sort(blurry.argmax(axis=0)) == np.arange(5)).all()
    assert (blurry.sum(axis=1) == 500).all()  # 450 + an equal portion of the pool of 250
    assert 440 < blurry.max(axis=0).mean() - 10 < 460
    assert ((blurry > 0).sum(axis=0) == 5).all()
    # who leaves is random: not the samples that the dataset happens to list first
    label = int(np.flatnonzero(~disjoint)[0])
    home = plans[int(table[:, label].argmax())].indices
    away = np.setdiff1d(np.flatnonzero(labels == label), home) % 500
    assert 150 < away.mean() < 350


@pytest.mark.parametrize(("share", "level"), [(1.0, 0.5), (0.5, 0.0)])
def test_blurry_without_blur_is_class_incremental(share, level):
    """All classes disjoint, or nothing leaves home: no class in two tasks."""
    labels = np.arange(120) % 12
    plans = Blurry(4, disjoint_share=share, blurry_level=level).plan(DataInfo(120, labels), seed=0)
    assert Counter(label for plan in plans for label in plan.classes) == Counter(range(12))
    assert [len(plan.classes) for plan in plans] == [3] * 4


def test_blurry_full_blur_deals_every_sample():
    """No class disjoint, all samples in the pool: tasks of equal size that hold all classes."""
    labels = np.arange(1200) % 12
    plans = Blurry(4, disjoint_share=0.0, blurry_level=1.0).plan(DataInfo(1200, labels), seed=0)
    assert [len(plan.indices) for plan in plans] == [300] * 4
    assert all(plan.classes == tuple(range(12)) for plan in plans)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("n_classes", [4, 5, 7, 11])
def test_blurry_evaluates_each_class_at_its_home(n_classes, stochastic):
    """Home is where most of a blurry class is; sizes that do not divide leave no task without a class."""
    labels = np.arange(n_classes * 100) % n_classes
    info = DataInfo(len(labels), labels)
    scenario = Blurry(4, blurry_level=0.1, stochastic=stochastic)
    for seed in range(10):
        plans = scenario.plan(info, seed)
        table = np.array([np.bincount(labels[plan.indices], minlength=n_classes) for plan in plans])
        homes = np.array(
            [np.bincount(labels[part], minlength=n_classes) for part in scenario.evaluation(plans, info, seed)]
        )
        assert (homes.argmax(axis=0) == table.argmax(axis=0)).all()
        assert (homes.sum(axis=1) > 0).all()
        if not stochastic:
            held = (homes > 0).sum(axis=1)
            assert held.max() - held.min() <= 1


def test_stochastic_blurry_varies_sizes_and_keeps_the_level():
    """Exactly M of the blurry samples are in the pool; what tasks receive varies."""
    labels = np.arange(4000) % 40
    info = DataInfo(4000, labels)
    sizes, away = [], []
    for seed in range(20):
        scenario = Blurry(4, disjoint_share=0.5, blurry_level=0.2, stochastic=True)
        plans = scenario.plan(info, seed)
        home = np.empty(40, dtype=int)
        for task, part in enumerate(scenario.evaluation(plans, info, seed)):
            home[labels[part]] = task
        task_of = np.empty(4000, dtype=int)
        for task, plan in enumerate(plans):
            task_of[plan.indices] = task
        away.append((task_of != home[labels]).sum())
        sizes.append(tuple(len(plan.indices) for plan in plans))
    # 2000 blurry samples, a pool of 400, of which about a quarter falls back on its home
    assert max(away) <= 400
    assert 270 < np.mean(away) < 330
    assert len(set(sizes)) == 20
    assert np.ptp(sizes[0]) > 100


def test_recurring_visits_every_task_in_due_course():
    """Task k of K enters at visit floor(k V / K) at the latest, in order; visits share data and evaluation."""
    scenario = Recurring(ClassIncremental(6), n_visits=31)
    plans = scenario.plan(INFO, seed=4)
    visits = [plan.source for plan in plans]
    assert len(plans) == 31
    first = [visits.index(task) for task in range(6)]
    # after visit 0 nothing but task 1 is another task than the last
    assert first == [0, 1, 10, 15, 20, 25]
    assert all(a != b for a, b in pairwise(visits))
    base = ClassIncremental(6).plan(INFO, seed=4)
    for plan in plans:
        assert plan.indices.tolist() == base[plan.source].indices.tolist()
        assert plan.classes == base[plan.source].classes
    assert [plan.name for plan in scenario.parts(plans)] == [plan.name for plan in base]
    assert scenario.trained(plans) == [[task] for task in visits]
    expected = ClassIncremental(6).evaluation(base, INFO, seed=4)
    for wrapped in (scenario, Online(scenario)):
        parts = wrapped.evaluation(plans, INFO, seed=4)
        assert [part.tolist() for part in parts] == [part.tolist() for part in expected]
        assert len(wrapped.parts(plans)) == len(parts)
        assert wrapped.trained(plans) == scenario.trained(plans)
    assert [plan.name for plan in plans if plan.source == 2][:2] == ["class 2", "class 2 (return 1)"]
    assert len({plan.name for plan in plans}) == 31


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.5])
def test_returns_follow_the_power_law(exponent):
    """Counts of the returned task's rank by recency against the chances of the formula, added up visit by visit."""
    labels = np.arange(8)
    scenario = Recurring(ClassIncremental(8), n_visits=4000, exponent=exponent)
    visits = [plan.source for plan in scenario.plan(DataInfo(8, labels), seed=0)]
    last, observed, expected, variance = {}, np.zeros(8), np.zeros(8), np.zeros(8)
    for visit, task in enumerate(visits):
        if task in last:
            candidates = sorted((v, t) for t, v in last.items() if t != visits[visit - 1])
            candidates = [t for _, t in reversed(candidates)]  # latest first
            weight = np.array([(visit - last[t]) ** -exponent for t in candidates], dtype=float)
            chance = weight / weight.sum()
            observed[candidates.index(task)] += 1
            expected[: len(chance)] += chance
            variance[: len(chance)] += chance * (1 - chance)
        last[task] = visit
    # a sum of independent draws: within four standard deviations everywhere
    assert (np.abs(observed - expected) <= 4 * np.sqrt(variance) + 1e-9).all()
    assert observed.sum() > 3900


def test_large_exponent_keeps_to_recent_tasks():
    """With all weight on the latest, two tasks alternate; with none, returns reach far back."""
    info = DataInfo(8, np.arange(8))
    gaps = {}
    for exponent in (0.0, 30.0):
        visits = [plan.source for plan in Recurring(ClassIncremental(8), 800, exponent).plan(info, seed=1)]
        tail = visits[701:]
        gaps[exponent] = len(set(tail))
    assert gaps[30.0] <= 3
    assert gaps[0.0] == 8


def test_a_stream_of_one_task_repeats_it():
    """Nothing else could return."""
    plans = Recurring(DataIncremental(1), n_visits=3).plan(DataInfo(4, None), seed=0)
    assert [plan.source for plan in plans] == [0, 0, 0]


@pytest.mark.parametrize("inner", [ClassIncremental(3), Recurring(ClassIncremental(3), 8), Blurry(3)], ids=repr)
def test_joint_trains_all_tasks_at_once_and_evaluates_them_apart(inner):
    """One task with every sample once; the parts are those of the stream it is the bound of."""
    scenario = Joint(inner)
    (plan,) = scenario.plan(INFO, seed=2)
    plans = inner.plan(INFO, seed=2)
    assert plan.indices.tolist() == list(range(60))
    assert plan.classes == (0, 1, 2, 3, 4, 5)
    assert [part.name for part in scenario.parts([plan])] == [part.name for part in inner.parts(plans)]
    assert scenario.trained([plan]) == [[0, 1, 2]]
    expected = [part.tolist() for part in inner.evaluation(plans, INFO, seed=2)]
    assert [part.tolist() for part in scenario.evaluation([plan], INFO, seed=2)] == expected


def test_flags():
    """What the datamodule asks a scenario, through wrappers too."""
    assert TaskIncremental(2).reveals_task
    assert not ClassIncremental(2).reveals_task
    online = Online(DomainIncremental(by="site"))
    assert (online.single_pass, online.hides_boundaries, online.domain_column, online.needs_labels) == (
        True,
        True,
        "site",
        False,
    )
    recurring = Recurring(Online(Blurry(2)), 3)
    assert recurring.single_pass
    assert recurring.hides_boundaries
    assert recurring.needs_labels
    assert Recurring(TaskIncremental(2), 3).reveals_task


REFUSED = [
    (lambda: ClassIncremental(0), r"`n_tasks` must be at least 1, got 0"),
    (lambda: ClassIncremental(2, order="random"), "`order` must be 'sorted'.*'random'"),
    (lambda: DomainIncremental(order="random"), "`order` must be 'sorted'.*'random'"),
    (lambda: Blurry(2, disjoint_share=50), r"`disjoint_share` must be a fraction in \[0, 1\], got 50"),
    (lambda: Blurry(2, blurry_level=-0.1), "`blurry_level`.*got -0.1"),
    (lambda: Rotated(), "`Rotated` takes `n_tasks` or `degrees`"),
    (lambda: Rotated(n_tasks=2, degrees=[0, 1]), "`Rotated` takes `n_tasks` or `degrees`"),
    (lambda: Rotated(degrees=[]), "`degrees` must hold at least one"),
    (lambda: Rotated(degrees=[5, 5]), "`degrees` must hold.*none twice"),
    (lambda: Rotated(n_tasks=0), "`n_tasks` must be at least 1"),
    (lambda: Rotated(n_tasks=2, image_shape=(64,)), r"`image_shape` must be .*got \(64,\)"),
    (lambda: Recurring(ClassIncremental(2), 4, exponent=-1), "`exponent` must be at least 0, got -1"),
    (lambda: Recurring(ClassIncremental(2), 0), "`n_visits` must be at least 1"),
    (lambda: Recurring(Recurring(ClassIncremental(2), 4), 4), "cannot repeat a `Recurring`"),
    (lambda: Online(TaskIncremental(2)), r"`Online` hides the task boundaries that `TaskIncremental` reveals.*Use"),
    (lambda: DataInfo(3, np.zeros(2, dtype=int)), r"`labels` must hold one value for each of the 3.*\(2,\)"),
    (lambda: DataInfo(2, np.zeros(2)), "`labels` must be integers, got float64"),
    (lambda: TaskPlan("a", np.array([], dtype=np.int64), ()), "Task 'a' holds no training sample"),
    (lambda: TaskPlan("a", np.array([0.5]), ()), "Task 'a': `indices` must be a 1-D int64 array"),
    (lambda: TaskPlan("a", np.array([-1]), ()), "Task 'a': `indices` must be at least 0"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_settings_are_refused(make, message):
    """The message names the setting, what was given and the way out."""
    with pytest.raises(ValueError, match=message):
        make()


UNPLANNED = [
    (ClassIncremental(7), INFO, r"`n_tasks=7`.*has classes \(6\); set `n_tasks` to at most 6"),
    (Blurry(7), INFO, r"`n_tasks=7`.*has classes \(6\)"),
    (ClassIncremental(2, order=[0, 1, 2, 3, 4]), INFO, r"`order` leaves out labels .*\[5\]"),
    (ClassIncremental(2, order=[0, 1, 2, 3, 4, 5, 6]), INFO, r"`order` names labels .*lacks: \[6\]"),
    (ClassIncremental(2, order=[0, 1, 2, 3, 4, 5, 5]), INFO, r"`order` names labels twice: \[5\]"),
    (ClassIncremental(2), DataInfo(4, None), "`ClassIncremental` splits by label, but .* no labels"),
    (ClassIncremental(2), DataInfo(2, np.array([-100, 1])), "labels must be at least 0, got -100"),
    (DomainIncremental("site"), DataInfo(4, None), r"`DomainIncremental\(by='site'\)` needs a domain"),
    (DomainIncremental(order=["web", "mail"]), INFO, r"`order` leaves out domains .*\['chat'\]"),
    (DomainIncremental(order=["web", "mail", "chat", "fax"]), INFO, r"`order` names domains .*lacks: \['fax'\]"),
    (DomainIncremental(order=["web", "web", "mail", "chat"]), INFO, r"`order` names domains twice: \['web'\]"),
    (DataIncremental(5), DataInfo(4, None), r"`n_tasks=5`.*training set has samples \(4\)"),
    (Predefined(), DataInfo(4, None), "`train` is a single dataset. Give a list"),
    (Predefined(), DataInfo(4, None, boundaries=(0, 4)), "Task 'dataset 1' holds no training sample"),
    (Joint(Permuted(2)), INFO, "`Joint` cannot join the tasks of `Permuted`"),
    (Recurring(ClassIncremental(3), 2), INFO, r"`n_visits=2` is fewer than the 3 tasks"),
]


@pytest.mark.parametrize(("scenario", "info", "message"), UNPLANNED, ids=[row[2] for row in UNPLANNED])
def test_data_that_cannot_be_split_is_refused(scenario, info, message):
    """Before training, with the way out."""
    with pytest.raises(ValueError, match=message):
        scenario.plan(info, seed=0)


@pytest.mark.parametrize(
    ("scenario", "data", "message"),
    [
        (ClassIncremental(3), DataInfo(2, np.array([0, 5])), "no sample of task 'classes 2-3'"),
        (ClassIncremental(3), DataInfo(2, None), "no labels"),
        (DomainIncremental(), DataInfo(1, None, domains=np.array(["web"])), "no sample of task 'chat'"),
        (DataIncremental(3), DataInfo(2, None), "evaluation set has samples"),
        (Predefined(), DataInfo(2, None, boundaries=(0, 1)), "lists 3 datasets.*lists 2"),
        (Predefined(), DataInfo(2, None, boundaries=(0, 1, 2)), "no sample of task 'dataset 2'"),
        (Permuted(2), DataInfo(0, None), "no sample of task 'permutation 0'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_evaluation_sets_that_do_not_fit_are_refused(scenario, data, message):
    """A task without evaluation samples would have no score."""
    plans = scenario.plan(INFO, seed=0)
    with pytest.raises(ValueError, match=message):
        scenario.evaluation(plans, data, seed=0)


def test_transforms_refuse_what_they_cannot_read():
    """The message proposes the shape."""
    with pytest.raises(ValueError, match=r"set `image_shape=\(8, 8\)`"):
        Rotation(10.0)(torch.rand(2, 64))
    with pytest.raises(ValueError, match=r"`image_shape=\(8, 9\)` does not fit inputs of 64"):
        Rotation(10.0, (8, 9))(torch.rand(2, 64))
    with pytest.raises(ValueError, match=r"floating-point images, got torch.uint8"):
        Rotation(10.0)(torch.zeros(2, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="`seed` must be at least 0, got -1"):
        DataIncremental(2).plan(INFO, seed=-1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"class_path": "ClassIncremental", "init_args": {"n_tasks": 2, "order": [1, 0]}}, "order=[1, 0]"),
        ({"class_path": "TaskIncremental", "init_args": {"n_tasks": 2}}, "order='sorted'"),
        ({"class_path": "DomainIncremental", "init_args": {"by": "site", "order": ["a", "b"]}}, "order=['a', 'b']"),
        ({"class_path": "DomainIncremental", "init_args": {"order": "appearance"}}, "order='appearance'"),
        ({"class_path": "DataIncremental", "init_args": {"n_tasks": 3}}, "n_tasks=3"),
        ({"class_path": "Permuted", "init_args": {"n_tasks": 3}}, "n_tasks=3"),
        ({"class_path": "Rotated", "init_args": {"degrees": [0, 20.5], "image_shape": [8, 8]}}, "image_shape=(8, 8)"),
        ({"class_path": "Predefined", "init_args": {"names": ["a", "b"]}}, "names=['a', 'b']"),
        ({"class_path": "Blurry", "init_args": {"n_tasks": 2, "stochastic": True}}, "stochastic=True"),
        (
            {
                "class_path": "Recurring",
                "init_args": {
                    "scenario": {"class_path": "ClassIncremental", "init_args": {"n_tasks": 2}},
                    "n_visits": 5,
                    "exponent": 0.5,
                },
            },
            "n_visits=5, exponent=0.5",
        ),
        (
            {"class_path": "Rehearsed", "init_args": {"scenario": {"class_path": "Predefined"}, "weights": [1, 2.5]}},
            "ratio=0.05, weights=[1.0, 2.5]",
        ),
        (
            {
                "class_path": "Rehearsed",
                "init_args": {"scenario": {"class_path": "Predefined"}, "weights": [[0, 0], [1, 0]]},
            },
            "weights=[[0.0, 0.0], [1.0, 0.0]]",
        ),
        (
            {"class_path": "Online", "init_args": {"scenario": {"class_path": "Predefined"}}},
            "scenario=Predefined(names=None)",
        ),
    ],
)
def test_scenarios_are_built_from_a_configuration(settings, expected):
    """The typed signatures are the schema of the command line, and `repr` shows the settings."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--scenario", type=Scenario)
    parsed = parser.instantiate(parser.parse_object({"scenario": settings}))
    assert expected in repr(parsed.scenario)


def test_a_million_labels_split_fast():
    """No loop over samples: 100 tasks in well under a second, with room for a slow machine."""
    labels = np.random.default_rng(0).integers(0, 1000, size=1_000_000)
    info = DataInfo(len(labels), labels, domains=labels % 100)
    for scenario in (ClassIncremental(100), DomainIncremental(), DataIncremental(100), Blurry(100)):
        start = time.perf_counter()
        plans = scenario.plan(info, seed=0)
        assert time.perf_counter() - start < 1.0, scenario
        assert sum(len(plan.indices) for plan in plans) == 1_000_000
