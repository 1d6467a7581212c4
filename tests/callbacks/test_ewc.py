"""EWC in runs of every kind: the penalty acts as if it stood in the loss, and the consolidation leaves no trace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

import reference
from lightning_cl import EWC
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.datamodules.samplers import TaskSampler
from toys import NUM_CLASSES, ToyModule, fit_stream, toy_data, toy_loaders, toy_stream, trainer, weights
from users import Manual, Texts, UserModule, loader

STRENGTH = 3.0


def kept_state(module: nn.Module, strength_of: float = 1.0) -> dict[str, Any]:
    """A state as after one task: importances and anchors that differ in every weight."""
    generator = torch.Generator().manual_seed(8)
    parameters = dict(module.named_parameters())
    fisher = {name: strength_of * torch.rand(p.shape, generator=generator) for name, p in parameters.items()}
    anchors = {name: p.detach() + torch.randn(p.shape, generator=generator) for name, p in parameters.items()}
    return {"importance": fisher, "anchors": anchors, "constant": 0.0, "by_sample": None, "tasks": 1.0}


def in_loss(module: nn.Module, state: dict[str, Any], names: list[str] | None = None) -> Tensor:
    """The penalty as the paper writes it."""
    terms = [
        (state["importance"][name] * (p - state["anchors"][name]) ** 2).sum()
        for name, p in module.named_parameters()
        if names is None or name in names
    ]
    return STRENGTH / 2 * sum(terms)


class WithPenalty(ToyModule):
    """The toy module with the penalty written into its loss; one weight takes no part in the loss."""

    state: dict[str, Any] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss if self.state is None else loss + in_loss(self, self.state)


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping by norm": {"gradient_clip_val": 0.05},
    "clipping by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "both": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "64-true": {"precision": "64-true"},
    "bf16-true": {"precision": "bf16-true"},
}
TOLERANCES = {"bf16-mixed": 2e-3, "bf16-true": 2e-2}


@pytest.mark.parametrize("name", RUNS)
def test_acts_as_a_penalty_in_the_loss(name: str, tmp_path: Path) -> None:
    """The same weights, and others than without it; a weight without a gradient is held as well."""
    data = toy_loaders(batch_size=6)[0]  # four batches, so that accumulation has no rest, which Lightning weighs less

    def run(module: ToyModule, callbacks: list[Callback]) -> Tensor:
        trainer(tmp_path, callbacks, max_epochs=2, **RUNS[name]).fit(module, data, data)
        return weights(module).double()

    ewc, expected = EWC(STRENGTH), WithPenalty()
    expected.state = kept_state(expected)
    if name == "64-true":
        expected.state = kept_state(expected.double())
        expected.float()
    ewc.load_state_dict(kept_state(WithPenalty()))
    module = WithPenalty()
    tolerance = TOLERANCES.get(name, 1e-6)
    torch.testing.assert_close(run(module, [ewc]), run(expected, []), rtol=0, atol=tolerance)
    assert (module.unused - 1).abs().min() > 1e-3
    assert (weights(module) - run(WithPenalty(), [])).abs().max() > 0.01


def test_acts_in_full_size_under_an_fp16_scaler(tmp_path: Path) -> None:
    """The gradients are unscaled when it is added: not weakened by the scale of the loss, here 1024."""

    def run(module: ToyModule, callbacks: list[Callback]) -> Tensor:
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
        data = toy_loaders()[0]
        fit = trainer(tmp_path, callbacks, max_epochs=2, plugins=[plugin], gradient_clip_val=0.5)
        fit.fit(module, data, data)
        assert plugin.scaler.get_scale() == 1024.0
        return weights(module)

    ewc, module, expected = EWC(STRENGTH), WithPenalty(), WithPenalty()
    state = kept_state(module)
    ewc.load_state_dict(copy.deepcopy(state))
    expected.state = state
    torch.testing.assert_close(run(module, [ewc]), run(expected, []), rtol=0, atol=2e-3)


class ManualWithPenalty(Manual):
    state: dict[str, Any] | None = None

    def loss(self, batch: Any) -> Tensor:
        # of the weights that are stepped; that of the third would be added up over the steps
        names = [name for name, _ in self.named_parameters() if name != "scale"]
        return super().loss(batch) + (0 if self.state is None else in_loss(self, self.state, names))


def test_several_optimizers_under_manual_optimization(tmp_path: Path) -> None:
    """Each weight is penalised once for each step of the optimizer that owns it; one that none owns stays."""
    module, expected, data = Manual(), ManualWithPenalty(), loader(Manual)
    ewc = EWC(STRENGTH, fisher="exact")
    state = kept_state(module)
    ewc.load_state_dict(copy.deepcopy(state))
    expected.state = state
    trainer(tmp_path, [ewc], max_epochs=2).fit(module, data, data)
    trainer(tmp_path, max_epochs=2).fit(expected, data, data)
    torch.testing.assert_close(weights(module), weights(expected), rtol=0, atol=1e-6)
    assert module.scale == 1.0
    plain = Manual()
    trainer(tmp_path, max_epochs=2).fit(plain, data, data)
    assert (weights(module) - weights(plain)).abs().max() > 0.01


def test_what_is_frozen_within_the_fit_stays(tmp_path: Path) -> None:
    """The penalty has no business with a weight that no longer trains, nor has the next consolidation."""

    class Freezing(ToyModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                self.model[0].requires_grad_(False)
                self.model[0].zero_grad()
                self.frozen_at = self.model[0].weight.detach().clone()

    module, ewc, data = Freezing(), EWC(STRENGTH), toy_loaders()[0]
    state = kept_state(module)
    ewc.load_state_dict(copy.deepcopy(state))
    trainer(tmp_path, [ewc], max_epochs=1).fit(module, data, data)
    assert torch.equal(module.model[0].weight, module.frozen_at)
    fisher = ewc.state_dict()["importance"]
    assert torch.equal(fisher["model.0.weight"], state["importance"]["model.0.weight"])
    assert not torch.equal(fisher["model.3.weight"], state["importance"]["model.3.weight"])


def test_what_thaws_within_the_fit_is_named(tmp_path: Path) -> None:
    """Silence would mean an unprotected model."""

    class Thawing(ToyModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.model[0].requires_grad_(True)

    module, data = Thawing(), toy_loaders()[0]
    module.model[0].requires_grad_(False)
    with pytest.raises(UserWarning, match=r"`EWC` does not protect \['model.0.bias', 'model.0.weight'\]"):
        trainer(tmp_path, [EWC(1.0)], max_epochs=1).fit(module, data, data)


# ---------------------------------------------------------------------- modes


def three_fits(root: Path, ewc: EWC) -> tuple[ToyModule, list[tuple[list[Tensor], list[Tensor]]]]:
    """Fit tasks 0, 1, 0; return the module, and weights and hand-made Fisher information at the end of each."""
    module, ends = ToyModule(), []
    for task in (0, 1, 0):
        data = toy_loaders()[task]
        trainer(root, [ewc], max_epochs=1).fit(module, data, data)
        fisher = reference.per_sample_fisher(module, *data.dataset.tensors)
        ends.append(([p.detach().clone() for p in module.parameters()], fisher))
    return module, ends


def test_online_decays_and_anchors_at_the_latest_weights(tmp_path: Path) -> None:
    """F is 0.25 F1 + 0.5 F2 + F3 with a decay of 0.5, and the penalty is 0 at the end of a task."""
    ewc = EWC(2.0, decay=0.5)
    module, ends = three_fits(tmp_path, ewc)
    state = ewc.state_dict()
    expected = [0.25 * a + 0.5 * b + c for a, b, c in zip(*(fisher for _, fisher in ends), strict=True)]
    for (name, parameter), value in zip(module.named_parameters(), expected, strict=True):
        torch.testing.assert_close(state["importance"][name], value)
        assert torch.equal(state["anchors"][name], parameter)
    assert ewc.penalty() == 0
    with torch.no_grad():
        module.model[0].weight.add_(0.1)
    assert ewc.penalty() == pytest.approx(float(expected[0].sum()) * 0.1**2, rel=1e-4)


def test_separate_keeps_one_quadratic_for_each_task(tmp_path: Path) -> None:
    """Folded into one, it has the value and the gradient of the three together."""
    ewc = EWC(2.0, mode="separate")
    module, ends = three_fits(tmp_path, ewc)
    state = ewc.state_dict()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05)
    total = sum(
        (f * (p - a) ** 2).sum()
        for anchors, fisher in ends
        for f, a, p in zip(fisher, anchors, module.parameters(), strict=True)
    )
    gradients = torch.autograd.grad(total, list(module.parameters()))
    torch.testing.assert_close(ewc.penalty(), total.detach())
    for (name, parameter), gradient in zip(module.named_parameters(), gradients, strict=True):
        folded = 2 * state["importance"][name] * (parameter - state["anchors"][name])
        torch.testing.assert_close(folded.detach(), gradient, rtol=1e-4, atol=1e-5)
    assert len(state["importance"]) == 4
    restored = EWC(2.0, mode="separate")
    restored.load_state_dict(state)
    assert restored.state_dict()["constant"] == state["constant"] > 0


@pytest.mark.parametrize("mode", ["online", "separate"])
def test_four_tasks_in_one_fit(mode: Any, tmp_path: Path) -> None:
    """The anchors move on at each boundary, as in a plain loop with the penalty in the loss."""
    inputs, labels = toy_data().tensors
    module = ToyModule()
    optimizer = module.configure_optimizers()
    terms: list[tuple[list[Tensor], list[Tensor]]] = []
    for task in range(4):
        rows_of_task = (labels == task).nonzero().flatten()
        sampler = TaskSampler(rows_of_task.numpy(), task=task, batch_size=4, seed=0)
        for step in range(3):
            (rows,) = sampler.global_rows(step)
            loss = cross_entropy(module(inputs[rows]), labels[rows])
            for fisher, anchors in terms:
                for f, a, p in zip(fisher, anchors, module.parameters(), strict=True):
                    loss = loss + 4.0 / 2 * (f * (p - a) ** 2).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        fisher = reference.per_sample_fisher(module, inputs[rows_of_task], labels[rows_of_task])
        anchors = [p.detach().clone() for p in module.parameters()]
        if terms and mode == "online":
            fisher = [old + new for old, new in zip(terms.pop()[0], fisher, strict=True)]
        terms.append((fisher, anchors))
    stream = toy_stream(scenario=ClassIncremental(n_tasks=4), epochs_per_task=1, batch_size=4)
    fitted = fit_stream(tmp_path, [EWC(4.0, mode=mode)], stream=stream)
    torch.testing.assert_close(fitted, weights(module), rtol=0, atol=1e-5)


def test_full_decay_forgets_the_tasks_before(tmp_path: Path) -> None:
    """A decay of 0 holds the last task only."""
    ewc = EWC(2.0, decay=0.0)
    module, ends = three_fits(tmp_path, ewc)
    for (name, _), value in zip(module.named_parameters(), ends[-1][1], strict=True):
        torch.testing.assert_close(ewc.state_dict()["importance"][name], value)


def test_penalty_is_zero_before_the_first_task_ends() -> None:
    """There is nothing to hold yet."""
    assert EWC(1.0).penalty() == 0


# ---------------------------------------------------------------------- parameters


def test_include_and_exclude(tmp_path: Path) -> None:
    """Only what is selected is measured and held."""
    ewc = EWC(5.0, include=["model.0.*", "*.bias"], exclude=["model.0.bias"])
    held = fit_stream(tmp_path, [ewc])
    assert ewc.state_dict()["importance"].keys() == {"model.0.weight", "model.3.bias"}
    assert not torch.equal(held, fit_stream(tmp_path, [EWC(5.0)]))
    assert not torch.equal(held, fit_stream(tmp_path))


def by_layer(strengths: dict[str, float]) -> Tensor:
    """The toy stream in a plain loop, with a strength for each layer."""
    inputs, labels = toy_data().tensors
    module = ToyModule()
    optimizer = module.configure_optimizers()
    terms: dict[str, tuple[Tensor, Tensor]] = {}
    for task, rows_of_task in enumerate(reference.TASKS):
        for (rows,) in reference.steps(task, 8, 1):
            loss = cross_entropy(module.model(inputs[rows]), labels[rows])
            for name, parameter in module.named_parameters():
                if name in terms:
                    strength = next(value for layer, value in strengths.items() if name.startswith(layer))
                    fisher, anchor = terms[name]
                    loss = loss + strength / 2 * (fisher * (parameter - anchor) ** 2).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = reference.per_sample_fisher(module, inputs[rows_of_task], labels[rows_of_task])
        for (name, parameter), fisher in zip(module.named_parameters(), found, strict=True):
            terms[name] = fisher + (terms[name][0] if name in terms else 0), parameter.detach().clone()
    return weights(module)


def pair() -> list[EWC]:
    """One instance for each layer."""
    return [EWC(40.0, include=["model.0.*"]), EWC(4.0, include=["model.3.*"], mode="separate")]


def saver(directory: Path) -> ModelCheckpoint:
    """A checkpoint at every step."""
    return ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def test_two_instances_side_by_side(tmp_path: Path) -> None:
    """A strength for each layer, as in a plain loop, and each instance finds its own state on resume."""
    straight = fit_stream(tmp_path, [*pair(), saver(tmp_path)])
    torch.testing.assert_close(straight, by_layer({"model.0": 40.0, "model.3": 4.0}), rtol=0, atol=1e-6)
    resumed = fit_stream(tmp_path, [*pair(), saver(tmp_path / "on")], ckpt_path=tmp_path / "step=8.ckpt")
    assert torch.equal(resumed, straight)


def test_two_instances_for_the_same_parameters_are_refused(tmp_path: Path) -> None:
    """One would take the other's state; Lightning says so."""
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `EWC`"):
        trainer(tmp_path, [EWC(1.0), EWC(2.0)])
    assert EWC(1.0).state_key == EWC(2.0).state_key == "EWC"


def test_resume_with_other_parameters_is_refused(tmp_path: Path) -> None:
    """Parameters without a saved anchor would train unprotected."""
    fit_stream(tmp_path, [EWC(1.0, include=["model.0.*"]), saver(tmp_path)])
    with pytest.raises((ValueError, UserWarning), match=r"no state for EWC|EWC\{"):
        fit_stream(tmp_path, [EWC(1.0), saver(tmp_path / "on")], ckpt_path=tmp_path / "step=8.ckpt")

    class Grown(ToyModule):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(2, 2)

    fit_stream(tmp_path, [ewc := EWC(1.0)])
    with pytest.raises(ValueError, match=r"importance of `EWC` has no entry for \['extra.bias'"):
        fit_stream(tmp_path, [ewc], module=Grown())


def test_settings_out_of_range_are_refused() -> None:
    """With the name of the setting and what was given."""
    for settings, message in (
        ({"strength": 0.0}, "`strength` must be above 0, got 0.0"),
        ({"strength": 1.0, "decay": 1.5}, "`decay` must be from 0 to 1, got 1.5"),
        ({"strength": 1.0, "decay": 0.5, "mode": "separate"}, "`decay=0.5` belongs to `mode='online'`"),
        ({"strength": 1.0, "mode": "both"}, "`mode` must be one of 'online', 'separate', got 'both'"),
        ({"strength": 1.0, "n_samples": 0}, "`n_samples` must be above 0, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            EWC(**settings)  # type: ignore[arg-type]


def test_patterns_without_a_match_are_refused(tmp_path: Path) -> None:
    """At the start of the fit, when the module is known."""
    with pytest.raises(ValueError, match="`include` pattern 'encoder' matches no parameter of ToyModule"):
        fit_stream(tmp_path, [EWC(1.0, include=["encoder"])])


# ---------------------------------------------------------------------- unseen


class Measured(ToyModule):
    """Dropout, batch normalisation, metrics, a list of losses, logs by step and by epoch."""

    def __init__(self) -> None:
        super().__init__(dropout=0.4)
        self.norm = nn.BatchNorm1d(6)
        self.accuracy = MulticlassAccuracy(NUM_CLASSES, average="micro")
        self.losses: list[float] = []
        self.logged: list[dict[str, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self(self.norm(batch[0]))
        loss = cross_entropy(logits, batch[1])
        self.accuracy(logits, batch[1])
        self.losses.append(loss.item())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.logged.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
@pytest.mark.parametrize("fisher", ["empirical", "sampled", "batched"])
def test_consolidation_leaves_the_run_undisturbed(fisher: Any, tmp_path: Path) -> None:
    """Up to the first penalty, weights, buffers, logs, metrics and random generators are those of a run without it."""

    def run(callbacks: list[Callback]) -> tuple[Measured, Tensor]:
        torch.manual_seed(2)
        module = Measured()
        # a shuffled loader draws from the global generator, too
        data = torch.utils.data.DataLoader(toy_loaders()[0].dataset, batch_size=8, shuffle=True)
        for _ in range(2):
            fit = trainer(tmp_path, callbacks, max_epochs=2, log_every_n_steps=1)
            fit.fit(module, data, toy_loaders()[0])
        return module, torch.get_rng_state()

    (plain, plain_rng), (held, held_rng) = run([]), run([EWC(1e-30, fisher=fisher)])
    assert all(torch.equal(value, held.state_dict()[name]) for name, value in plain.state_dict().items())
    assert torch.equal(plain_rng, held_rng)
    assert plain.losses == held.losses
    assert plain.logged == held.logged
    assert len(plain.logged) == 4


# ---------------------------------------------------------------------- compiled and in half precision


class Silent(ToyModule):
    """Logs nothing: `self.log` in a step stops torch's compiler, without callbacks of ours too."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1])


@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("part", ["module", "network"])
def test_compiled_modules(part: str, fisher: Any, tmp_path: Path) -> None:
    """Compiled as a whole or in part: the same weights, measured without a loop over samples."""
    expected = fit_stream(tmp_path, [EWC(20.0, fisher=fisher)], module=Silent())
    module, ewc = Silent(), EWC(20.0, fisher=fisher)
    if part == "network":
        module.model = torch.compile(module.model, backend="eager")
    given = torch.compile(module, backend="eager") if part == "module" else module
    fit = trainer(tmp_path, [ewc], limit_val_batches=0)
    fit.fit(given, datamodule=toy_stream())
    torch.testing.assert_close(weights(module), expected, rtol=0, atol=1e-6)
    assert ewc.estimator.by_sample is False


def test_weights_in_half_precision(tmp_path: Path) -> None:
    """The state is float32, because differences of bfloat16 weights would vanish in it, and it holds the weights."""
    ewc, free, held = EWC(50.0), ToyModule(), ToyModule()
    fit_stream(tmp_path, [ewc], module=held, precision="bf16-true")
    fit_stream(tmp_path, [], module=free, precision="bf16-true")
    assert weights(held).dtype == torch.bfloat16
    state = ewc.state_dict()
    assert {value.dtype for part in ("importance", "anchors") for value in state[part].values()} == {torch.float32}
    assert (weights(held) - weights(free)).abs().max() > 0.05


def test_saved_state_is_whole_and_plain(tmp_path: Path) -> None:
    """Tensors by the names of the parameters, on the CPU; a copy, not a view of what trains on."""
    module, ewc = Texts(), EWC(1.0)
    fit = trainer(tmp_path, [ewc], max_epochs=1)
    fit.fit(module, loader(Texts), loader(Texts))
    state = ewc.state_dict()
    assert state.keys() == {"importance", "anchors", "constant", "by_sample", "tasks"}
    for part in ("importance", "anchors"):
        assert {name: value.shape for name, value in state[part].items()} == {
            name: p.shape for name, p in module.named_parameters()
        }
    with torch.no_grad():
        module.head.weight.zero_()
    assert not torch.equal(state["anchors"]["head.weight"], module.head.weight)
    assert isinstance(module, UserModule)
