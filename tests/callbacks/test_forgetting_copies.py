"""What copies of weights, subspaces and masks are after a request: made of what is retained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forgetting import (
    INPUTS,
    LABELS,
    RETAINED,
    AfterRequest,
    after_request,
    assert_near,
    forgetting_stream,
    learned_and_forgotten,
    outcomes,
)
from lightning.pytorch import Trainer
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_cl import (
    FeatureDistillation,
    GradientProjection,
    ICaRL,
    LwF,
    MomentumInterpolation,
    SingularSubspaceProjection,
    SoftMask,
    SpikeMonitor,
    Task,
)
from lightning_cl.datamodules import ClassIncremental, Online
from lightning_cl.functional.gpm import extend_basis
from lightning_cl.functional.masks import unit_importance
from toys import ToyModule


def test_a_teacher_has_forgotten_too(tmp_path: Path) -> None:
    """That of the task before is dropped and taken anew; an average begins again at the present weights."""
    for method, outcome in ((LwF(1.0), "removed"), (LwF(1.0, teacher="ema", decay=0.9, classes="seen"), "recomputed")):
        module, state, serves = after_request(tmp_path / outcome, method)
        assert outcomes(serves, method) == [(outcome, None)]
        kept = state["teacher"]["weights"]
        assert_near(kept, {} if outcome == "removed" else dict(module.named_parameters()))
    module, state, serves = after_request(tmp_path / "icarl", ICaRL(12))
    assert state["teacher"]["weights"] == {}
    assert ("removed", None) in [(i.outcome, i.count) for i in serves.influences]


def test_a_pretrained_teacher_shows_as_many_classes_as_it_has(tmp_path: Path) -> None:
    """Taken anew, it knows all columns of a head that has grown since the first fit began."""
    method, module = LwF(1.0, teacher="pretrained", classes="seen"), ToyModule(learning_rate=0.05)
    serves = learned_and_forgotten(tmp_path, method, module=module)
    assert outcomes(serves, method) == [("recomputed", None)]
    method._teacher_width = 2
    method.renew_state(Trainer(logger=False, barebones=True), module, Task(2, "again", kind="forget"))
    assert method.state_dict()["widths"] == [4, 4]


def test_callbacks_that_share_a_teacher_speak_once(tmp_path: Path) -> None:
    """Who keeps it answers."""
    ema: dict[str, Any] = {"teacher": "ema", "decay": 0.9}
    first, second = LwF(1.0, classes="seen", **ema), FeatureDistillation(1.0, layers=["model.0"], **ema)
    serves = learned_and_forgotten(tmp_path, first, second, module=ToyModule(learning_rate=0.05))
    assert [outcomes(serves, method) for method in (first, second)] == [[("recomputed", None)], []]


def test_averages_begin_anew(tmp_path: Path) -> None:
    """Slow weights are the present ones."""
    module, state, _ = after_request(tmp_path, MomentumInterpolation(0.9))
    assert_near(state["weights"], dict(module.named_parameters()))


def test_subspaces_are_those_of_retained_inputs(tmp_path: Path) -> None:
    """Of the first layer, with the constant of its bias."""
    method = GradientProjection(threshold=0.8, threshold_step=0.0)
    _, state, serves = after_request(tmp_path, method)
    rows = torch.cat([INPUTS[RETAINED], torch.ones(len(RETAINED), 1)], dim=1).double()
    basis = extend_basis(torch.zeros(7, 0, dtype=torch.float64), rows.T @ rows, 0.8)
    found = state["subspaces"]["model.0.weight"]
    matrix = found["matrix"][0].double()
    projection = matrix @ matrix.T
    projection = torch.eye(7, dtype=torch.float64) - projection if found["complement"] else projection
    torch.testing.assert_close(projection, basis @ basis.T, rtol=0, atol=1e-5)
    assert outcomes(serves, method) == [("recomputed", None)]


class SquareToy(ToyModule):
    """The toy with a layer of as many inputs as outputs."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.model.insert(3, nn.Linear(8, 8))


def test_similarities_are_those_of_retained_inputs(tmp_path: Path) -> None:
    """The mean cosine of what the square layer gets and gives."""
    method, module = SingularSubspaceProjection(target_ratio=0.7), SquareToy(learning_rate=0.05)

    @torch.no_grad()
    def look(pl_module: SquareToy) -> tuple[dict[str, float], float]:
        hidden = pl_module.model[:3](INPUTS[RETAINED])
        given = hidden @ pl_module.model[3].weight.T
        return dict(method.similarity), float(torch.cosine_similarity(hidden, given).mean())

    probe = AfterRequest(look)
    serves = learned_and_forgotten(tmp_path, method, probe, ascends=True, module=module)
    similarity, expected = probe.found
    assert similarity == {"model.3.weight": pytest.approx(expected, abs=1e-5)}
    assert outcomes(serves, method) == [("recomputed", None)]


def test_masks_are_of_retained_samples(tmp_path: Path) -> None:
    """Importances of units by hand, for the head: of gates on its outputs."""
    module, state, _ = after_request(tmp_path, SoftMask())
    total = torch.zeros(4)
    for sample, label in zip(INPUTS[RETAINED], LABELS[RETAINED], strict=True):
        gate = torch.ones(4, requires_grad=True)
        loss = cross_entropy((module.model(sample[None]) * gate), label[None])
        total += torch.autograd.grad(loss, gate)[0].abs()
    torch.testing.assert_close(state["importance"]["model.3"], unit_importance(total), rtol=1e-4, atol=1e-5)


def test_a_snapshot_to_return_to_goes(tmp_path: Path) -> None:
    """Else a spike would bring back what was forgotten, where no end of a task was told that drops it."""
    monitor, module = SpikeMonitor(on_loss_spike="rollback", snapshot_every=1), ToyModule(optimizer=torch.optim.AdamW)
    stream = forgetting_stream(scenario=Online(ClassIncremental(n_tasks=4)), epochs_per_task=1)
    probe = AfterRequest(lambda _: monitor.state_dict()["snapshot"]["step"])
    serves = learned_and_forgotten(tmp_path, monitor, probe, module=module, stream=stream)
    assert probe.found is None
    assert serves.before["callbacks"][0]["snapshot"]["step"] is not None
    assert outcomes(serves, monitor) == [("removed", None)]
