"""Which samples each rank reads at each step: no sample lost, none twice without need, on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
from torch.utils.data import DistributedSampler

from lightning_cl.datamodules.samplers import EvaluationSampler, TaskSampler

ROWS = np.arange(100, 123)  # 23 rows
WORLDS = pytest.mark.parametrize("world_size", [1, 2, 3])


def sampler(rank=0, world_size=1, **settings):
    """A sampler of task 1 over the rows, at its first epoch."""
    defaults = {"rows": ROWS, "task": 1, "batch_size": 4, "seed": 5}
    return TaskSampler(**(defaults | settings), rank=rank, world_size=world_size)


def steps(epoch=0, batches=0, samples=0, **settings):
    """Rows of each step of each rank: a list of steps, each a list of one list of rows per rank."""
    ranks = []
    for rank in range(settings.get("world_size", 1)):
        one = sampler(rank=rank, **settings)
        one.set_position(epoch=epoch, batches=batches, samples=samples)
        ranks.append([index.rows.tolist() for index in one])
    return [list(step) for step in zip(*ranks, strict=True)]


def flat(list_of_steps):
    """All rows of the steps in the order of the global batches."""
    return [row for step in list_of_steps for rank in step for row in rank]


@WORLDS
def test_an_epoch_visits_every_row_once_up_to_the_fill_up(world_size):
    """23 rows: whole on one rank, one repeat on two (12 + 12), one on three (8 + 8 + 8)."""
    visited = flat(steps(world_size=world_size))
    assert set(visited) == set(ROWS.tolist())
    assert len(visited) - len(ROWS) == {1: 0, 2: 1, 3: 1}[world_size]


@WORLDS
def test_repeats_are_fewer_than_the_ranks_and_ranks_read_as_much(world_size):
    """Whatever the sizes, nothing is dropped, and no rank waits for another."""
    for rows in range(1, 14):
        made = steps(rows=np.arange(rows), world_size=world_size)
        assert set(flat(made)) == set(range(rows))
        assert len(flat(made)) == rows + -rows % world_size
        assert all(len({len(part) for part in step}) == 1 for step in made)
        assert len(made) == len(sampler(rows=np.arange(rows), world_size=world_size))


@WORLDS
def test_ranks_divide_one_global_batch(world_size):
    """The joined batch of a step is the same on one process with as large a batch."""
    for step, joined in zip(steps(world_size=world_size), steps(batch_size=4 * world_size, world_size=1), strict=True):
        assert [row for part in step for row in part][: len(joined[0])] == joined[0]


def test_filled_up_from_the_start_of_the_same_order():
    """The repeats are the first rows of the epoch, so that they depend on nothing else."""
    visited = flat(steps(world_size=3))
    assert visited[23:] == visited[:1]


def test_order_depends_on_seed_task_and_epoch_only():
    """Equal settings give equal orders in another object; each of the three changes it."""
    order = flat(steps())
    assert order == flat(steps())
    others = [flat(steps(seed=6)), flat(steps(task=2)), flat(steps(epoch=1))]
    assert len({tuple(other) for other in [order, *others]}) == 4
    assert order != ROWS.tolist()
    assert flat(steps(shuffle=False)) == ROWS.tolist()


def test_epochs_come_back():
    """An epoch's order does not depend on the epochs before it."""
    one = sampler()
    first = [index.rows.tolist() for index in one]
    one.set_position(epoch=1)
    second = [index.rows.tolist() for index in one]
    one.set_position(epoch=0)
    assert [index.rows.tolist() for index in one] == first != second


def test_lightning_may_set_the_epoch_without_effect():
    """Lightning counts epochs of the stream, the sampler those of the task."""
    one = sampler()
    first = [index.rows.tolist() for index in one]
    one.set_epoch(7)
    assert [index.rows.tolist() for index in one] == first


def test_seeds_of_reading_differ_between_steps_and_ranks():
    """No two batches of an epoch are augmented alike, and the same batch is so again."""
    seeds = [[index.seed for index in sampler(rank=rank, world_size=2)] for rank in range(2)]
    assert len({seed for one in seeds for seed in one}) == len(seeds[0]) + len(seeds[1])
    assert seeds[0] == [index.seed for index in sampler(rank=0, world_size=2)]


# ---------------------------------------------------------------------- steps instead of epochs


@WORLDS
def test_steps_start_over_with_a_new_order(world_size):
    """Every pass holds each row once, and the passes differ."""
    rows = np.arange(10)
    visited = flat(steps(rows=rows, steps=10, world_size=world_size))
    assert len(visited) == 10 * 4 * world_size
    passes = [visited[start : start + 10] for start in range(0, len(visited) - 9, 10)]
    assert all(sorted(one) == rows.tolist() for one in passes)
    assert len({tuple(one) for one in passes}) == len(passes)


def test_fewer_steps_than_a_pass_read_its_beginning():
    """A long task is cut."""
    assert flat(steps(steps=2)) == flat(steps())[:8]


def test_a_batch_larger_than_the_task_spans_passes():
    """Three rows, batches of eight: no step is short."""
    made = steps(rows=np.arange(3), batch_size=8, steps=3)
    assert [len(step[0]) for step in made] == [8, 8, 8]
    assert all(sorted(flat(made)[start : start + 3]) == [0, 1, 2] for start in range(0, 24, 3))


# ---------------------------------------------------------------------- positions


@pytest.mark.parametrize("steps_per_task", [None, 9])
@pytest.mark.parametrize("batches", [0, 1, 3, 5])
def test_resumes_at_any_step(batches, steps_per_task):
    """What is left after a position is what the straight epoch has left."""
    straight = steps(epoch=2, steps=steps_per_task)
    samples = sampler(steps=steps_per_task).samples_after(batches)
    assert steps(epoch=2, batches=batches, samples=samples, steps=steps_per_task) == straight[batches:]


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_another_number_of_ranks_goes_on_where_the_first_stopped(before, after):
    """Two steps on some ranks, the rest on others: every row once, but for the fill-up of the last step."""
    first = flat(steps(world_size=before)[:2])
    samples = sampler(world_size=before).samples_after(2)
    assert samples == min(len(first), 23)
    rest = flat(steps(batches=2, samples=samples, world_size=after))
    visited = (first + rest)[:23]
    assert sorted(visited) == ROWS.tolist()
    assert len(rest) < 23 - samples + after
    assert visited == flat(steps())


def test_a_finished_epoch_has_nothing_left():
    """Lightning asks for the length of an epoch that a checkpoint at its last batch ended."""
    one = sampler()
    one.set_position(epoch=0, batches=6, samples=one.samples_after(6))
    assert len(one) == 6
    assert list(one) == []


def test_rows_of_a_step_are_known_to_all_ranks():
    """Identities of the other ranks' samples need no communication."""
    views = [sampler(rank=rank, world_size=3) for rank in range(3)]
    for number, step in enumerate(steps(world_size=3)):
        for view in views:
            assert view.global_rows(number).tolist() == step


# ---------------------------------------------------------------------- evaluation


@WORLDS
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_evaluation_reads_every_row_once_in_as_many_batches(batch_size, world_size):
    """No repeats, no empty batch, no rank with more batches than another."""
    for rows in range(3, 20):
        settings = {"rows": np.arange(rows), "batch_size": batch_size, "world_size": world_size}
        ranks = [
            [index.rows.tolist() for index in EvaluationSampler(**settings, rank=rank)] for rank in range(world_size)
        ]
        assert sorted(row for one in ranks for batch in one for row in batch) == list(range(rows))
        assert {len(one) for one in ranks} == {len(EvaluationSampler(**settings))}
        sizes = [len(batch) for one in ranks for batch in one]
        assert min(sizes) >= 1
        # batches of one sample leave a rank with one sample fewer nothing to read, so that they hold two
        assert max(sizes) <= (batch_size if batch_size > 1 or rows % world_size == 0 else 2)


def test_evaluation_on_one_process_is_in_order_with_full_batches():
    """As a plain loader reads."""
    batches = [index.rows.tolist() for index in EvaluationSampler(ROWS, batch_size=10)]
    assert batches == [list(range(100, 110)), list(range(110, 120)), [120, 121, 122]]


@pytest.mark.parametrize(("batch_size", "batches"), [(4, [[7, 8, 9]]), (2, [[7, 8], [9]]), (1, [[7], [8], [9]])])
def test_evaluation_of_fewer_rows_than_ranks_is_whole_on_each(batch_size, batches):
    """An empty batch would make a mean of nothing, which is NaN; some rows read twice would weigh more than others."""
    for rank in range(5):
        read = EvaluationSampler(np.array([7, 8, 9]), batch_size=batch_size, rank=rank, world_size=5)
        assert [index.rows.tolist() for index in read] == batches
        assert len(read) == len(batches)
        # as on one process, random transforms too
        alone = EvaluationSampler(np.array([7, 8, 9]), batch_size=batch_size)
        assert [index.seed for index in read] == [index.seed for index in alone]


def test_lightning_puts_no_sampler_of_its_own():
    """It replaces what is no ``DistributedSampler``."""
    assert isinstance(sampler(), DistributedSampler)
    assert isinstance(EvaluationSampler(ROWS, batch_size=2), DistributedSampler)
