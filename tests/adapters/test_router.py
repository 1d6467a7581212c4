"""Prototypes by task: the nearest one, replacement of a task's own, and the way through a state."""

from __future__ import annotations

import pickle

import pytest
import torch

from lightning_cl.adapters.router import PrototypeRouter
from lightning_cl.functional.prototypes import Metric


def filled(metric: Metric = "euclidean") -> PrototypeRouter:
    """Two tasks: two groups far apart, and one between them."""
    router = PrototypeRouter(k=2, metric=metric)
    router.add(0, torch.tensor([[0.0, 0.0], [0.0, 2.0], [20.0, 0.0], [20.0, 2.0]]))
    router.add(1, torch.tensor([[10.0, 1.0]]))
    return router


def test_the_task_of_the_nearest_prototype() -> None:
    """A task may have several; distances are those of the nearest."""
    router, features = filled(), torch.tensor([[1.0, 1.0], [9.0, 1.0], [17.0, 1.0], [12.0, 1.0]])
    assert sorted(router.prototypes[0].tolist()) == [[0.0, 1.0], [20.0, 1.0]]
    assert len(router) == 2
    assert router.distances(features).tolist() == [[1.0, 9.0], [9.0, 1.0], [3.0, 7.0], [8.0, 2.0]]
    assert router.nearest(features).tolist() == [0, 1, 0, 1]


def test_the_metric_decides() -> None:
    """A point on the ray of the second task, but near the first."""
    point = torch.tensor([[10.0, 0.5]])
    routers = {metric: PrototypeRouter(k=1, metric=metric) for metric in ("euclidean", "cosine")}
    for router in routers.values():
        router.add(0, torch.tensor([[9.0, 3.0]]))
        router.add(1, torch.tensor([[100.0, 5.0]]))
    assert routers["euclidean"].nearest(point).tolist() == [0]
    assert routers["cosine"].nearest(point).tolist() == [1]


def test_a_task_that_begins_again_gets_other_prototypes() -> None:
    """A fit that was broken off."""
    router = filled()
    router.add(1, torch.tensor([[-9.0, 0.0]]))
    assert router.nearest(torch.tensor([[-7.0, 0.0], [11.0, 1.0]])).tolist() == [1, 0]


def test_tasks_may_have_gaps() -> None:
    """Indices come back, not positions."""
    router = PrototypeRouter(k=1)
    router.add(7, torch.tensor([[1.0]]))
    router.add(3, torch.tensor([[5.0]]))
    assert router.nearest(torch.tensor([[0.0], [6.0]])).tolist() == [7, 3]


def test_state_and_pickle() -> None:
    """The same answers; a state is none of the object's own containers."""
    router, other = filled("manhattan"), PrototypeRouter(k=2, metric="manhattan")
    state = router.state_dict()
    router.add(2, torch.tensor([[0.0, 50.0]]))
    other.load_state_dict(state)
    features = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)) * 20
    assert len(other) == 2
    assert torch.equal(other.nearest(features), filled("manhattan").nearest(features))
    assert torch.equal(pickle.loads(pickle.dumps(router)).nearest(features), router.nearest(features))


def test_settings_out_of_range() -> None:
    """Named."""
    with pytest.raises(ValueError, match="`k` must be"):
        PrototypeRouter(k=0)
    with pytest.raises(ValueError, match="`metric` must be one of"):
        PrototypeRouter(metric="far")  # type: ignore[arg-type]
