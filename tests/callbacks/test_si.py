"""SI in runs of every kind: the path is that of the task's own gradient and of the weights' real moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_cl import SI, ContinualCallback
from lightning_cl.core.update import OptimizerStep
from paths import Meddler, Quadratic, as_vector, empty_batches, in_closed_form, moves, without_batch
from toys import ToyModule, fit_stream, toy_loaders, trainer, weights
from users import Manual, Texts, loader

STRENGTH, DAMPING = 0.5, 0.05


def test_closed_form_on_a_quadratic(tmp_path: Path) -> None:
    r"""With weights :math:`q^t \theta_0`, the path is the loss's fall times :math:`2 / (2 - \eta a)`."""
    curvature, start, factor = in_closed_form()
    module, si = Quadratic(), SI(1.0, damping=DAMPING)
    trainer(tmp_path, [si], max_epochs=2, precision="64-true").fit(module, empty_batches(4))
    end = factor**8 * start
    fall = 0.5 * curvature * (start**2 - end**2)
    path = fall * 2 / (2 - module.learning_rate * curvature)
    state = si.state_dict()
    torch.testing.assert_close(as_vector(state["path"], module), path, rtol=1e-6, atol=0)
    expected = path / ((start - end) ** 2 + DAMPING)
    torch.testing.assert_close(as_vector(state["importance"], module), expected, rtol=1e-6, atol=0)
    assert torch.equal(as_vector(state["anchors"], module), weights(module))
    # c times importance times the squared distance, without a half
    with torch.no_grad():
        module.first.add_(0.1)
    torch.testing.assert_close(si.penalty(), expected[:2].sum() * 0.1**2, rtol=1e-5, atol=0)


def plain_si(tasks: list[int], **settings: Any) -> tuple[ToyModule, Tensor]:
    """SI in a plain loop over one epoch of each task; return the module and the importance."""
    module, anchor = ToyModule(), weights(ToyModule())
    importance, penalty = torch.zeros_like(anchor), None
    for task in tasks:
        path = torch.zeros_like(anchor)
        for grad, before, after in moves(module, toy_loaders(batch_size=6)[task], penalty=penalty, **settings):
            path -= grad * (after - before)
        importance = importance + path / ((weights(module) - anchor) ** 2 + DAMPING)
        anchor = weights(module)

        def penalty(theta: Tensor, held: Tensor = importance, around: Tensor = anchor) -> Tensor:
            return STRENGTH * (held * (theta - around) ** 2).sum()

    return module, importance


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "accumulation": ({"accumulate_grad_batches": 2}, {"accumulate": 2}),
    "clipping": ({"gradient_clip_val": 0.05}, {"clip": 0.05}),
    "both": ({"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}, {"accumulate": 2, "clip": 0.05}),
    "meddled with": ({}, {"meddle": True}),
}


@pytest.mark.parametrize("name", RUNS)
def test_importance_over_three_tasks_is_that_of_a_plain_loop(name: str, tmp_path: Path) -> None:
    """From the gradient before penalty, clipping and other methods, and from the move after all corrections."""
    settings, plain = RUNS[name]
    si, module = SI(STRENGTH, damping=DAMPING), ToyModule()
    for task in (0, 1, 0):
        callbacks = [Meddler(), si] if name == "meddled with" else [si]
        data = toy_loaders(batch_size=6)[task]
        trainer(tmp_path, callbacks, max_epochs=1, **settings).fit(module, data, data)
    expected, importance = plain_si([0, 1, 0], **plain)
    torch.testing.assert_close(as_vector(si.state_dict()["importance"], module), importance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(module), weights(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("clamp", [False, True])
def test_negative_importance_is_kept_unless_clamped(clamp: bool, tmp_path: Path) -> None:
    """Uphill moves count against a weight, as in the paper; nothing is hidden."""
    si, module, data = SI(1.0, clamp=clamp), ToyModule(), toy_loaders()[0]
    trainer(tmp_path, [si, Meddler()], max_epochs=1).fit(module, data, data)
    least = as_vector(si.state_dict()["importance"], module).min()
    assert least == 0 if clamp else least < -0.01


class Overflowing(ToyModule):
    """The gradients of one batch are infinite."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 1 else loss


def test_a_step_that_the_scaler_skips_does_not_count(tmp_path: Path) -> None:
    """The path is that of a run without its batch."""
    states = []
    for kind in (Overflowing, ToyModule):
        si, data = SI(1.0), toy_loaders()[0]
        module = kind()
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
        fit = trainer(tmp_path, [si], max_epochs=1, plugins=[plugin])
        fit.fit(module, data if kind is Overflowing else without_batch(data, 1), data)
        states.append(as_vector(si.state_dict()["importance"], module))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=1e-4)
    assert states[0].isfinite().all()
    assert states[0].abs().max() > 0.1


class Witness(ContinualCallback):
    """Adds the path up by itself, from what it sees in Lightning's and torch's own places."""

    needs_state = False

    def __init__(self) -> None:
        self.path: dict[str, Tensor] = {}

    def observe_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        self.start = {n: (p.grad.clone(), p.detach().clone()) for n, p in step.parameters.items()}

    def observe_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        for name, (grad, before) in self.start.items():
            self.path[name] = self.path.get(name, 0) - grad * (step.parameters[name].detach() - before)
        self.start = {}


def test_several_optimizers_under_manual_optimization(tmp_path: Path) -> None:
    """Each weight follows the steps of the optimizer that owns it; one that none owns has no path."""
    module, si, witness = Manual(), SI(1.0), Witness()
    trainer(tmp_path, [si, witness], max_epochs=2).fit(module, loader(Manual), loader(Manual))
    path = si.state_dict()["path"]
    assert witness.path.keys() == path.keys() - {"scale"}
    for name, expected in witness.path.items():
        torch.testing.assert_close(path[name], expected, rtol=1e-6, atol=0)
        assert expected.abs().max() > 0
    assert path["scale"] == 0


class PartlyUsed(ToyModule):
    """A weight without a gradient, and one that is frozen from the second batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.model[0].requires_grad_(False)
            self.model[0].zero_grad()


def test_weights_without_a_gradient(tmp_path: Path) -> None:
    """They keep the path that they had, and an importance of 0 if they had none."""
    module, si, witness, data = PartlyUsed(), SI(1.0), First(), toy_loaders()[0]
    trainer(tmp_path, [si, witness], max_epochs=1).fit(module, data, data)
    state = si.state_dict()
    assert torch.equal(state["importance"]["unused"], torch.zeros(3))
    torch.testing.assert_close(state["path"]["model.0.weight"], 0.1 * witness.gradient.square(), rtol=1e-4, atol=1e-8)


class First(ContinualCallback):
    """Keeps the first gradient of the first layer."""

    needs_state = False
    gradient: Tensor | None = None

    def observe_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        if self.gradient is None:
            self.gradient = step.parameters["model.0.weight"].grad.clone()


class Fused(ToyModule):
    """AdamW in one kernel."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_fused_adamw_and_low_precision(precision: Any, tmp_path: Path) -> None:
    """The state is float32, finite, and holds the weights."""
    si = SI(100.0)
    held = fit_stream(tmp_path, [si], module=Fused(), precision=precision)
    free = fit_stream(tmp_path, module=Fused(), precision=precision)
    state = si.state_dict()
    kept = [value for part in ("importance", "anchors", "path") for value in state[part].values()]
    assert {value.dtype for value in kept} == {torch.float32}
    assert all(value.isfinite().all() for value in kept)
    assert (held - free).abs().max() > 0.01


def test_dictionary_batches_and_a_selection(tmp_path: Path) -> None:
    """Only what is selected has a path."""
    si = SI(1.0, include=["embedding.*", "head.*"], exclude=["head.bias"])
    trainer(tmp_path, [si], max_epochs=1).fit(Texts(), loader(Texts), loader(Texts))
    assert si.state_dict()["path"].keys() == {"embedding.weight", "head.weight"}
    assert si.state_dict()["importance"]["head.weight"].abs().max() > 0


class Free(ToyModule):
    """Notes the largest gradient that the optimizer saw of a weight that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.unused.grad is None
        return cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_end(self, *_: Any) -> None:
        assert self.unused.grad is None


def test_nothing_is_added_in_the_first_task(tmp_path: Path) -> None:
    """The same bits as without it, up to the first task's end; no gradient of zeros either."""
    data, weights_of = toy_loaders()[0], []
    for callbacks in ([], [SI(1.0)]):
        module = Free()
        trainer(tmp_path, callbacks, max_epochs=2).fit(module, data, data)
        weights_of.append(weights(module))
    assert torch.equal(*weights_of)
    assert SI(1.0).penalty() == 0


def test_settings_out_of_range_are_refused() -> None:
    """With the name of the setting and what was given."""
    for settings, message in (
        ({"strength": 0.0}, "`strength` must be above 0, got 0.0"),
        ({"strength": 1.0, "damping": 0.0}, "`damping` must be above 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            SI(**settings)


def test_patterns_without_a_match_are_refused(tmp_path: Path) -> None:
    """At the start of the fit, when the module is known."""
    with pytest.raises(ValueError, match="`include` pattern 'encoder' matches no parameter of ToyModule"):
        fit_stream(tmp_path, [SI(1.0, include=["encoder"])])


def test_a_state_of_other_parameters_is_refused(tmp_path: Path) -> None:
    """They would train unprotected."""
    si = SI(1.0)
    fit_stream(tmp_path, [si])
    state = si.state_dict()
    del state["path"]["model.0.bias"]
    fresh = SI(1.0)
    fresh.load_state_dict(state)
    with pytest.raises(ValueError, match=r"The path of `SI` has no entry for \['model.0.bias'\]"):
        fit_stream(tmp_path, [fresh])


def test_footprint_counts_the_state_and_the_copies_of_a_step(tmp_path: Path) -> None:
    """In float32, of what is selected; at a task's end the new state beside the old."""
    module = ToyModule()
    footprint = SI(1.0, include=["model.3.*"]).footprint(trainer(tmp_path), module, None)
    assert footprint.device == 5 * 4 * (32 + 4)
    assert sum(value.numel() for value in footprint.task_end()) == 1 * (32 + 4)
