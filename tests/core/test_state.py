"""Tensors kept beside parameters: placed, saved whole, and never lost without a word."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from lightning_cl.core.state import ParameterState, local, shard, sum_over_shards


def parameters(width: int = 2) -> dict[str, Parameter]:
    """Two parameters by name."""
    return {"weight": Parameter(torch.zeros(width, 3)), "bias": Parameter(torch.zeros(width))}


def filled() -> ParameterState:
    """A state of the parameters above."""
    state = ParameterState()
    state.set({"weight": torch.ones(2, 3), "bias": torch.full((2,), 5.0)}, parameters())
    return state


def test_is_a_mapping_by_name() -> None:
    """Empty and false before it is set, then in the order of the parameters."""
    assert not ParameterState()
    state = filled()
    assert list(state) == ["weight", "bias"]
    assert len(state) == 2
    assert state["bias"].tolist() == [5.0, 5.0]


def test_saved_tensors_are_copies() -> None:
    """A checkpoint that is written later must hold the values of its moment."""
    state = filled()
    saved = state.state_dict()
    state["bias"].add_(1)
    assert saved["bias"].tolist() == [5.0, 5.0]


def test_restored_values_wait_until_they_are_placed() -> None:
    """And can be saved again before that, as a run does that is stopped at once."""
    state = ParameterState()
    state.load_state_dict(filled().state_dict())
    assert not state
    assert state.state_dict()["bias"].tolist() == [5.0, 5.0]
    state.place(parameters(), "The state")
    assert state["weight"].shape == (2, 3)
    assert state.state_dict()["bias"].tolist() == [5.0, 5.0]


def test_restored_values_take_the_place_of_older_ones() -> None:
    """Loading into an object that has learned already, even an empty state, forgets what it had."""
    state = filled()
    state.load_state_dict({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
    state.place(parameters(), "The state")
    assert state["bias"].tolist() == [0.0, 0.0]
    state.load_state_dict({})
    state.place(parameters(), "The state")
    assert not state


@pytest.mark.parametrize("restored", [True, False], ids=["from a checkpoint", "in the object"])
def test_a_module_that_does_not_fit_is_refused(restored: bool) -> None:
    """Another parameter, one less, another shape: silence would mean an unprotected model."""

    def state() -> ParameterState:
        kept = filled()
        if restored:
            kept.load_state_dict(kept.state_dict())
        return kept

    more = {**parameters(), "head": Parameter(torch.zeros(1))}
    with pytest.raises(ValueError, match=r"The state has no entry for \['head'\].*unprotected"):
        state().place(more, "The state")
    with pytest.raises(ValueError, match=r"The state has 'bias' of shape \(2,\).*no such trainable parameter"):
        state().place({"weight": parameters()["weight"]}, "The state")
    with pytest.raises(ValueError, match=r"'weight' of shape \(2, 3\), the module has \(4, 3\)"):
        state().place(parameters(width=4), "The state")


def test_a_plain_tensor_is_its_own_shard() -> None:
    """Without sharding nothing is copied or cut."""
    value, parameter = torch.arange(3.0), Parameter(torch.zeros(3))
    assert local(value) is value
    assert torch.equal(shard(value, parameter), value)
    terms = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}
    assert sum_over_shards(terms, {"a": parameter, "b": parameter}) == 3.0
