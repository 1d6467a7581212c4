"""A teacher: the user's own step with other weights, unseen by the student."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from lightning_cl import ContinualCallback, ExperienceReplay, LwF
from lightning_cl.core.capture import forward_loss
from lightning_cl.core.teacher import Teacher, Watched
from toys import NUM_CLASSES, NUM_FEATURES, ToyModule, fit_stream, toy_loaders, toy_stream, trainer, weights


class Taught(ContinualCallback):
    """Watches a teacher and its student, and keeps what it saw."""

    needs_state = False

    def __init__(self, kind: Any = "previous", name: str | None = None, **settings: Any) -> None:
        self.teaching, self.name = Teacher(kind, owner="Taught", **settings), name
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.losses: list[Tensor] = []
        self.watched: Watched | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.teaching.start_fit(pl_module, inside_task=False)
        self.watched = self.teaching.watch(pl_module, self.name)

    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Any) -> None:
        self.teaching.start_task(pl_module, first=task.index == 0)

    @contextmanager
    def around_step(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> Iterator[None]:
        with self.teaching.around_step(pl_module, batch, batch_idx):
            yield

    def loss_term(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, outputs: Any) -> None:
        if self.teaching:
            assert self.watched is not None
            self.seen.append(self.watched.take())
            self.losses.append(self.teaching.loss)
            # nor does it hold the graph of another forward
            assert self.watched.capture.found is None

    def observe_update(self, trainer: Any, pl_module: Any, step: Any) -> None:
        self.teaching.follow(pl_module, step.parameters)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.teaching.end_fit()


class Busy(ToyModule):
    """Augments at random by every generator, and leaves traces wherever steps do."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)
        self.norm = nn.BatchNorm1d(NUM_FEATURES)
        self.accuracy = MulticlassAccuracy(NUM_CLASSES, average="micro")
        self.logged: list[float] = []
        self.views: list[tuple[bool, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        inputs = inputs + 0.1 * torch.randn(inputs.shape) + random.random() + float(np.random.rand())
        logits = self.model(self.norm(inputs))
        loss = cross_entropy(logits, labels)
        self.accuracy(logits, labels)
        self.log("train_acc", self.accuracy, on_step=False, on_epoch=True)
        assert self.training == torch.is_grad_enabled()
        VIEWS.append((self.training, inputs))
        self.logged.append(float(loss.detach()))
        return loss


VIEWS: list[tuple[bool, Tensor]] = []


def run(module: Busy, root: Path, callbacks: list[Any]) -> dict[str, Any]:
    """Fit the stream with all generators seeded; return all that training leaves."""
    VIEWS.clear()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    fit = trainer(root, callbacks)
    fit.fit(module, datamodule=toy_stream())
    return {
        "state": {name: value.tolist() for name, value in module.state_dict().items()},
        "logged": module.logged,
        "accuracy": fit.callback_metrics["train_acc"].item(),
        "rng": [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()],
    }


def test_leaves_no_trace(tmp_path: Path) -> None:
    """Weights, running statistics, metrics, logs, attributes, generators and keys are those of a run without it."""
    expected = run(Busy(), tmp_path, [])
    taught = Taught(name="model")
    assert run(Busy(), tmp_path, [taught]) == expected
    assert taught.teaching.runs == 6


def test_sees_the_students_augmentation_without_dropout(tmp_path: Path) -> None:
    """The same random numbers, drawn twice; evaluation mode and the running statistics of its own weights."""
    taught, module = Taught(name="model"), Busy()
    run(module, tmp_path, [taught])
    assert [training for training, _ in VIEWS] == [True] * 6 + [False, True] * 6
    views = [inputs for _, inputs in VIEWS[6:]]
    old = Busy()
    old_state = run_first_task(old, tmp_path)
    for step in range(6):
        assert torch.equal(views[2 * step], views[2 * step + 1])
        expected = old_state.eval().model(old_state.norm(views[2 * step]))
        torch.testing.assert_close(taught.seen[step][1], expected)
        assert not taught.seen[step][1].requires_grad
        assert taught.seen[step][0].requires_grad


def run_first_task(module: Busy, root: Path) -> Busy:
    """Return the module as it is after the first task of the run above."""
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    stream = toy_stream()
    trainer(root, max_steps=6).fit(module, datamodule=stream)
    return module


def test_kinds_have_their_weights(tmp_path: Path) -> None:
    """The task before, from the second on; the first fit's start; an average after every optimizer step."""
    start = ToyModule()
    seen: dict[str, list[Tensor]] = {"inputs": [], "after": []}

    class Recorded(ToyModule):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen["inputs"].append(batch[0].clone())
            seen["after"].append(copy.deepcopy(self.state_dict()))

    kinds = {"previous": Taught(), "pretrained": Taught("pretrained"), "ema": Taught("ema", decay=0.7)}
    fit_stream(tmp_path, list(kinds.values()), module=Recorded(), accumulate_grad_batches=3)
    assert {kind: len(taught.seen) for kind, taught in kinds.items()} == {"previous": 6, "pretrained": 12, "ema": 12}
    average, probe = copy.deepcopy(start.state_dict()), ToyModule()
    for step, inputs in enumerate(seen["inputs"]):
        expected = {"pretrained": start.state_dict(), "ema": average}
        if step >= 6:
            expected["previous"] = seen["after"][5]
        for kind, state in expected.items():
            probe.load_state_dict(state)
            found = kinds[kind].seen[step - 6 if kind == "previous" else step][1]
            torch.testing.assert_close(found, probe(inputs), msg=f"{kind} at step {step}")
        if step % 3 == 2:
            average = {name: 0.7 * average[name] + 0.3 * value for name, value in seen["after"][step].items()}


def test_its_loss_is_that_of_the_users_step(tmp_path: Path) -> None:
    """Without what callbacks add to it."""
    taught, module = Taught("pretrained"), ToyModule()
    loader = toy_loaders()[0]
    trainer(tmp_path, [LwF(teacher="ema", decay=0.5, classes="seen"), taught], max_epochs=1).fit(module, loader, loader)
    start = ToyModule()
    for loss, batch in zip(taught.losses, loader, strict=True):
        torch.testing.assert_close(loss, cross_entropy(start(batch[0]), batch[1]))


def test_computes_in_the_precision_of_the_step(tmp_path: Path) -> None:
    """And leaves no half-precision copies of weights behind, which autocast would let the student use."""
    taught = Taught("pretrained")
    found = fit_stream(tmp_path, [taught], precision="bf16-mixed")
    assert taught.seen[0][1].dtype == taught.seen[0][0].dtype == torch.bfloat16
    torch.testing.assert_close(*taught.seen[0], rtol=0, atol=0)
    assert torch.equal(found, fit_stream(tmp_path, precision="bf16-mixed"))


def test_other_forwards_of_a_step_are_not_seen(tmp_path: Path) -> None:
    """Replay runs the module again for its own loss, behind or before this callback."""
    for order in (slice(None), slice(None, None, -1)):
        taught = Taught("pretrained")
        replay = ExperienceReplay(12, mode="separate", batch_size=3)
        fit_stream(tmp_path, [taught, replay][order])
        assert all(len(student) == len(teacher) == 8 for student, teacher in taught.seen)


def test_frozen_weights_are_shared(tmp_path: Path) -> None:
    """Only what trains is copied."""
    module = ToyModule()
    teacher = Teacher("pretrained", owner="Taught")
    full = teacher.num_bytes(module)
    module.model[0].requires_grad_(False)
    assert full == 4 * sum(p.numel() for p in module.parameters())
    assert teacher.num_bytes(module) == 4 * sum(p.numel() for p in module.model[3].parameters())


def test_one_teacher_replaces_another_of_its_kind() -> None:
    """While neither has weights, but for those that each task takes anew; and itself at any time."""

    def kinds() -> tuple[Teacher, Teacher, Teacher]:
        return Teacher("ema", owner="A", decay=0.5), Teacher("pretrained", owner="A"), Teacher("previous", owner="A")

    first, second = kinds(), kinds()
    assert [[one.replaces(other) for other in second] for one in first] == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
    ]
    assert not first[0].replaces(Teacher("ema", owner="B", decay=0.6))
    for teacher in first:
        teacher.start_fit(ToyModule(), inside_task=False)
        teacher.start_task(ToyModule(), first=False)
        assert teacher
        assert teacher.replaces(teacher)
    assert [one.replaces(other) for one, other in zip(first, second, strict=True)] == [False, False, True]
    assert [other.replaces(one) for one, other in zip(first, second, strict=True)] == [False, False, True]
    for teacher in second:
        teacher.start_fit(ToyModule(), inside_task=False)
    # each its own
    assert [one.replaces(other) for one, other in zip(first, second, strict=True)] == [False, False, True]


def test_a_step_that_the_scaler_skips_moves_no_average(tmp_path: Path) -> None:
    """An infinite gradient under fp16 lets no optimizer step, so it is no step of the average."""

    class Infinite(ToyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 1 else loss

    class Recorded(Callback):
        def __init__(self) -> None:
            self.weights: list[Tensor] = []

        def on_train_batch_end(self, trainer: Any, pl_module: LightningModule, *_: Any) -> None:
            self.weights.append(weights(pl_module))

    recorded, lwf = Recorded(), LwF(teacher="ema", decay=0.5, classes="seen")
    precision = MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    module, data = Infinite(), toy_loaders()[0]
    expected = weights(module)
    trainer(tmp_path, [recorded, lwf], max_epochs=1, plugins=[precision]).fit(module, data, data)
    assert torch.equal(recorded.weights[0], recorded.weights[1])
    for step in (0, 2):
        expected = 0.5 * expected + 0.5 * recorded.weights[step]
    saved = lwf.state_dict()["teacher"]["weights"]
    found = torch.cat([saved[name].flatten() for name, _ in module.named_parameters()])
    torch.testing.assert_close(found, expected)


def test_hooks_are_gone_after_a_fit(tmp_path: Path) -> None:
    """And after one that failed; a step of the module's own is not recorded between fits."""
    module, taught = ToyModule(), Taught("pretrained")
    fit_stream(tmp_path, [taught], module=module)
    assert not any(child._forward_hooks for child in module.modules())

    class Failing(ToyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 1:
                raise RuntimeError("inside")
            return super().training_step(batch, batch_idx)

    failing, callback = Failing(), LwF(teacher="pretrained", classes="seen")
    with pytest.raises(RuntimeError, match="inside"):
        fit_stream(tmp_path, [callback], module=failing)
    assert not any(child._forward_hooks for child in failing.modules())


def test_a_step_that_changes_its_batch_is_refused(tmp_path: Path) -> None:
    """The student would see another batch than its teacher."""

    class Shifting(ToyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            batch[0].add_(1)
            return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match=r"`Shifting.training_step` changes its batch in place"):
        fit_stream(tmp_path, [Taught("pretrained")], module=Shifting())


def test_a_submodule_that_is_not_called_is_refused(tmp_path: Path) -> None:
    """What the student does not compute cannot be compared."""
    module = ToyModule()
    module.idle = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="'idle' of ToyModule was not called"):
        fit_stream(tmp_path, [Taught("pretrained", "idle")], module=module)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "best"}, "`teacher` must be one of 'previous', 'pretrained', 'ema', 'base', got 'best'"),
        ({"kind": "ema"}, "`decay` goes with `teacher='ema'`, got `teacher='ema'`, `decay=None`"),
        ({"kind": "previous", "decay": 0.5}, "`decay` goes with `teacher='ema'`"),
        ({"kind": "ema", "decay": 1}, "`decay` must be above 0 and below 1, got 1"),
        ({"kind": "ema", "decay": 0.0}, "`decay` must be above 0 and below 1, got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    """With the setting's name."""
    with pytest.raises(ValueError, match=message):
        Teacher(owner="Taught", **settings)


def test_compiled_modules_have_teachers(tmp_path: Path) -> None:
    """A compiled network computes with the teacher's weights as well."""
    plain, compiled = Taught("pretrained", "model"), Taught("pretrained", "model")
    expected = fit_stream(tmp_path, [plain])
    module = ToyModule()
    module.model = torch.compile(module.model, backend="eager")
    torch.testing.assert_close(fit_stream(tmp_path, [compiled], module=module), expected)
    for pair, wanted in zip(compiled.seen, plain.seen, strict=True):
        torch.testing.assert_close(pair, wanted)


def test_state_is_restored_before_the_fit(tmp_path: Path) -> None:
    """Weights of another run teach at once."""
    module = ToyModule()
    teacher = Teacher("pretrained", owner="Taught")
    teacher.start_fit(module, inside_task=False)
    restored = Teacher("pretrained", owner="Taught")
    restored.load_state_dict(teacher.state_dict())
    later = ToyModule(seed=1)
    later.trainer = trainer(tmp_path)
    restored.start_fit(later, inside_task=True)
    watched = restored.watch(later, None)
    batch = next(iter(toy_loaders()[0]))
    with restored.around_step(later, batch, 0):
        object.__setattr__(later, "log", lambda *args, **kwargs: None)
        forward_loss(later, batch)
    student, found = watched.take()
    torch.testing.assert_close(found, module(batch[0]))
    torch.testing.assert_close(student, later(batch[0]))
    assert torch.equal(weights(later), weights(ToyModule(seed=1)))
