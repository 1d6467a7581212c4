"""Policies, one by one: shares, order of leaving, selection."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_cl.memory import Herding, Policy, ReplayBuffer
from lightning_cl.memory.policies import equal_shares


def insert(buffer: ReplayBuffer, ids: list[int], *, task: int = 0, labels: list[int] | None = None) -> list[int]:
    """Present samples one batch at a time, and return what is held."""
    given = None if labels is None else torch.tensor(labels)
    buffer.insert({"x": torch.tensor(ids)}, torch.tensor(ids), labels=given, task=task)
    return sorted(buffer.sample_ids.tolist())


@pytest.mark.parametrize("capacity", [0, 1, 3, 8, 13, 50])
def test_equal_shares_take_from_the_largest_group_first(capacity):
    """As if entries went one by one, each from the first of the largest groups."""
    generator = np.random.default_rng(capacity)
    for _ in range(200):
        counts = generator.integers(0, 9, size=generator.integers(1, 7))
        expected = counts.tolist()
        while sum(expected) > capacity:
            expected[expected.index(max(expected))] -= 1
        assert equal_shares(counts, capacity).tolist() == expected


def test_ring_by_hand():
    """Capacity 4, samples 0 to 5 and 10 to 14 of two tasks."""
    buffer = ReplayBuffer(4, "ring")
    assert insert(buffer, [0, 1]) == [0, 1]
    assert insert(buffer, [2, 3, 4]) == [1, 2, 3, 4]  # 0 was the oldest
    assert insert(buffer, [1]) == [1, 2, 3, 4]  # known, and recent from now on
    assert insert(buffer, [5]) == [1, 3, 4, 5]  # so 2 is the oldest
    assert insert(buffer, [0]) == [0, 1, 4, 5]  # it left, so it is new; 3 goes
    assert insert(buffer, [10], task=1) == [0, 1, 5, 10]  # the old task shrinks by its oldest
    assert insert(buffer, [11], task=1) == [0, 5, 10, 11]
    assert insert(buffer, [12], task=1) == [0, 5, 11, 12]  # shares are 2 and 2: the new task lets its own go
    assert insert(buffer, [13, 14], task=1) == [0, 5, 13, 14]
    assert insert(buffer, [20], task=2) == [0, 13, 14, 20]  # of equal tasks the oldest shrinks first
    assert insert(buffer, [21], task=2) == [0, 14, 20, 21]
    assert insert(buffer, [5], task=0) == [5, 14, 20, 21]
    assert buffer.all_samples.tasks.tolist() == [0, 1, 2, 2]


def test_ring_with_more_tasks_than_places():
    """The latest tasks keep one sample each."""
    buffer = ReplayBuffer(2, "ring")
    for task in range(4):
        insert(buffer, [task], task=task)
    assert sorted(buffer.sample_ids.tolist()) == [2, 3]


def test_class_balanced_shares():
    """Unequal classes, one too small for its share, one that comes last."""
    buffer = ReplayBuffer(10, "class_balanced")
    labels = [0] * 50 + [1] * 20 + [2] * 2
    order = torch.randperm(72).tolist()
    for start in range(0, 72, 7):
        batch = order[start : start + 7]
        insert(buffer, batch, labels=[labels[i] for i in batch])
    assert torch.bincount(buffer.labels).tolist() == [4, 4, 2]
    insert(buffer, list(range(100, 140)), labels=[3] * 40)
    assert torch.bincount(buffer.labels).tolist() == [2, 3, 2, 3]


@pytest.mark.parametrize("policy", ["reservoir", "class_balanced"])
def test_order_of_presentation_does_not_matter(policy):
    """The same samples in any order and in batches of any size leave the same content."""
    contents = set()
    for batch_size in (1, 7, 200):
        buffer = ReplayBuffer(20, policy)
        for batch in torch.randperm(200).split(batch_size):
            held = insert(buffer, batch.tolist(), labels=(batch % 3 * 2).tolist())
        contents.add(tuple(held))
    assert len(contents) == 1


def herd(features: Tensor, count: int) -> list[int]:
    """Algorithm 4 of iCaRL, with a loop over all samples for every choice."""
    normalised = [f / f.norm() if f.norm() > 0 else f for f in features.double()]
    mean = sum(normalised) / len(normalised)
    chosen: list[int] = []
    for k in range(1, count + 1):
        distances = {
            i: (mean - (phi + sum(normalised[j] for j in chosen)) / k).norm().item()
            for i, phi in enumerate(normalised)
            if i not in chosen
        }
        chosen.append(min(distances, key=distances.get))
    return chosen


@pytest.mark.parametrize("count", [1, 5, 30])
def test_herding_selects_like_the_paper(count):
    """In the same order, also with a feature vector of zeros and lengths that differ."""
    features = torch.randn(30, 4) * torch.rand(30, 1) + 0.3
    features[7] = 0
    assert Herding().select(features, count).tolist() == herd(features, count)
    assert herd(features, 5) != herd(features.roll(1, 0), 5)


def offer(buffers: list[ReplayBuffer], ids: Tensor, labels: Tensor, features: Tensor, task: int) -> list[int]:
    """Offer a task to all ranks, and return what they hold together."""
    owners = torch.arange(len(ids)) % len(buffers)
    for rank, buffer in enumerate(buffers):
        mine = {"x": ids[owners == rank]}
        buffer.offer(mine, ids, labels=labels, task=task, features=features, owners=owners)
        drawn = buffer.draw(99, step=0)
        assert drawn is None or torch.equal(drawn.columns["x"], drawn.sample_ids)
    return sorted(i for buffer in buffers for i in buffer.sample_ids.tolist())


@pytest.mark.parametrize("world_size", [1, 2])
def test_herding_buffer_over_two_tasks(world_size):
    """Two classes share 10 places, then four; the last chosen go first."""
    buffers = [ReplayBuffer(10, "herding", rank=r, world_size=world_size) for r in range(world_size)]
    ids, labels, features = torch.arange(40), torch.arange(40) % 2, torch.randn(40, 5)
    ranks = {c: ids[labels == c][herd(features[labels == c], 5)].tolist() for c in (0, 1)}
    shuffled = torch.randperm(40)
    held = offer(buffers, ids[shuffled], labels[shuffled], features[shuffled], task=0)
    assert held == sorted(ranks[0] + ranks[1])
    # the second task comes after a resume on another number of ranks
    state = ReplayBuffer.merge_states([buffer.state_dict() for buffer in buffers])
    buffers = [ReplayBuffer(10, "herding", rank=r, world_size=3 - world_size) for r in range(3 - world_size)]
    for buffer in buffers:
        buffer.load_state_dict(state)
    new_labels, new_features = 2 + torch.arange(30) % 2, torch.randn(30, 5)
    new_ranks = {c: (100 + torch.arange(30))[new_labels == c][herd(new_features[new_labels == c], 3)] for c in (2, 3)}
    held = offer(buffers, 100 + torch.arange(30), new_labels, new_features, task=1)
    assert held == sorted(ranks[0][:2] + ranks[1][:2] + new_ranks[2].tolist() + new_ranks[3].tolist())


def test_herding_of_a_class_that_comes_back():
    """Best ranks of both tasks; what is held keeps its rank, and a repeated row counts once."""
    buffers = [ReplayBuffer(4, "herding")]
    features = torch.randn(5, 3)
    first = herd(features, 4)
    assert offer(buffers, torch.arange(5), torch.zeros(5).long(), features, task=0) == sorted(first)
    later = torch.randn(8, 3)
    best = herd(later, 2)
    rows = torch.cat((torch.arange(8), torch.tensor([2, 2])))
    held = offer(buffers, 10 + rows, torch.zeros(10).long(), later[rows], task=1)
    assert held == sorted(first[:2] + [10 + i for i in best])
    assert offer(buffers, torch.tensor(first[:2]), torch.zeros(2).long(), torch.randn(2, 3), task=2) == held


def test_offer_refuses():
    """Another policy, other lengths, purged samples."""
    ids = torch.arange(4)
    with pytest.raises(ValueError, match="`policy='ring'` does not select at a task's end: call `insert`"):
        ReplayBuffer(2, "ring").offer({"x": ids}, ids, labels=ids, task=0, features=torch.randn(4, 2))
    buffer = ReplayBuffer(2, "herding")
    with pytest.raises(ValueError, match=r"`features` must have shape \[4, dim\].*got \[3, 2\]"):
        buffer.offer({"x": ids}, ids, labels=ids, task=0, features=torch.randn(3, 2))
    with pytest.raises(ValueError, match="`labels` is None"):
        buffer.offer({"x": ids}, ids, labels=None, task=0, features=torch.randn(4, 2))
    buffer.purge(ids[:3])
    buffer.offer({"x": ids}, ids, labels=ids, task=0, features=torch.randn(4, 2))
    assert buffer.sample_ids.tolist() == [3]


def test_a_new_policy_needs_no_entry_anywhere():
    """A subclass with a name is found by it; one that wastes capacity is refused."""

    class SmallestIds(Policy):
        """Keep the smallest ids."""

        name = "smallest_ids"

        def groups(self, labels, tasks):
            return np.zeros_like(tasks)

        def keys(self, sample_ids, *, seed, clock, losses):
            return -sample_ids

    class Wasteful(SmallestIds):
        """Leave places empty."""

        def shares(self, counts, capacity):
            return np.minimum(counts, capacity // 2)

    try:
        assert insert(ReplayBuffer(3, "smallest_ids"), [5, 3, 9, 1]) == [1, 3, 5]
        with pytest.raises(ValueError, match=r"`name='smallest_ids'` of .*Other is taken by .*SmallestIds"):

            class Other(Policy):
                name = "smallest_ids"
    finally:
        del Policy.registry["smallest_ids"]
    with pytest.raises(ValueError, match=r"`Policy.shares` must use the whole capacity"):
        insert(ReplayBuffer(3, Wasteful()), [5, 3, 9, 1])
