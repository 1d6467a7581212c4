"""The classes of tasks: told by a stream, or seen in labels."""

from __future__ import annotations

import torch

from lightning_cl.core.classes import KnownClasses
from lightning_cl.core.shards import PerRank
from lightning_cl.core.task import Task

CPU = torch.device("cpu")


def test_told_by_the_stream() -> None:
    """Old are those of tasks that ended, also where a class comes again."""
    known = KnownClasses()
    known.start_task(Task(0, "a", classes=(1, 0)))
    assert (known.told, known.old, known.present, known.seen) == (True, [], [0, 1], [0, 1])
    known.end_task(CPU)
    known.start_task(Task(1, "b", classes=(1, 2)))
    assert (known.old, known.present, known.seen) == ([0, 1], [1, 2], [0, 1, 2])


def test_seen_in_labels() -> None:
    """Negative labels are no class; a new task has none yet."""
    known = KnownClasses()
    known.start_task(Task(0, "fit 1"))
    assert not known.told
    known.see(torch.tensor([3, 1, 3, -100]))
    known.see(torch.tensor([0]))
    assert known.present == [0, 1, 3]
    known.end_task(CPU)
    known.start_task(Task(1, "fit 2"))
    known.see(torch.tensor([5]))
    assert (known.old, known.present, known.seen) == ([0, 1, 3], [5], [0, 1, 3, 5])


def test_saved_and_restored() -> None:
    """In the middle of a task."""
    known = KnownClasses()
    known.start_task(Task(0, "a", classes=(4,)))
    known.end_task(CPU)
    known.start_task(Task(1, "b", classes=(6,)))
    restored = KnownClasses()
    restored.load_state_dict(known.state_dict())
    assert (restored.told, restored.old, restored.present) == (True, [4], [6])


def test_every_rank_saves_what_it_has_seen() -> None:
    """The union is restored, so that none is lost with the ranks that saw it."""
    states = []
    for labels in ([0, 2], [2, 5]):
        known = KnownClasses()
        known.start_task(Task(0, "fit 1"))
        known.see(torch.tensor(labels))
        states.append(known.state_dict())
    assert [state["present"] for state in states] == [PerRank([0, 2]), PerRank([2, 5])]
    restored = KnownClasses()
    # as a checkpoint gives it back
    restored.load_state_dict(states[0] | {"present": [state["present"].value for state in states]})
    assert restored.present == [0, 2, 5]
