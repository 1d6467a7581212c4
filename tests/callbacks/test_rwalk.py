"""RWalk in runs of every kind: its Fisher terms and scores are those of the walk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_cl import RWalk
from paths import Meddler, Quadratic, as_vector, empty_batches, in_closed_form, moves, without_batch
from toys import ToyModule, fit_stream, toy_loaders, trainer, weights
from users import Manual, Texts, loader

STRENGTH, ALPHA, INTERVAL, DAMPING = 0.1, 0.7, 3, 0.01


def test_closed_form_on_a_quadratic(tmp_path: Path) -> None:
    r"""With weights :math:`q^t \theta_0` Fisher terms and scores are sums of geometric series."""
    curvature, start, factor = in_closed_form()
    module, intervals, length = Quadratic(), 4, 3
    rwalk = RWalk(1.0, alpha=ALPHA, interval=length, damping=DAMPING)
    batches = empty_batches(intervals * length)
    trainer(tmp_path, [rwalk], max_epochs=1, precision="64-true").fit(module, batches)
    # the mean squared gradient of interval j is that of the first times ratio ** j
    ratio, beta = factor ** (2 * length), 1 - ALPHA
    first = (curvature * start) ** 2 * (1 - ratio) / (length * (1 - factor**2))
    number = torch.arange(intervals, dtype=torch.float64)[:, None]
    fisher = first * (ALPHA * ratio * (ratio**number - beta**number) / (ratio - beta) + beta**number)
    fall = module.learning_rate * length * first * ratio**number
    way = (start * (1 - factor**length)) ** 2 * ratio**number
    score = (fall / (0.5 * fisher * way + DAMPING)).sum(0)
    state = rwalk.state_dict()
    torch.testing.assert_close(as_vector(state["fisher"], module), fisher[-1], rtol=1e-6, atol=0)
    torch.testing.assert_close(as_vector(state["score"], module), score, rtol=1e-6, atol=0)
    expected = fisher[-1] / fisher[-1].max() + score / score.max()
    torch.testing.assert_close(as_vector(state["importance"], module), expected, rtol=1e-6, atol=0)
    # strength times importance times the squared distance, without a half
    with torch.no_grad():
        module.first.add_(0.1)
    torch.testing.assert_close(rwalk.penalty(), expected[:2].sum() * 0.1**2, rtol=1e-5, atol=0)


def plain_rwalk(tasks: list[int], **settings: Any) -> tuple[ToyModule, Tensor]:
    """RWalk in a plain loop over one epoch of each task; return the module and the importance."""
    module, penalty = ToyModule(), None
    fisher = score = importance = torch.zeros(())
    for task in tasks:
        way, task_score = moves(module, toy_loaders(batch_size=3)[task], penalty=penalty, **settings), torch.zeros(())
        for begin in range(0, len(way), INTERVAL):
            part = way[begin : begin + INTERVAL]
            now = torch.stack([grad**2 for grad, _, _ in part]).mean(0)
            fisher = ALPHA * now + (1 - ALPHA) * fisher if fisher.ndim else now
            fall = -sum(grad * (after - before) for grad, before, after in part)
            task_score = task_score + fall / (fisher * (part[-1][2] - part[0][1]) ** 2 / 2 + DAMPING)
        positive = task_score.clamp(min=0)
        score = (score + positive) / 2 if score.ndim else positive
        importance, anchor = fisher / fisher.max() + score / score.max(), weights(module)

        def penalty(theta: Tensor, held: Tensor = importance, around: Tensor = anchor) -> Tensor:
            return STRENGTH * (held * (theta - around) ** 2).sum()

    return module, importance


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "accumulation and clipping": (
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
        {"accumulate": 2, "clip": 0.05},
    ),
    "meddled with": ({}, {"meddle": True}),
}


@pytest.mark.parametrize("name", RUNS)
def test_importance_over_three_tasks_is_that_of_a_plain_loop(name: str, tmp_path: Path) -> None:
    """Eight steps, or four, are no whole number of intervals of three."""
    settings, plain = RUNS[name]
    rwalk, module = RWalk(STRENGTH, alpha=ALPHA, interval=INTERVAL, damping=DAMPING), ToyModule()
    for task in (0, 1, 0):
        callbacks = [Meddler(), rwalk] if name == "meddled with" else [rwalk]
        data = toy_loaders(batch_size=3)[task]
        trainer(tmp_path, callbacks, max_epochs=1, **settings).fit(module, data, data)
    expected, importance = plain_rwalk([0, 1, 0], **plain)
    torch.testing.assert_close(as_vector(rwalk.state_dict()["importance"], module), importance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(module), weights(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("step", [2, 8], ids=["first task", "second task"])
def test_a_resumed_run_ends_in_the_same_state(step: int, tmp_path: Path) -> None:
    """Inside an interval, what only a third task would feel included: that a weight has had an interval before."""

    def saver(directory: Path) -> ModelCheckpoint:
        return ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    straight, resumed = RWalk(1.0, interval=3), RWalk(1.0, interval=3)
    fit_stream(tmp_path, [straight, saver(tmp_path)])
    path = tmp_path / f"step={step}.ckpt"
    fit_stream(tmp_path, [resumed, saver(tmp_path / "resumed")], ckpt_path=path)
    found, expected = resumed.state_dict(), straight.state_dict()
    assert found.pop("measured") == expected.pop("measured")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Overflowing(ToyModule):
    """The gradients of one batch are infinite."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if batch_idx == 1 else loss


def test_a_step_that_the_scaler_skips_does_not_count(tmp_path: Path) -> None:
    """Fisher terms and scores are those of a run without its batch."""
    states = []
    for kind in (Overflowing, ToyModule):
        rwalk, data, module = RWalk(1.0, interval=2), toy_loaders()[0], kind()
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
        fit = trainer(tmp_path, [rwalk], max_epochs=1, plugins=[plugin])
        fit.fit(module, data if kind is Overflowing else without_batch(data, 1), data)
        states.append(as_vector(rwalk.state_dict()["importance"], module))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=1e-3)
    assert states[0].isfinite().all()


class PartlyUsed(ToyModule):
    """A weight without a gradient; in the second task the first layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.current_task.index == 1:
            self.model[0].requires_grad_(False)
            self.model[0].zero_grad()


def test_frozen_weights_keep_their_fisher_terms(tmp_path: Path) -> None:
    """A weight that does not train is not forgotten; one without a gradient has Fisher terms and a score of 0."""
    module, rwalk = PartlyUsed(), RWalk(1.0, interval=2)
    fisher = []
    for task in (0, 1):
        data = toy_loaders()[task]
        trainer(tmp_path, [rwalk], max_epochs=1).fit(module, data, data)
        fisher.append(rwalk.state_dict()["fisher"])
        module.requires_grad_(True)
    assert torch.equal(fisher[0]["model.0.weight"], fisher[1]["model.0.weight"])
    assert fisher[0]["model.0.weight"].max() > 0
    assert not torch.equal(fisher[0]["model.3.weight"], fisher[1]["model.3.weight"])
    assert torch.equal(rwalk.state_dict()["importance"]["unused"], torch.zeros(3))


def test_a_gradient_of_none_is_one_of_zero(tmp_path: Path) -> None:
    """Whether the optimizer's gradients are set to `None` or to 0 between steps changes nothing."""
    importance = []
    for set_to_none in (True, False):

        class Zeroing(ToyModule):
            to_none = set_to_none

            def __init__(self) -> None:
                super().__init__()
                self.other = nn.Linear(6, 4)

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                # by turns, as experts are
                self.turn = batch_idx % 2
                return super().training_step(batch, batch_idx)

            def forward(self, inputs: Tensor) -> Tensor:
                return super().forward(inputs) + (self.other(inputs) if self.turn == 0 else 0)

            def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
                optimizer.zero_grad(set_to_none=self.to_none)

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.SGD(self.parameters(), lr=0.1)

            def validation_step(self, batch: Any, batch_idx: int) -> None:
                pass

        module, rwalk, data = Zeroing(), RWalk(1.0, interval=2), toy_loaders()[0]
        with torch.no_grad():
            module.other.weight.fill_(0.1)
            module.other.bias.zero_()
        trainer(tmp_path, [rwalk], max_epochs=2).fit(module, data, data)
        importance.append(as_vector(rwalk.state_dict()["importance"], module))
    assert torch.equal(*importance)


def test_several_optimizers_under_manual_optimization(tmp_path: Path) -> None:
    """Each weight's intervals are counted by the optimizer that owns it."""
    module, rwalk = Manual(), RWalk(1.0, interval=2)
    trainer(tmp_path, [rwalk], max_epochs=1).fit(module, loader(Manual), loader(Manual))
    state = rwalk.state_dict()
    assert state["steps"] == dict.fromkeys(dict(module.named_parameters()), 0)
    assert state["measured"] == ["body.bias", "body.weight", "head.bias", "head.weight"]
    assert state["importance"]["scale"] == 0
    assert min(state["importance"][name].max() for name in state["measured"]) > 0


class Fused(ToyModule):
    """AdamW in one kernel."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=True)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_fused_adamw_and_low_precision(precision: Any, tmp_path: Path) -> None:
    """The state is float32, finite, and holds the weights."""
    rwalk = RWalk(100.0, interval=2)
    held = fit_stream(tmp_path, [rwalk], module=Fused(), precision=precision)
    free = fit_stream(tmp_path, module=Fused(), precision=precision)
    kept = [value for part in rwalk.state_dict().values() if isinstance(part, dict) for value in part.values()]
    tensors = [value for value in kept if isinstance(value, Tensor)]
    assert len(tensors) == 8 * 4
    assert {value.dtype for value in tensors} == {torch.float32}
    assert all(value.isfinite().all() for value in tensors)
    assert (held - free).abs().max() > 0.01


def test_importance_is_normalised(tmp_path: Path) -> None:
    """Whatever the scale of the loss, neither part outweighs the other: the largest of each is 1."""
    rwalk = RWalk(1.0, interval=2)
    fit_stream(tmp_path, [rwalk])
    state = rwalk.state_dict()
    fisher, score, importance = ({n: state[key][n] for n in state[key]} for key in ("fisher", "score", "importance"))
    peaks = [max(float(value.max()) for value in part.values()) for part in (fisher, score)]
    for name, value in importance.items():
        torch.testing.assert_close(value, fisher[name] / peaks[0] + score[name] / peaks[1])
    assert min(float(value.min()) for value in importance.values()) >= 0


def test_dictionary_batches_and_a_selection(tmp_path: Path) -> None:
    """Only what is selected is followed."""
    rwalk = RWalk(1.0, include=["embedding.*", "head.*"], exclude=["head.bias"])
    trainer(tmp_path, [rwalk], max_epochs=1).fit(Texts(), loader(Texts), loader(Texts))
    assert rwalk.state_dict()["fisher"].keys() == {"embedding.weight", "head.weight"}


def test_nothing_is_added_in_the_first_task(tmp_path: Path) -> None:
    """The same bits as without it, up to the first task's end."""
    data, weights_of = toy_loaders()[0], []
    for callbacks in ([], [RWalk(1.0)]):
        module = ToyModule()
        trainer(tmp_path, callbacks, max_epochs=2).fit(module, data, data)
        weights_of.append(weights(module))
    assert torch.equal(*weights_of)


def test_settings_out_of_range_are_refused() -> None:
    """With the name of the setting and what was given."""
    for settings, message in (
        ({"strength": 0.0}, "`strength` must be above 0, got 0.0"),
        ({"strength": 1.0, "damping": 0.0}, "`damping` must be above 0, got 0.0"),
        ({"strength": 1.0, "alpha": 0.0}, "`alpha` must be above 0 and at most 1, got 0.0"),
        ({"strength": 1.0, "alpha": 1.5}, "`alpha` must be above 0 and at most 1, got 1.5"),
        ({"strength": 1.0, "interval": 0}, "`interval` must be a whole number of steps, at least 1, got 0"),
        ({"strength": 1.0, "interval": 2.5}, "`interval` must be a whole number of steps, at least 1, got 2.5"),
    ):
        with pytest.raises(ValueError, match=message):
            RWalk(**settings)


def test_patterns_without_a_match_are_refused(tmp_path: Path) -> None:
    """At the start of the fit, when the module is known."""
    with pytest.raises(ValueError, match="`include` pattern 'encoder' matches no parameter of ToyModule"):
        fit_stream(tmp_path, [RWalk(1.0, include=["encoder"])])


def test_a_state_of_other_parameters_is_refused(tmp_path: Path) -> None:
    """They would train unprotected."""
    rwalk = RWalk(1.0)
    fit_stream(tmp_path, [rwalk])
    state = rwalk.state_dict()
    del state["squares"]["model.0.bias"]
    fresh = RWalk(1.0)
    fresh.load_state_dict(state)
    with pytest.raises(ValueError, match=r"The state 'squares' of `RWalk` has no entry for \['model.0.bias'\]"):
        fit_stream(tmp_path, [fresh])


def test_footprint_counts_the_state_and_the_copies_of_a_step(tmp_path: Path) -> None:
    """In float32, of what is selected; at a task's end the new state beside the old."""
    module = ToyModule()
    footprint = RWalk(1.0, include=["model.3.*"]).footprint(trainer(tmp_path), module, None)
    assert footprint.device == 10 * 4 * (32 + 4)
    assert sum(value.numel() for value in footprint.task_end()) == 2 * (32 + 4)
