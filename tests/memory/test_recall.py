"""Recall schedules: laws over many draws, exact turns, hand-worked densities, and what a checkpoint brings back."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_cl.memory import Collateral, Drawn, PowerLaw, Recall, ReplayBuffer, TaskUniform, Uniform, ViewBatch
from lightning_cl.memory.recall import distinct, weighted

Buffers = list[ReplayBuffer]


def team(recall: str | Recall, counts: Sequence[int], *, world_size: int = 1, **settings: Any) -> Buffers:
    """Return the buffers of all ranks with so many samples of each task, dealt out in turn; labels are 0 and 1."""
    settings = {"capacity": sum(counts)} | settings
    buffers = [ReplayBuffer(recall=recall, rank=r, world_size=world_size, **settings) for r in range(world_size)]
    for task, ids in enumerate(torch.arange(sum(counts)).split(list(counts))):
        present(buffers, ids, task)
    return buffers


def present(buffers: Buffers, ids: Tensor, task: int) -> None:
    """Insert a global batch, dealt out to the ranks in turn."""
    owners = ids % len(buffers)
    for rank, buffer in enumerate(buffers):
        buffer.insert({"x": ids[owners == rank]}, ids, labels=ids % 2, task=task, owners=owners)


def resumed(buffers: Buffers, recall: str | Recall, world_size: int) -> Buffers:
    """Return other buffers that went on from a checkpoint of these, which was written to disk."""
    state = pickle.loads(pickle.dumps(ReplayBuffer.merge_states([buffer.state_dict() for buffer in buffers])))
    others = [
        ReplayBuffer(buffers[0].capacity, recall=recall, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for other in others:
        other.load_state_dict(state)
    return others


def ids_of(buffer: ReplayBuffer, size: int, step: int, **settings: Any) -> list[int]:
    """Return the identities of a draw, after a look at its payload."""
    drawn = buffer.draw(size, step=step, **settings)
    assert isinstance(drawn, Drawn)
    assert torch.equal(drawn.columns["x"], drawn.sample_ids)
    return drawn.sample_ids.tolist()


def within_chance(observed: Sequence[float], expected: Sequence[float]) -> None:
    """Refuse counts whose chi-square is above what comes by chance once in some 10,000 times."""
    assert sum(observed) == pytest.approx(sum(expected))
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    freedom = len(observed) - 1
    # Wilson and Hilferty's cube root of it is about normal
    normal = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert normal < 3.7


def successive(weights: Sequence[float], size: int) -> dict[tuple[int, ...], float]:
    """Return the chance of every sequence of distinct choices, each in proportion to the weights that are left."""
    chances: dict[tuple[int, ...], float] = {}
    for sequence in itertools.permutations(range(len(weights)), size):
        left, chance = sum(weights), 1.0
        for chosen in sequence:
            chance *= weights[chosen] / left
            left -= weights[chosen]
        chances[sequence] = chance
    return chances


# ---------------------------------------------------------------------- weighted draws


def test_a_weighted_draw_is_successive() -> None:
    """All sequences of three of five, with weights 3, 3, 1, 1 and 0.5."""
    groups, weights, draws = np.array([0, 0, 1, 1, 2]), np.array([3.0, 1.0, 0.5]), 8000
    generator = torch.Generator().manual_seed(3)
    found = Counter(tuple(weighted(groups, np.bincount(groups), weights, 3, generator).tolist()) for _ in range(draws))
    chances = successive([3.0, 3.0, 1.0, 1.0, 0.5], 3)
    within_chance([found[key] for key in chances], [draws * chance for chance in chances.values()])


def test_a_draw_from_many_keeps_the_law() -> None:
    """By rejection: groups in proportion to number times weight, members alike, and none twice."""
    count, size, draws = 4000, 4, 4000
    groups = np.arange(count) % 10 // 4  # of 10 there are 4, 4 and 2
    weights, generator = np.array([0.5, 0.1, 0.0]), torch.Generator().manual_seed(5)
    found = np.concatenate(
        [weighted(groups, np.bincount(groups), weights, size, generator) for _ in range(draws)]
    ).reshape(draws, size)
    assert all(len(set(row)) == size for row in found.tolist())
    shares = np.bincount(groups[found.flatten()], minlength=3)
    assert shares[2] == 0
    within_chance(shares[:2].tolist(), [draws * size * 5 / 6, draws * size / 6])
    first = np.flatnonzero(groups == 0)
    members = np.bincount(found.flatten(), minlength=count)[first].reshape(100, -1).sum(1)
    within_chance(members.tolist(), [members.sum() / 100] * 100)


def test_a_draw_that_gives_up_rejection_goes_on_from_what_it_has() -> None:
    """Two of eight members with a chance among 200: in one draw of ten too few of the candidates win."""
    groups, weights = np.repeat([0, 1], [192, 8]), np.array([0.0, 1.0])
    generator = torch.Generator().manual_seed(2)
    draws = [weighted(groups, np.bincount(groups), weights, 2, generator).tolist() for _ in range(2000)]
    assert all(len(set(draw)) == 2 for draw in draws)
    found = Counter(i for draw in draws for i in draw)
    within_chance([found[i] for i in range(192, 200)], [500.0] * 8)


def test_the_first_of_a_draw_is_chosen_first() -> None:
    """In a pass over all: 100 members of weight 10 against 200 of weight 1."""
    groups, weights = np.repeat([0, 1], [200, 100]), np.array([1.0, 10.0])
    generator = torch.Generator().manual_seed(4)
    firsts = [weighted(groups, np.bincount(groups), weights, 290, generator)[0] >= 200 for _ in range(1000)]
    within_chance([sum(firsts), 1000 - sum(firsts)], [1000 * 5 / 6, 1000 / 6])


def test_a_heavy_member_among_many_comes_first_and_once() -> None:
    """Rejection gives up after it was found; the pass over all goes on from there."""
    groups = np.zeros(5000, dtype=np.int64)
    groups[[7, 8]] = 1
    generator = torch.Generator().manual_seed(0)
    found = weighted(groups, np.bincount(groups), np.array([1e-4, 1.0]), 10, generator).tolist()
    assert len(set(found)) == 10
    counts = Counter(
        sum(i in (7, 8) for i in weighted(groups, np.bincount(groups), np.array([1e-4, 1.0]), 2, generator).tolist())
        for _ in range(400)
    )
    # 2 against 0.4998 for the first, 1 against 0.4998 for the second
    both = 2 / 2.4998 * 1 / 1.4998
    one = 2 / 2.4998 * 0.4998 / 1.4998 + 0.4998 / 2.4997 * 2 / 2.4997
    within_chance([counts[2], counts[1], counts[0]], [400 * both, 400 * one, 400 * (1 - both - one)])


def test_members_of_weight_0_fill_up() -> None:
    """After all others, each as likely; where all weigh 0 the draw is uniform."""
    groups, counts, generator = np.array([1, 0, 1, 0, 0]), np.array([3, 2]), torch.Generator().manual_seed(1)
    draws = [weighted(groups, counts, np.array([0.0, 1.0]), 3, generator).tolist() for _ in range(600)]
    assert all(set(draw[:2]) == {0, 2} for draw in draws)
    thirds = Counter(draw[2] for draw in draws)
    within_chance([thirds[i] for i in (1, 3, 4)], [200.0] * 3)
    none = Counter(weighted(groups, counts, np.zeros(2), 1, generator).item() for _ in range(1000))
    within_chance([none[i] for i in range(5)], [200.0] * 5)
    assert sorted(weighted(groups, counts, np.array([0.0, 1.0]), 9, generator).tolist()) == [0, 1, 2, 3, 4]


def test_distinct_numbers() -> None:
    """From few and from many."""
    generator = torch.Generator().manual_seed(0)
    for count, size in ((10, 10), (10, 3), (100_000, 50)):
        found = distinct(count, size, generator)
        assert len(set(found.tolist())) == size
        assert set(found.tolist()) <= set(range(count))


# ---------------------------------------------------------------------- power law


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_power_law_of_the_tasks(exponent: float, world_size: int) -> None:
    """In task 3, one sample a draw: number of samples times 3, 2 and 1 tasks ago to the power of -b; alike within."""
    counts, draws = [40, 4, 20, 30], 2000
    buffers = team(PowerLaw(exponent), counts, world_size=world_size)
    found = Counter(i for step in range(draws) for buffer in buffers for i in ids_of(buffer, 1, step, task=3))
    chances = [40 * 3**-exponent, 4 * 2**-exponent, 20.0]
    expected = [draws * world_size * chance / sum(chances) for chance in chances]
    within_chance([sum(found[i] for i in part) for part in (range(40), range(40, 44), range(44, 64))], expected)
    within_chance([found[i] for i in range(40)], [sum(found[i] for i in range(40)) / 40] * 40)
    assert not any(found[i] for i in range(64, 94)), "the running task is in the incoming batches"


def test_power_law_without_replacement() -> None:
    """A task with one sample gives it once a draw; the running task fills up."""
    (buffer,) = team("power_law", [1, 3, 5])
    chances = successive([1 / 2, 1, 1, 1], 2)
    alone = sum(chance for sequence, chance in chances.items() if 0 in sequence)
    draws = [ids_of(buffer, 2, step, task=2) for step in range(2000)]
    count = sum(0 in draw for draw in draws)
    within_chance([count, 2000 - count], [2000 * alone, 2000 * (1 - alone)])
    filled = [ids_of(buffer, 6, step, task=2) for step in range(50)]
    assert all(set(draw[:4]) == {0, 1, 2, 3} and len(set(draw)) == 6 for draw in filled)


def test_power_law_from_many_is_that_of_few() -> None:
    """By rejection, after the memory has let samples go: tasks in proportion to what it holds of them."""
    (buffer,) = team("power_law", [3000, 3000, 3000], capacity=4000)
    held = np.bincount(buffer.tasks.numpy())
    found: Counter[int] = Counter()
    for step in range(2000):
        drawn = buffer.draw(4, step=step, task=2)
        assert drawn is not None
        assert len(set(drawn.sample_ids.tolist())) == 4
        found.update(drawn.tasks.tolist())
    masses = [held[0] / 2, held[1]]
    within_chance([found[0], found[1]], [8000 * mass / sum(masses) for mass in masses])
    assert found[2] == 0


def test_power_law_before_any_earlier_task_is_uniform() -> None:
    """There is nothing else to draw from."""
    (buffer,) = team("power_law", [10])
    found = Counter(i for step in range(1000) for i in ids_of(buffer, 2, step, task=0))
    within_chance([found[i] for i in range(10)], [200.0] * 10)


def test_power_law_from_given_tasks() -> None:
    """The law among them."""
    (buffer,) = team("power_law", [10, 10, 10])
    found = Counter(i // 10 for step in range(3000) for i in ids_of(buffer, 1, step, task=4, tasks=[0, 2]))
    within_chance([found[0], found[2]], [3000 * 2 / 6, 3000 * 4 / 6])
    assert found[1] == 0


@pytest.mark.parametrize("recall", [PowerLaw(1.5), Collateral()])
def test_groups_follow_evictions_and_purges(recall: Recall) -> None:
    """What a schedule knows of slots is what the buffer says of them, and a checkpoint brings the same draws."""
    buffers = team(recall, [30, 30], world_size=2, capacity=20)
    for ids in torch.arange(60, 100).split(7):
        present(buffers, ids, 2)
    removed = torch.cat([buffer.sample_ids[1::3] for buffer in buffers])
    for buffer in buffers:
        buffer.purge(removed)
    present(buffers, torch.arange(100, 103), 3)
    again = resumed(buffers, recall, 2)
    for buffer, other in zip(buffers, again, strict=True):
        mine: Any = buffer.recall
        groups = mine._tasks if isinstance(mine, PowerLaw) else mine._groups
        if isinstance(mine, PowerLaw):
            assert groups.values.tolist() == buffer.tasks.tolist()
        else:
            pairs = list(mine._partitions)
            assert [pairs[g // 3] for g in groups.values] == [
                (int(t), int(i) % 2) for t, i in zip(buffer.tasks, buffer.sample_ids, strict=True)
            ]
        assert groups.counts.tolist() == np.bincount(groups.values, minlength=len(groups.counts)).tolist()
        assert [ids_of(buffer, 4, s, task=4) for s in range(9)] == [ids_of(other, 4, s, task=4) for s in range(9)]


# ---------------------------------------------------------------------- uniform over tasks


@pytest.mark.parametrize("world_size", [1, 2])
def test_tasks_are_as_likely_whatever_is_kept_of_them(world_size: int) -> None:
    """In task 3, one sample a draw: a third of each earlier task, alike within; none of the running one."""
    draws = 2000
    buffers = team("task_uniform", [40, 4, 20, 30], world_size=world_size)
    found = Counter(i for step in range(draws) for buffer in buffers for i in ids_of(buffer, 1, step, task=3))
    parts = [sum(found[i] for i in part) for part in (range(40), range(40, 44), range(44, 64))]
    within_chance(parts, [draws * world_size / 3] * 3)
    within_chance([found[i] for i in range(40)], [parts[0] / 40] * 40)
    assert not any(found[i] for i in range(64, 94)), "the running task is in the incoming batches"


def test_uniform_over_the_given_tasks() -> None:
    """Two of three earlier ones, after the memory has let samples go; all of them where there are too few."""
    (buffer,) = team("task_uniform", [30, 30, 30, 6], capacity=40)
    found: Counter[int] = Counter()
    for step in range(1000):
        drawn = buffer.draw(1, step=step, task=3, tasks=[0, 2])
        assert drawn is not None
        found.update(drawn.tasks.tolist())
    within_chance([found[0], found[2]], [500.0, 500.0])
    everything = buffer.draw(99, step=0, task=3, tasks=[0, 1])
    assert everything is not None
    assert sorted(everything.sample_ids.tolist()) == sorted(buffer.sample_ids[buffer.tasks < 2].tolist())


# ---------------------------------------------------------------------- view batch


def test_turns_are_exact() -> None:
    """Seven samples, three a draw: each comes again only after all six others; a hash orders the first round."""
    (buffer,) = team(ViewBatch(views=1), [7])
    order = [i for step in range(14) for i in ids_of(buffer, 3, step)]
    assert sorted(order[:7]) == list(range(7))
    assert order[:7] != list(range(7))
    assert order == (order[:7] * 6)


def test_another_seed_orders_ties_otherwise() -> None:
    """And not in the order in which they came."""
    orders = {tuple(ids_of(team(ViewBatch(1), [7], seed=seed)[0], 7, 0)) for seed in range(4)}
    assert len(orders) == 4


def test_views_come_at_once() -> None:
    """Two distinct samples four times each; with a size that four does not divide the last comes less often."""
    (buffer,) = team("view_batch", [6])
    first = ids_of(buffer, 8, 0)
    assert first == [first[0]] * 4 + [first[4]] * 4
    assert first[0] != first[4]
    rest = [ids_of(buffer, 6, step) for step in (1, 2)]
    assert [Counter(draw).most_common() for draw in rest] == [[(draw[0], 4), (draw[4], 2)] for draw in rest]
    assert {*first, *rest[0], *rest[1]} == set(range(6))
    assert Counter(ids_of(buffer, 100, 3)) == dict.fromkeys(range(6), 4), "all there are, four times each"


def test_newcomers_go_behind_and_the_interval_holds_while_the_memory_changes() -> None:
    """Between two draws of a sample, every other that was there all the time came; evictions leave no gap."""
    buffers = team(ViewBatch(views=2), [40], world_size=2, capacity=24)
    last: dict[int, int] = {}
    log: list[list[int]] = [[], []]
    there: list[list[set[int]]] = [[], []]
    for step in range(60):
        for rank, buffer in enumerate(buffers):
            drawn = ids_of(buffer, 6, step)
            assert len(drawn) == 6
            held = set(buffer.sample_ids.tolist())
            assert set(drawn) <= held
            for sample in drawn[::2]:
                if sample in last:
                    between = range(last[sample] + 1, len(log[rank]))
                    always = set.intersection(*(there[rank][i] for i in range(last[sample], len(log[rank]))), held)
                    assert always - {sample} <= {log[rank][i] for i in between}
                last[sample] = len(log[rank])
                log[rank].append(sample)
                there[rank].append(held)
        if step % 3 == 0:
            present(buffers, torch.arange(40 + 5 * step, 45 + 5 * step), 1)
    assert len(set(log[0])) > 14, "new ones came in"


def test_turns_survive_a_purge() -> None:
    """The others keep their order."""
    (buffer,) = team(ViewBatch(1), [9])
    order = ids_of(buffer, 9, 0)
    buffer.purge(torch.tensor(order[2:5]))
    assert ids_of(buffer, 6, 1) == order[:2] + order[5:]
    assert ids_of(buffer, 6, 2) == order[:2] + order[5:]
    (buffer,) = team(ViewBatch(1), [9])
    ids_of(buffer, 9, 0)
    buffer.purge(torch.tensor(order[5:8]))
    rest = order[:5] + order[8:]
    assert [ids_of(buffer, 2, step) for step in range(1, 7)] == [rest[:2], rest[2:4], rest[4:]] * 2


def test_turns_among_given_tasks() -> None:
    """The longest waiting of them; they too go behind."""
    (buffer,) = team(ViewBatch(1), [4, 4])
    order = ids_of(buffer, 8, 0)
    old = [i for i in order if i < 4]
    assert ids_of(buffer, 2, 1, tasks=[0]) == old[:2]
    assert ids_of(buffer, 8, 2) == [i for i in order if i not in old[:2]] + old[:2]
    # so many that numpy does not put a part of them in order by the way
    (buffer,) = team(ViewBatch(1), [2000, 4])
    order = ids_of(buffer, 2004, 0)
    assert ids_of(buffer, 1000, 1, tasks=[0]) == [i for i in order if i < 2000][:1000]


def test_turns_after_a_checkpoint() -> None:
    """The same on as many ranks; on one, those that waited longest on any rank come first."""
    buffers = team(ViewBatch(1), [12], world_size=2)
    for step in range(5):
        for buffer in buffers:
            ids_of(buffer, 4, step)
    coming = [ids_of(copy.deepcopy(buffer), 6, 5) for buffer in buffers]
    for buffer, expected in zip(resumed(buffers, ViewBatch(1), 2), coming, strict=True):
        assert ids_of(buffer, 6, 5) == expected
    (alone,) = resumed(buffers, ViewBatch(1), 1)
    order = ids_of(alone, 12, 5)
    for turn in range(6):
        assert set(order[2 * turn : 2 * turn + 2]) == {coming[0][turn], coming[1][turn]}
    three = resumed(buffers, ViewBatch(1), 3)
    assert sorted(i for buffer in three for i in ids_of(buffer, 4, 5)) == list(range(12))


def test_a_long_run_of_turns_takes_little_memory() -> None:
    """Turns that were given up are cleared away."""
    (buffer,) = team(ViewBatch(1), [10])
    for step in range(500):
        ids_of(buffer, 3, step)
    recall: Any = buffer.recall
    assert len(recall._queue) <= 40


# ---------------------------------------------------------------------- collateral damage


def judged(buffer: ReplayBuffer, hits: dict[int, int], task: int) -> None:
    """Tell what the model had right."""
    buffer.observe(torch.tensor(list(hits)), torch.tensor(list(hits.values())), task=task)


def damaged(**settings: float) -> ReplayBuffer:
    """Six samples of task 0, the first four right at its end; labels alternate between 0 and 1."""
    (buffer,) = team(Collateral(**settings), [6])
    judged(buffer, {0: 0, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1}, task=0)
    judged(buffer, {0: 1, 4: 0, 5: 0}, task=0)  # the last time counts
    recall: Any = buffer.recall
    assert recall._groups.counts.tolist() == [0, 2, 1, 0, 2, 1], "by partition: unknown, right, wrong"
    return buffer


def densities(buffer: ReplayBuffer) -> dict[tuple[int, int], float]:
    """Return what the schedule estimates."""
    assert isinstance(buffer.recall, Collateral)
    return buffer.recall.densities


def test_densities_by_hand() -> None:
    """Of label 0, samples 0 and 2 were right and one is wrong now; of label 1, one was and still is."""
    buffer = damaged(decay=0.5, floor=0.1)
    assert densities(buffer) == {(0, 0): 1 / 2, (0, 1): 1 / 2}
    judged(buffer, {0: 1, 2: 0, 1: 1}, task=1)
    assert densities(buffer) == {(0, 0): (1 + 1) / (2 + 2), (0, 1): (0 + 1) / (1 + 2)}
    judged(buffer, {2: 0}, task=1)
    assert densities(buffer) == {(0, 0): (0.5 + 1 + 1) / (1 + 1 + 2), (0, 1): (0 + 1) / (0.5 + 2)}


def test_samples_that_were_wrong_are_no_damage() -> None:
    """They count in no density until they are right in a rehearsal, and then they do."""
    buffer = damaged(decay=0.5, floor=0.1)
    judged(buffer, {4: 0}, task=1)
    assert densities(buffer)[0, 0] == 1 / 2
    judged(buffer, {4: 1}, task=1)
    assert densities(buffer)[0, 0] == 1 / 2
    judged(buffer, {4: 0}, task=2)
    assert densities(buffer)[0, 0] == (1 + 1) / (1 + 2)


def test_samples_that_were_never_judged_are_no_damage() -> None:
    """Until they are right in a rehearsal; none of the fresh ones here was."""
    (buffer,) = team(Collateral(decay=0.5), [6])
    judged(buffer, {0: 0, 2: 1}, task=1)
    assert densities(buffer)[0, 0] == 1 / 2
    judged(buffer, {0: 0, 2: 0}, task=1)
    assert densities(buffer)[0, 0] == (1 + 1) / (1 + 2)


def test_a_sample_seen_in_its_own_task_is_no_damage() -> None:
    """Nor does it count twice where it is incoming and drawn: the incoming one stands last."""
    buffer = damaged(decay=0.5)
    judged(buffer, {1: 0}, task=0)
    judged(buffer, {1: 0}, task=1)
    assert densities(buffer) == {(0, 0): 1 / 2, (0, 1): 1 / 2}
    buffer.observe(torch.tensor([3, 3]), torch.tensor([1, 0]), task=1)
    assert densities(buffer)[0, 1] == (1 + 1) / (1 + 2)


def test_hits_of_incoming_samples_count_when_they_enter() -> None:
    """A step is judged before its samples are in the memory; those of the step before are forgotten."""
    (buffer,) = team(Collateral(decay=0.0), [2], capacity=9)
    judged(buffer, {2: 1, 3: 0, 4: 1}, task=0)
    present([buffer], torch.arange(2, 4), 0)
    judged(buffer, {9: 1}, task=0)
    present([buffer], torch.arange(4, 6), 0)
    states = dict(zip(buffer.sample_ids.tolist(), buffer.state_dict()["recall_state"]["states"].tolist(), strict=True))
    assert states == {0: 0, 1: 0, 2: 1, 3: 2, 4: 0, 5: 0}


def chances_by_hand(weights: dict[int, float], buffer: ReplayBuffer, task: int, draws: int = 2000) -> None:
    """Compare single draws with weights."""
    found = Counter(i for step in range(draws) for i in ids_of(buffer, 1, step, task=task))
    assert found.keys() <= weights.keys()
    total = sum(weights.values())
    within_chance([found[i] for i in weights], [draws * weight / total for weight in weights.values()])


def test_chances_follow_densities() -> None:
    """Two thirds for each of label 0 that was right, 1/3 for label 1, the floor for those that were wrong."""
    buffer = damaged(decay=0.9, floor=0.1)
    judged(buffer, {2: 0, 1: 1}, task=1)
    present([buffer], torch.arange(0, 6), 1)  # held already
    chances_by_hand({0: 2 / 3, 1: 1 / 3, 2: 2 / 3, 3: 1 / 3, 4: 0.1, 5: 0.1}, buffer, task=1)


def test_the_floor_holds_where_nothing_is_damaged() -> None:
    """A density of 1/12 after ten hits in a row, below a floor of 1/4."""
    buffer = damaged(decay=0.999999, floor=0.25)
    for _ in range(10):
        judged(buffer, {1: 1}, task=1)
    assert densities(buffer)[0, 1] == pytest.approx(1 / 12, rel=1e-4)
    chances_by_hand({0: 0.5, 1: 0.25, 2: 0.5, 3: 0.25, 4: 0.25, 5: 0.25}, buffer, task=1)


def test_without_a_floor_wrong_samples_only_fill_up() -> None:
    """And samples of the running task do in any case; what was never judged comes like what was right."""
    buffer = damaged(floor=0.0)
    chances_by_hand(dict.fromkeys(range(4), 1.0), buffer, task=1)
    draws = [ids_of(buffer, 5, step, task=1) for step in range(20)]
    assert all(set(draw[:4]) == {0, 1, 2, 3} and draw[4] in (4, 5) for draw in draws)
    chances_by_hand(dict.fromkeys(range(6), 1.0), buffer, task=0)
    (fresh,) = team(Collateral(floor=0.0), [4, 2])
    chances_by_hand(dict.fromkeys(range(4), 1.0), fresh, task=1)


def test_damage_is_found() -> None:
    """A class that the model loses comes back more and more, with no forward but of what is drawn anyway."""
    (buffer,) = team("collateral", [200])
    judged(buffer, dict.fromkeys(range(200), 1), task=0)
    shares = []
    for step in range(200):
        drawn = buffer.draw(16, step=step, task=1)
        assert drawn is not None
        judged(buffer, {i: i % 2 for i in drawn.sample_ids.tolist()}, task=1)  # all of label 0 are lost
        shares.append((drawn.sample_ids % 2 == 0).float().mean().item())
    assert shares[0] < 0.7
    assert np.mean(shares[-100:]) > 0.93
    assert densities(buffer)[0, 0] > 0.95


def test_collateral_after_a_checkpoint() -> None:
    """Each rank goes on alone on as many; on another number they join what they counted, and know every sample."""
    buffers = team(Collateral(decay=0.5), [12], world_size=2)
    for rank, buffer in enumerate(buffers):
        judged(buffer, {i: int(i != 3) for i in range(rank, 12, 2)}, task=0)
        judged(buffer, {i: int(i < 6) for i in range(rank, 12, 2)}, task=1)
    again = resumed(buffers, Collateral(decay=0.5), 2)
    for buffer, other in zip(buffers, again, strict=True):
        assert densities(other) == densities(buffer)
        assert [ids_of(other, 3, s, task=1) for s in range(9)] == [ids_of(buffer, 3, s, task=1) for s in range(9)]
    # of label 1, on rank 1, sample 3 was wrong: five were right, of which 7, 9 and 11 are lost
    assert densities(buffers[1]) == {(0, 1): (3 + 1) / (5 + 2)}
    (alone,) = resumed(buffers, Collateral(decay=0.5), 1)
    assert densities(alone) == {(0, 0): (3 + 1) / (6 + 2), (0, 1): (3 + 1) / (5 + 2)}
    merged = dict(zip(alone.sample_ids.tolist(), alone.state_dict()["recall_state"]["states"].tolist(), strict=True))
    assert merged == {i: 1 for i in range(12)}, "sample 3 was right in a rehearsal"


def test_evidence_of_two_ranks_adds_up() -> None:
    """Both counted the same partition."""
    buffers = team(Collateral(decay=0.5), [4])
    buffers = [ReplayBuffer(4, recall=Collateral(decay=0.5), rank=r, world_size=2) for r in range(2)]
    ids = torch.arange(4)
    for rank, buffer in enumerate(buffers):
        owners = ids // 2
        buffer.insert({"x": ids[owners == rank]}, ids, labels=ids * 0 + 7, task=0, owners=owners)
        judged(buffer, {2 * rank: 1, 2 * rank + 1: 1}, task=0)
        judged(buffer, {2 * rank: rank}, task=1)
    assert [densities(buffer)[0, 7] for buffer in buffers] == [2 / 3, 1 / 3]
    (alone,) = resumed(buffers, Collateral(decay=0.5), 1)
    assert densities(alone) == {(0, 7): (1 + 1) / (2 + 2)}


def test_evidence_does_not_multiply_over_resumes() -> None:
    """Of four ranks with one observation each, two have two, and four one again, however often."""
    buffers = [ReplayBuffer(8, recall=Collateral(decay=0.5), rank=r, world_size=4) for r in range(4)]
    ids = torch.arange(8)
    for rank, buffer in enumerate(buffers):
        buffer.insert({"x": ids[ids // 2 == rank]}, ids, labels=ids * 0, task=0, owners=ids // 2)
        judged(buffer, {2 * rank: 1, 2 * rank + 1: 1}, task=0)
        judged(buffer, {2 * rank: int(rank > 0)}, task=1)
    for world_size in (2, 4, 2):
        buffers = resumed(buffers, Collateral(decay=0.5), world_size)
        seen, damaged = 4 / world_size, 1 / world_size
        assert [densities(buffer) for buffer in buffers] == [{(0, 0): (damaged + 1) / (seen + 2)}] * world_size


def test_a_purge_forgets_what_was_counted() -> None:
    """Also for a sample that the memory no longer holds, and for one that is about to enter."""
    buffer = damaged(decay=0.5)
    judged(buffer, {2: 0, 30: 1}, task=1)
    buffer.purge(torch.tensor([2]))
    assert densities(buffer) == {(0, 0): 1 / 2, (0, 1): 1 / 2}
    state = buffer.state_dict()["recall_state"]
    assert len(state["seen"]) == len(state["partitions"]) == 0
    assert len(state["states"]) == 5
    judged(buffer, {0: 0}, task=1)
    buffer.purge(torch.tensor([999]))
    assert densities(buffer)[0, 0] == 1 / 2
    (buffer,) = team(Collateral(), [2], capacity=9)
    judged(buffer, {2: 1}, task=0)
    buffer.purge(torch.tensor([0]))
    present([buffer], torch.arange(2, 3), 0)
    assert buffer.state_dict()["recall_state"]["states"].tolist() == [0, 0], "nobody knows that 2 was right"


# ---------------------------------------------------------------------- what they share

SCHEDULES: dict[str, Callable[[], Recall]] = {
    "uniform": Uniform,
    "power_law": PowerLaw,
    "task_uniform": TaskUniform,
    "view_batch": ViewBatch,
    "collateral": Collateral,
}


def test_names() -> None:
    """Each by its name, with its defaults."""
    for name, kind in SCHEDULES.items():
        assert type(ReplayBuffer(3, recall=name).recall) is kind
    with pytest.raises(ValueError, match=r"`recall` must be a Recall or one of .*'collateral'.*'view_batch'.*'often'"):
        ReplayBuffer(3, recall="often")


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_object_may_be_given_to_several_memories(name: str) -> None:
    """Each has its own state, and the object none."""
    recall = SCHEDULES[name]()
    before = pickle.dumps(recall)
    (one,), (other,) = team(recall, [9, 9]), team(recall, [3, 3])
    ids_of(one, 4, 0, task=2)
    assert set(ids_of(other, 6, 0, task=2)) <= set(range(6))
    assert pickle.dumps(recall) == before


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_copy_draws_the_same(name: str) -> None:
    """By pickle."""
    (buffer,) = team(name, [20, 20], capacity=15)
    other = pickle.loads(pickle.dumps(buffer))
    for step in range(6):
        assert ids_of(buffer, 4, step, task=2) == ids_of(other, 4, step, task=2)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_checkpoint_of_another_schedule_is_refused(name: str) -> None:
    """Its state means something else."""
    (buffer,) = team("power_law" if name == "uniform" else "uniform", [4])
    with pytest.raises(ValueError, match=f"`recall` is '{name}'"):
        ReplayBuffer(4, recall=name).load_state_dict(buffer.state_dict())


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_empty_rank_is_saved_and_joined(name: str) -> None:
    """It has no slots."""
    buffers = [ReplayBuffer(4, recall=name, rank=r, world_size=2) for r in range(2)]
    ids = torch.arange(4)
    for rank, buffer in enumerate(buffers):
        columns = {"x": ids[ids * 0 == rank]}
        buffer.insert(columns, ids, labels=ids, task=0, owners=torch.zeros_like(ids))
    for world_size in (1, 2, 3):
        again = resumed(buffers, name, world_size)
        assert sum(len(buffer) for buffer in again) == 4
        present(again, torch.arange(4, 9), 1)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_memory_without_labels(name: str) -> None:
    """Partitions are the tasks."""
    buffer = ReplayBuffer(8, recall=name)
    for task in range(2):
        ids = torch.arange(4) + 4 * task
        buffer.insert({"x": ids}, ids, labels=None, task=task)
    assert len(set(ids_of(buffer, 2 * getattr(buffer.recall, "views", 1), 0, task=2))) == 2
    if isinstance(buffer.recall, Collateral):
        assert buffer.recall.densities.keys() == {(0, 0), (1, 0)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PowerLaw(0.0), "`exponent` must be above 0.*got 0.0"),
        (lambda: PowerLaw(float("nan")), "`exponent` must be above 0.*got nan"),
        (lambda: ViewBatch(0), "`views` must be at least 1, got 0"),
        (lambda: Collateral(decay=1.0), "`decay` must be from 0 to 1 exclusive, got 1.0"),
        (lambda: Collateral(decay=-0.1), "`decay` must be"),
        (lambda: Collateral(floor=1.0), "`floor` must be from 0 to 1 exclusive, got 1.0"),
        (lambda: Collateral(floor=-0.1), "`floor` must be"),
    ],
)
def test_settings_out_of_range(make: Callable[[], Recall], message: str) -> None:
    """The message names the setting."""
    with pytest.raises(ValueError, match=message):
        make()
