"""What adapters of finished tasks, and what finds them, are after a request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forgetting import (
    FORGOTTEN,
    INPUTS,
    RETAINED,
    AfterRequest,
    Serves,
    forgetting_stream,
    learned_and_forgotten,
    outcomes,
)
from torch import Tensor

from contract import Row, all_rows
from lightning_cl import AdapterSlots, CoLoR, DynamicConPET
from lightning_cl.adapters import AdapterStart
from toys import LoraToy, fit_stream, weights

SLOTS = {name: row for name, row in all_rows().items() if issubclass(row.method, AdapterSlots)}


@pytest.mark.parametrize("row", SLOTS.values(), ids=SLOTS.keys())
@pytest.mark.filterwarnings("ignore:.*(is started anew|learn nothing).*")
def test_what_a_request_teaches_an_adapter_is_kept(row: Row, tmp_path: Path) -> None:
    """It is folded as a task is, and the next one begins with a fresh adapter; routed ones begin anew without it."""
    settings = {
        "sd-lora": {"capacity": 10},
        "inflora": {"capacity": 16, "threshold": 0.5, "final_threshold": 0.5},
    }
    method = row.method(**settings.get(row.method.card.name, row.settings))
    found: dict[str, Any] = {}

    def look(pl_module: Any) -> tuple[Any, Tensor]:
        return [slot.factors(slot.current) for slot in method.slots.values()], weights(pl_module)

    class AtEnd(Serves):
        def serve_end(self, trainer: Any, pl_module: Any, task: Any) -> None:
            found["trained"] = any(bool(up.any()) for _, up in (s.factors(s.current) for s in method.slots.values()))
            found["before"] = weights(pl_module)

    probe = AfterRequest(look)
    fit_stream(
        tmp_path,
        [method, AtEnd(ascends=True), probe],
        module=row.module(learning_rate=0.05),
        stream=forgetting_stream(),
    )
    assert found["trained"]
    factors, after = probe.found
    assert not any(bool(down.any() and up.any()) for down, up in factors)
    if not isinstance(method, (CoLoR, DynamicConPET)):
        torch.testing.assert_close(after, found["before"], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")
def test_a_routed_request_is_warned_of(tmp_path: Path) -> None:
    """No adapter of a finished task learns from it."""
    with pytest.warns(UserWarning, match="'rows' trained the adapter that `CoLoR` has for the coming task"):
        learned_and_forgotten(
            tmp_path,
            CoLoR(capacity=8, k=1),
            ascends=True,
            module=LoraToy(learning_rate=0.05),
            stream=forgetting_stream(),
        )


def hidden_of(module: LoraToy, rows: Tensor) -> Tensor:
    """Return the features of the base."""
    with module.model.disable_adapter(), torch.no_grad():
        return module.model.base_model.model[:3](INPUTS[rows])


def test_prototypes_are_of_retained_samples(tmp_path: Path) -> None:
    """The mean of a task's features without those forgotten; a task without samples has none, nor is it chosen."""
    module = LoraToy(learning_rate=0.05)
    method = CoLoR(capacity=8, k=1)
    learned_and_forgotten(tmp_path, method, module=module)
    for task in (0, 1):
        rows = RETAINED[task == RETAINED % 4]
        torch.testing.assert_close(method.router.prototypes[task][0], hidden_of(module, rows).mean(0))
    gone = CoLoR(capacity=8, k=1)
    serves = learned_and_forgotten(
        tmp_path / "gone", gone, module=LoraToy(learning_rate=0.05), stream=forgetting_stream(list(range(1, 48, 4)))
    )
    assert sorted(gone.router.prototypes) == [0, 2, 3]
    assert outcomes(serves, gone) == [("removed", 1), ("remains", None)]
    assert 1 not in gone.choose(hidden_of(module, torch.arange(48))).flatten().tolist()


def test_kept_features_go_with_their_samples(tmp_path: Path) -> None:
    """The selector is trained on the others alone."""
    module = LoraToy(learning_rate=0.05)
    method = DynamicConPET(capacity=8)
    serves = learned_and_forgotten(tmp_path, method, module=module)
    assert outcomes(serves, method)[0] == ("removed", len(FORGOTTEN))
    kept = [sorted(ids.tolist()) for ids in method._kept_ids]
    assert kept[:2] == [RETAINED[task == RETAINED % 4].tolist() for task in (0, 1)]
    for rows, ids in zip(method._kept, method._kept_ids, strict=True):
        torch.testing.assert_close(rows, hidden_of(module, ids))


def test_the_context_of_adapters_is_of_retained_inputs(tmp_path: Path) -> None:
    """Covariances of inputs: of the first layer, by hand."""
    start = AdapterStart("corda")
    probe = AfterRequest(lambda _: dict(start.context))
    learned_and_forgotten(tmp_path, AdapterSlots(16), start, probe, ascends=True, module=LoraToy(learning_rate=0.05))
    found = probe.found
    inputs = INPUTS[RETAINED].double()
    expected = inputs.T @ inputs / len(RETAINED)
    first = next(value for name, value in found.items() if name.endswith("0"))
    torch.testing.assert_close(first, expected.to(first.dtype), rtol=1e-5, atol=1e-6)
