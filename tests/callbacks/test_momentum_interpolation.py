"""Momentum interpolation: an average beside a training that it leaves as it is, and evaluation with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from lightning_cl import FreezeExcept, FSDP2Strategy, MomentumInterpolation
from ranks import Ranks
from toys import ToyModule, fit_stream, toy_loaders, toy_stream, trainer, weights
from users import Manual, Texts, loader

MOMENTUM = 0.8


def whole(module: nn.Module) -> Tensor:
    """All parameters, shards gathered, in float32."""
    full = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return torch.cat([p.detach().float().flatten() for p in full])


class Average(Callback):
    """The slow weights by hand, for steps that Lightning counts."""

    def __init__(self) -> None:
        self.slow: dict[int, Tensor] = {}

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self.slow[trainer.global_step] = whole(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
        last = max(self.slow)
        if trainer.global_step != last:
            self.slow[trainer.global_step] = MOMENTUM * self.slow[last] + (1 - MOMENTUM) * whole(pl_module)

    @property
    def last(self) -> Tensor:
        return self.slow[max(self.slow)]


class Watched(ToyModule):
    """Notes the weights that it is validated and tested with, by optimizer steps."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.validated: list[tuple[int, Tensor]] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.validated.append((self.trainer.global_step, whole(self)))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return whole(self)


class Fused(Watched):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05, fused=True)


# ---------------------------------------------------------------------- the average

RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "clipping": {"gradient_clip_val": 0.1},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "64-true": {"precision": "64-true"},
}


@pytest.mark.parametrize("kind", [Watched, Fused])
@pytest.mark.parametrize("name", RUNS)
def test_training_goes_on_and_evaluation_is_slow(name: str, kind: type[Watched], tmp_path: Path) -> None:
    """The fast weights end at the same bits as without it; every validation sees the average."""
    module, average = kind(), Average()
    fast = fit_stream(tmp_path, [MomentumInterpolation(MOMENTUM), average], module=module, **RUNS[name])
    assert torch.equal(fast, fit_stream(tmp_path, module=kind(), **RUNS[name]))
    for step, seen in module.validated:
        torch.testing.assert_close(seen, average.slow[step])
    assert len(module.validated) > 3
    assert (average.last - fast).abs().max() > 1e-2


def test_average_of_half_precision_does_not_stall(tmp_path: Path) -> None:
    """Steps too small for bfloat16 add up: with 0.999, a weight of 1 that trains at 1.5 stays 1 in bfloat16."""

    class Constant(Watched):
        def on_train_batch_end(self, *_: Any) -> None:
            with torch.no_grad():
                self.model[0].bias.fill_(1.5)

        def on_fit_start(self) -> None:
            with torch.no_grad():
                self.model[0].bias.fill_(1.0)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    slow, module, data = MomentumInterpolation(0.999), Constant(), toy_loaders()[0]
    trainer(tmp_path, [slow], max_epochs=10, precision="bf16-true").fit(module, data, data)
    # the first of 30 steps still finds 1.0
    expected = torch.full((8,), 1.5 - 0.5 * 0.999**29)
    torch.testing.assert_close(slow.state_dict()["weights"]["model.0.bias"], expected)
    assert (module.validated[-1][1][48:56] > 1).all()
    assert (module.model[0].bias == 1.5).all()


@pytest.mark.parametrize("kind", [Manual, Texts])
def test_several_optimizers_and_batches_in_mappings(kind: type[Any], tmp_path: Path) -> None:
    """A weight moves once for each step of the optimizer that owns it."""
    module, data, slow = kind(), loader(kind), MomentumInterpolation(MOMENTUM, at_end="slow")
    start = weights(module)

    class EachBatch(Average):
        def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
            count = len(self.slow)
            self.slow[count] = MOMENTUM * self.slow[count - 1] + (1 - MOMENTUM) * whole(pl_module)

    expected = EachBatch()
    trainer(tmp_path, [slow, expected], max_epochs=2).fit(module, data, data)
    torch.testing.assert_close(weights(module), expected.last)
    assert (weights(module) - start).abs().max() > 1e-3


def test_frozen_parameters_are_shared_and_thawed_ones_named(tmp_path: Path) -> None:
    """What is frozen has no slow weights; what becomes trainable in the fit is missed."""

    class Thawing(ToyModule):
        thaws = False

        def on_train_epoch_start(self) -> None:
            self.model[0].requires_grad_(self.thaws)

    module, slow, data = Thawing(), MomentumInterpolation(MOMENTUM), toy_loaders()[0]
    module.model[0].requires_grad_(False)
    trainer(tmp_path, [slow], max_epochs=1).fit(module, data, data)
    assert slow.state_dict()["weights"].keys() == {"model.3.weight", "model.3.bias"}
    module.thaws = True
    with pytest.raises(UserWarning, match=r"no slow weights of \['model.0.bias', 'model.0.weight'\]"):
        trainer(tmp_path, [slow], max_epochs=1).fit(module, data, data)


class Growing(Watched):
    """Its head has rows for the classes of its second task when that starts."""

    def __init__(self) -> None:
        super().__init__()
        self.model[3] = nn.Linear(8, 2)
        nn.init.zeros_(self.model[3].weight)
        nn.init.zeros_(self.model[3].bias)

    def forward(self, inputs: Tensor) -> Tensor:
        logits = self.model(inputs)
        return pad(logits, (0, 4 - logits.shape[1]))

    def on_task_start(self, task: Any) -> None:
        if task.index == 1:
            old, self.model[3] = self.model[3], nn.Linear(8, 4)
            with torch.no_grad():
                for grown, before in zip(self.model[3].parameters(), old.parameters(), strict=True):
                    grown.fill_(0.5)
                    grown[:2] = before
            self.trainer.strategy.optimizers = [self.configure_optimizers()]


def test_a_head_that_grows(tmp_path: Path) -> None:
    """Old rows go on with their average, new ones begin as they are built."""
    module, slow = Growing(), MomentumInterpolation(0.9999999)
    fit_stream(tmp_path, [slow], module=module)
    found = slow.state_dict()["weights"]["model.3.weight"]
    torch.testing.assert_close(found, torch.tensor([[0.0]] * 2 + [[0.5]] * 2).expand(4, 8), rtol=0, atol=1e-4)
    assert (module.model[3].weight - found).abs().amax(1).min() > 1e-2
    torch.testing.assert_close(module.validated[-1][1][56:88].view(4, 8), found, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------- evaluation


def test_fast_weights_are_evaluated_if_asked_for(tmp_path: Path) -> None:
    """As without the callback."""
    module, plain = Watched(), Watched()
    fit_stream(tmp_path, [MomentumInterpolation(MOMENTUM, evaluate="fast")], module=module)
    fit_stream(tmp_path, module=plain)
    for (_, seen), (_, expected) in zip(module.validated, plain.validated, strict=True):
        assert torch.equal(seen, expected)


@pytest.mark.parametrize("evaluation", ["validate", "test", "predict"])
def test_a_checkpoint_is_evaluated_with_its_slow_weights(evaluation: str, tmp_path: Path) -> None:
    """By fresh objects, which then train on from its fast ones."""
    average, path = Average(), tmp_path / "last.ckpt"
    fit = trainer(tmp_path, [MomentumInterpolation(MOMENTUM), average], max_epochs=2)
    data = toy_loaders()[0]
    fit.fit(ToyModule(), data, data)
    fit.save_checkpoint(path)
    module, slow = Watched(seed=3), MomentumInterpolation(MOMENTUM)
    fresh = trainer(tmp_path, [slow], max_epochs=1)
    predicted = getattr(fresh, evaluation)(module, data, ckpt_path=path)
    seen = predicted[0] if evaluation == "predict" else module.validated[0][1]
    torch.testing.assert_close(seen, average.last)
    assert torch.equal(weights(module), weights(fit.lightning_module))
    on = Average()
    on.slow[-1] = average.last
    on.on_train_start = lambda *_: None  # type: ignore[method-assign]
    trainer(tmp_path, [slow, on], max_epochs=1).fit(module, data, data)
    slow.load_slow_weights(module)
    torch.testing.assert_close(weights(module), on.last)


def test_what_an_evaluation_writes_into_buffers_stays(tmp_path: Path) -> None:
    """A module may count there; buffers are its own."""

    class Counting(Watched):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.count += 1

    module = Counting()
    fit_stream(tmp_path, [MomentumInterpolation(MOMENTUM)], module=module)
    assert module.count == len(module.validated)


class FailsInValidation(Watched):
    error: BaseException

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if not self.trainer.sanity_checking:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_weights_come_back_after_an_exception(error: BaseException, tmp_path: Path) -> None:
    """Also in the checkpoint that is written because of it; the module and the Trainer are as they were."""
    module, average = FailsInValidation(), Average()
    module.error = error
    saver = ModelCheckpoint(tmp_path, filename="failed", save_on_exception=True)
    fast: list[Tensor] = []
    average.on_validation_start = lambda trainer, pl_module: fast.append(whole(pl_module))  # type: ignore[method-assign]
    # in front, so that it sees the fast weights
    fit = trainer(tmp_path, [average, MomentumInterpolation(MOMENTUM), saver], max_epochs=1)
    with pytest.raises((RuntimeError, SystemExit)):
        fit.fit(module, toy_loaders()[0], toy_loaders()[0])
    torch.testing.assert_close(module.validated[-1][1], average.last)
    assert torch.equal(weights(module), fast[-1])
    assert fit.save_checkpoint.__func__ is type(fit).save_checkpoint
    saved = torch.load(tmp_path / "failed.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["model.0.bias"], module.model[0].bias)


class SavesInValidation(Watched):
    """As a signal of SLURM may, at any moment."""

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.trainer.save_checkpoint(f"{self.trainer.default_root_dir}/inside-{self.trainer.global_step}.ckpt")
            self.validated.append((self.trainer.global_step, whole(self)))


def test_checkpoints_hold_both(tmp_path: Path) -> None:
    """Written behind a validation or inside one: the fast weights as the module's, the slow ones as state."""
    module, average = SavesInValidation(), Average()
    fast: dict[int, Tensor] = {}
    average.on_validation_start = lambda t, m: fast.update({t.global_step: whole(m)})  # type: ignore[method-assign]
    saver = ModelCheckpoint(tmp_path, filename="behind-{step}", save_top_k=-1)
    fit_stream(tmp_path, [average, MomentumInterpolation(MOMENTUM), saver], module=module)
    names = [name for name, _ in module.named_parameters()]
    for path in ("inside-6.ckpt", "inside-12.ckpt", "behind-step=6.ckpt", "behind-step=12.ckpt"):
        saved = torch.load(tmp_path / path, weights_only=True)
        step = saved["global_step"]
        found = torch.cat([saved["state_dict"][name].flatten() for name in names])
        assert torch.equal(found, fast[step])
        state = saved["callbacks"]["MomentumInterpolation"]["weights"]
        torch.testing.assert_close(torch.cat([state[name].flatten() for name in names]), average.slow[step])
    for step, seen in module.validated:
        torch.testing.assert_close(seen, average.slow[step])


def test_the_evaluation_that_a_resumed_run_makes_up_for_is_slow(tmp_path: Path) -> None:
    """A checkpoint of a task's last step is older than the evaluation of the task."""
    straight, resumed = Watched(), Watched()

    def saver(directory: Path) -> ModelCheckpoint:
        return ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)

    fit_stream(tmp_path, [MomentumInterpolation(MOMENTUM), saver(tmp_path)], module=straight)
    again = [MomentumInterpolation(MOMENTUM), saver(tmp_path / "again")]
    fit_stream(tmp_path, again, module=resumed, ckpt_path=tmp_path / "step=6.ckpt")
    expected = [seen for step, seen in straight.validated if step >= 6]
    assert len(expected) == len(resumed.validated)
    for (_, seen), other in zip(resumed.validated, expected, strict=True):
        assert torch.equal(seen, other)


# ---------------------------------------------------------------------- several fits, and the end


def test_the_average_runs_on_over_fits(tmp_path: Path) -> None:
    """One fit for each task, the checks before training included."""
    slow, module, average = MomentumInterpolation(MOMENTUM), Watched(), Average()
    averages: list[Tensor] = []
    for task in toy_loaders():
        if averages:
            average.slow = {0: averages[-1]}
            average.on_train_start = lambda *_: None  # type: ignore[method-assign]
        trainer(tmp_path, [slow, average], max_epochs=1).fit(module, task, task)
        averages.append(average.last)
        # of the second fit, the first is its sanity check
        torch.testing.assert_close(module.validated[-1][1], averages[-1])
        module.validated = []
    slow.load_slow_weights(module)
    torch.testing.assert_close(weights(module), averages[-1])


def test_at_the_end_of_a_fit(tmp_path: Path) -> None:
    """The module holds the slow weights, checkpoints of the fit the fast ones, and a second fit goes on from them."""
    slow, module, average = MomentumInterpolation(MOMENTUM, at_end="slow"), Watched(), Average()
    data = toy_loaders()[0]
    saver = ModelCheckpoint(tmp_path, filename="end", save_last=True)
    fit = trainer(tmp_path, [slow, average, saver], max_epochs=1)
    fit.fit(module, data, data)
    torch.testing.assert_close(weights(module), average.last)
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["state_dict"]
    assert (saved["model.0.weight"] - module.model[0].weight).abs().max() > 1e-3
    starts: list[Tensor] = []
    average.on_train_start = lambda trainer, pl_module: starts.append(whole(pl_module))  # type: ignore[method-assign]
    trainer(tmp_path, [slow, average], max_epochs=1).fit(module, data, data)
    torch.testing.assert_close(starts[0], average.slow[3])


# ---------------------------------------------------------------------- two ranks


def fit_on_this_rank(root: Path, strategy: str, with_callback: bool) -> tuple[list[Any], Tensor, Tensor, bool]:
    """Fit the toy stream; return validations, fast weights, slow weights, and whether weights are shards."""
    module, slow, average = Watched(), MomentumInterpolation(MOMENTUM), Average()
    callbacks = [slow, ModelCheckpoint(root / "on", filename="{step}", save_top_k=-1)] if with_callback else []
    chosen = FSDP2Strategy(wrap=["Linear"]) if strategy == "fsdp2" else strategy
    fit = trainer(root, [*callbacks, average], strategy=chosen, devices=2)
    fit.fit(module, datamodule=toy_stream(batch_size=4))
    shards = all(isinstance(p, DTensor) for p in module.parameters())
    for step, seen in module.validated if with_callback else []:
        torch.testing.assert_close(seen.flatten(), average.slow[step])
    fast = whole(module)
    if with_callback:
        slow.load_slow_weights(module)
    return [step for step, _ in module.validated], fast, whole(module), shards


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_on_two_ranks(strategy: str, two_ranks: Ranks, tmp_path: Path) -> None:
    """Training is as without it, evaluation is slow, and the slow weights can be taken."""
    plain = two_ranks.run(fit_on_this_rank, tmp_path, strategy, False)[0][1]
    for validated, fast, slow, shards in two_ranks.run(fit_on_this_rank, tmp_path, strategy, True):
        assert len(validated) > 3
        assert torch.equal(fast, plain)
        assert (slow - fast).abs().max() > 1e-2
        assert shards == (strategy == "fsdp2")


# ---------------------------------------------------------------------- refusals


def test_settings_out_of_range_are_refused() -> None:
    """With the name of the setting and what was given."""
    for settings, message in (
        ({"momentum": 0.0}, "`momentum` must be above 0 and below 1, got 0.0"),
        ({"momentum": 1.0}, "`momentum` must be above 0 and below 1, got 1.0"),
        ({"evaluate": "both"}, "`evaluate` must be one of 'slow', 'fast', got 'both'"),
        ({"at_end": "both"}, "`at_end` must be one of 'fast', 'slow', got 'both'"),
    ):
        with pytest.raises(ValueError, match=message):
            MomentumInterpolation(**settings)  # type: ignore[arg-type]


def test_modules_without_slow_weights_are_refused(tmp_path: Path) -> None:
    """Before the first fit there are none, and another module has others."""
    slow = MomentumInterpolation()
    with pytest.raises(ValueError, match="There are no slow weights yet"):
        slow.load_slow_weights(ToyModule())
    fit_stream(tmp_path, [slow])
    with pytest.raises(ValueError, match="weights kept by `MomentumInterpolation`"):
        slow.load_slow_weights(nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("order", [1, -1])
def test_evaluates_what_a_callback_has_frozen_for_the_fit(order: int, tmp_path: Path) -> None:
    """The fit is over, so all is trainable again, and the slow weights stand for the rest; also in a fresh process."""

    def callbacks() -> list[Any]:
        return [FreezeExcept(["model.3.*"]), MomentumInterpolation(MOMENTUM)][::order]

    module, average = Watched(), Average()
    both = callbacks()
    run = trainer(tmp_path, [*both, average, ModelCheckpoint(tmp_path, filename="end")])
    run.fit(module, datamodule=toy_stream())
    fast = whole(module)
    tests = [run, trainer(tmp_path, [*callbacks(), ModelCheckpoint()])]
    for test, checkpoint in zip(tests, (None, tmp_path / "end.ckpt"), strict=True):
        module.validated = []
        test.test(module, datamodule=toy_stream(), ckpt_path=checkpoint, verbose=False)
        torch.testing.assert_close(module.validated[-1][1], average.last)
        assert (average.last - fast).abs().max() > 1e-3
    assert all(parameter.requires_grad for parameter in module.parameters())
    both[order == 1].load_slow_weights(module)
    torch.testing.assert_close(whole(module), average.last)
