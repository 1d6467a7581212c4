"""A head whose rows come into play task by task."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from lightning_cl import (
    EWC,
    MAS,
    SI,
    ContinualCallback,
    ExperienceReplay,
    FSDP2Strategy,
    GradientProjection,
    IncrementalHead,
    LwF,
    Task,
)
from ranks import Ranks
from reference import steps
from toys import ToyModule, fit_stream, toy_data, toy_loaders, toy_stream, trainer, weights

Optimizers = dict[str, Callable[..., torch.optim.Optimizer]]
OPTIMIZERS: Optimizers = {
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1),
    "adamw": functools.partial(torch.optim.AdamW, weight_decay=0.1),
}


class Headed(ToyModule):
    """The toy module with an incremental head of any settings."""

    def __init__(self, num_classes: int = 4, *, optimizer: str = "sgd", dropout: float = 0.0, **settings: Any) -> None:
        super().__init__(dropout, optimizer=OPTIMIZERS[optimizer])
        self.model[3] = IncrementalHead(8, num_classes, **settings)

    @property
    def head(self) -> IncrementalHead:
        return self.model[3]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"start": "zeros", "optimizer": "adamw"},
    {"start": "mean", "bias": False},
    {"kind": "cosine"},
    {"kind": "cosine", "start": "mean", "scale": 5.0, "optimizer": "adamw"},
]


def plain_loop(batch_size: int = 8, world_size: int = 1, **settings: Any) -> Tensor:
    """Torch without masks: the scores of classes to come are not computed, and their rows put back to zero."""
    inputs, labels = toy_data().tensors
    module = Headed(**settings)
    head, optimizer = module.head, module.configure_optimizers()
    rows = [p for p in (head.weight, head.bias) if p is not None]
    fresh = [p.detach().clone() for p in rows]
    for task in range(2):
        seen = 2 * task + 2
        with torch.no_grad():
            for p, start in zip(rows, fresh, strict=True):
                mean = settings.get("start") == "mean" and task > 0
                p[seen - 2 : seen] = p[: seen - 2].mean(0) if mean else start[seen - 2 : seen]
                p[seen:] = 0
        for ranks in steps(task, batch_size, world_size):
            losses = []
            for mine in ranks:
                features, weight = module.model[:3](inputs[mine]), head.weight[:seen]
                if head.scale is None:
                    scores = features @ weight.T + (0 if head.bias is None else head.bias[:seen])
                else:
                    lengths = features.norm(dim=1)[:, None] * weight.norm(dim=1)
                    scores = head.scale * (features @ weight.T) / lengths
                losses.append(cross_entropy(scores, labels[mine]))
            optimizer.zero_grad()
            (sum(losses) / world_size).backward()
            optimizer.step()
    return weights(module)


# ---------------------------------------------------------------------- the layer


def test_without_a_task_it_is_an_ordinary_head() -> None:
    """All classes, and the weights of a linear layer."""
    head = IncrementalHead(8, 4)
    features = torch.randn(3, 8)
    assert torch.equal(head(features), features @ head.weight.T + head.bias)
    assert 0.2 < head.weight.abs().max() < 8**-0.5
    assert str(head) == "IncrementalHead(8, 4, kind='linear', start='kaiming')"


def test_rows_of_a_class_do_not_depend_on_the_size() -> None:
    """Nor on other classes; another seed gives others."""
    assert torch.equal(IncrementalHead(8, 4).weight, IncrementalHead(8, 9).weight[:4])
    assert not torch.equal(IncrementalHead(8, 4).weight, IncrementalHead(8, 4, seed=1).weight)


def test_settings_out_of_range_are_refused() -> None:
    """With what was given."""
    for settings, message in (
        ({"in_features": 0}, "`in_features` must be an integer of at least 1, got 0"),
        ({"num_classes": 0}, "`num_classes` must be an integer of at least 1, got 0"),
        ({"kind": "prototype"}, "`kind` must be one of 'linear', 'cosine', got 'prototype'"),
        ({"start": "ones"}, "`start` must be one of 'kaiming', 'zeros', 'mean', got 'ones'"),
        ({"kind": "cosine", "scale": 0.0}, "`scale` must be above 0, got 0.0"),
        ({"kind": "cosine", "start": "zeros"}, "`start='zeros'` has no direction for `kind='cosine'`"),
    ):
        with pytest.raises(ValueError, match=message):
            IncrementalHead(**({"in_features": 8, "num_classes": 4} | settings))


# ---------------------------------------------------------------------- in a fit


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_ends_where_a_plain_loop_ends(settings: dict[str, Any], tmp_path: Path) -> None:
    """Over two tasks, with momentum and weight decay."""
    found = fit_stream(tmp_path, module=Headed(**settings))
    torch.testing.assert_close(found, plain_loop(**settings), rtol=0, atol=1e-6)


class Look(Callback):
    """Keeps the head's rows, and what the optimizer knows of them, where the first task ends."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            self.seen = pl_module.head.seen.tolist()
            self.weight = pl_module.head.weight.detach().clone()
            state = trainer.optimizers[0].state[pl_module.head.weight]
            self.moments = [value.clone() for value in state.values() if value.ndim == 2]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rows_to_come_do_not_move(optimizer: str, tmp_path: Path) -> None:
    """Zero in the weights and in the moments; those of the task have both."""
    look = Look()
    fit_stream(tmp_path, [look], module=Headed(optimizer=optimizer))
    assert look.seen == [True, True, False, False]
    for tensor in (look.weight, *look.moments):
        assert (tensor != 0).any(1).tolist() == [True, True, False, False]
    assert len(look.moments) == {"sgd": 1, "adamw": 2}[optimizer]


def test_data_without_tasks_trains_all_rows(tmp_path: Path) -> None:
    """Plain loaders, one fit for each task: nobody names classes."""
    module, before = Headed(), Headed().head.weight
    for loader in toy_loaders():
        trainer(tmp_path, [EWC(1.0)], max_epochs=1).fit(module, loader, loader)
    assert not module.head.seen.any()
    assert (module.head.weight != before).any(1).all()


def test_a_task_that_names_no_classes_opens_the_head(tmp_path: Path) -> None:
    """After tasks that did: the rows of those stay, all others start."""
    module, job = Headed(start="mean"), trainer(tmp_path)
    fit_stream(tmp_path, module=module, stream=toy_stream(), max_steps=6)
    job.strategy.connect(module)
    old = module.head.weight.detach().clone()
    assert module.head.seen.tolist() == [True, True, False, False]
    module.head.start_task(job, Task(index=1, name="plain"))
    assert module.head.seen.all()
    assert torch.equal(module.head.weight[:2], old[:2])
    torch.testing.assert_close(module.head.weight[2:], old[:2].mean(0).expand(2, 8))


def test_what_was_learned_without_names_stays(tmp_path: Path) -> None:
    """A stream after a fit without any callback: no row starts anew, and none is masked."""
    module, job = Headed(start="mean"), trainer(tmp_path, max_epochs=1)
    loader = toy_loaders()[0]
    job.fit(module, loader, loader)
    learned = module.head.weight.detach().clone()
    module.head.start_task(job, Task(0, "a", (0, 1)))
    assert torch.equal(module.head.weight, learned)
    assert module.head.seen.all()
    module.head.start_task(job, Task(1, "b", (4,)))
    assert torch.equal(module.head.weight[:4], learned)
    torch.testing.assert_close(module.head.weight[4], learned.mean(0))


def test_a_head_in_bfloat16_has_not_learned_by_that(tmp_path: Path) -> None:
    """Whether it was made so or became so."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = Headed()
    finally:
        torch.set_default_dtype(torch.float32)
    job = trainer(tmp_path)
    for module in (made, Headed().bfloat16()):
        job.strategy.connect(module)
        module.head.start_task(job, Task(0, "a", (0, 1)))
        assert module.head.seen.tolist() == [True, True, False, False]
        assert not module.head.weight[2:].any()


def test_classes_that_come_back_go_on(tmp_path: Path) -> None:
    """Their rows are not started a second time."""
    module, job = Headed(), trainer(tmp_path)
    job.strategy.connect(module)
    module.head.start_task(job, Task(0, "a", (0, 1)))
    with torch.no_grad():
        module.head.weight += 1
    trained = module.head.weight.detach().clone()
    module.head.start_task(job, Task(1, "b", (1, 2)))
    assert torch.equal(module.head.weight[:2], trained[:2])
    assert torch.equal(module.head.weight[2], IncrementalHead(8, 4).weight[2])


def test_replayed_samples_train_the_rows_of_their_classes(tmp_path: Path) -> None:
    """They are seen, so their loss is that of an ordinary head; without replay those rows end elsewhere."""
    losses: list[float] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            losses.append(float(trainer.callback_metrics["train_loss"]))

    module, plain = Headed(), Headed()
    fit_stream(tmp_path, [ExperienceReplay(12), Watch()], module=module)
    fit_stream(tmp_path, module=plain)
    assert max(losses) < 10
    inputs, labels = toy_data(16, seed=1).tensors
    old = labels < 2
    with_replay, without = (cross_entropy(m(inputs[old]), labels[old]) for m in (module.eval(), plain.eval()))
    assert with_replay < without / 2


@pytest.mark.parametrize("rows", [4, 2], ids=["whole", "grown"])
def test_a_teacher_knows_no_new_classes(rows: int, tmp_path: Path) -> None:
    """LwF distils what the teacher had scores for; the weights stay finite and differ from fine-tuning."""
    method = LwF()
    found = fit_stream(tmp_path, [method], module=Headed(rows))
    assert method.teaching.state_dict()["buffers"]["model.3.seen"].tolist() == [True, True, False, False]
    assert found.isfinite().all()
    assert (found - fit_stream(tmp_path, module=Headed())).abs().max() > 1e-2


# ---------------------------------------------------------------------- resume


def saver(directory: Path) -> ModelCheckpoint:
    """A checkpoint at every step."""
    return ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.parametrize("step", [2, 6, 8], ids=["first task", "boundary", "second task"])
@pytest.mark.parametrize("rows", [4, 2], ids=["whole", "grown"])
def test_resumes_to_the_same_bits(rows: int, step: int, tmp_path: Path) -> None:
    """What was seen is in the checkpoint, and a head that grew is loaded into one that has not."""
    settings: dict[str, Any] = {"num_classes": rows, "start": "mean", "dropout": 0.3, "optimizer": "adamw"}
    straight = fit_stream(tmp_path, [saver(tmp_path)], module=Headed(**settings))
    module = Headed(**settings)
    resumed = fit_stream(tmp_path, [saver(tmp_path)], module=module, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert torch.equal(resumed, straight)
    assert module.head.seen.all()


# ---------------------------------------------------------------------- growth


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_growing_equals_rows_that_were_there(kind: str, optimizer: str, tmp_path: Path) -> None:
    """With the moments of old rows kept; products with fewer rows may be summed in another order."""
    small, large = (Headed(rows, kind=kind, optimizer=optimizer) for rows in (2, 4))
    expected = fit_stream(tmp_path, module=large)
    torch.testing.assert_close(fit_stream(tmp_path, module=small), expected, rtol=0, atol=1e-6)
    assert {n: p.shape for n, p in small.state_dict().items()} == {n: p.shape for n, p in large.state_dict().items()}


@pytest.mark.parametrize("rows", [1, 2], ids=["first task", "second task"])
@pytest.mark.parametrize("method", [EWC, MAS, SI])
def test_what_is_kept_for_old_rows_is_refused_for_grown_ones(
    method: type[EWC] | type[MAS] | type[SI], rows: int, tmp_path: Path
) -> None:
    """A penalty holds the parameter that it knows; without the head it goes on."""
    with pytest.raises(ValueError, match=rf"`{method.__name__}` keeps state for 'model.3.weight', but another param"):
        fit_stream(tmp_path, [method(1.0)], module=Headed(rows))
    fit_stream(tmp_path, [method(1.0, exclude=["model.3.*"])], module=Headed(rows))


def test_a_projection_leaves_a_growing_head_alone(tmp_path: Path) -> None:
    """It projects linear layers; the head grows beside them, and trains if it is excluded."""
    module = Headed(1)
    fit_stream(tmp_path, [GradientProjection(exclude=["model.3.*"])], module=module)
    assert (module.head.weight != IncrementalHead(8, 4).weight).any(1).all()


@pytest.mark.parametrize("settings", [{}, {"teacher": "ema", "decay": 0.9}], ids=["previous", "ema"])
def test_a_teacher_follows_a_head_that_grows(settings: dict[str, Any], tmp_path: Path) -> None:
    """It teaches what it teaches with all rows from the beginning; an average of rows begins where they do."""
    small, large = (fit_stream(tmp_path, [LwF(**settings)], module=Headed(rows)) for rows in (2, 4))
    if settings:
        assert small.isfinite().all()
    else:
        torch.testing.assert_close(small, large, rtol=0, atol=1e-6)


def test_rows_are_there_when_callbacks_hear_of_a_task(tmp_path: Path) -> None:
    """So that a pass over the data of the task finds a score for each label; before, nothing has changed."""
    found: list[tuple[str, int, int]] = []

    class Listen(ContinualCallback):
        needs_state = False

        def before_task_start(self, trainer: Any, pl_module: Any, task: Task) -> None:
            found.append(("before", pl_module.head.num_classes, int(pl_module.head.seen.sum())))

        def on_task_start(self, trainer: Any, pl_module: Any, task: Task) -> None:
            found.append(("start", pl_module.head.num_classes, int(pl_module.head.seen.sum())))

    fit_stream(tmp_path, [Listen()], module=Headed(1))
    assert found == [("before", 1, 0), ("start", 2, 2), ("before", 2, 2), ("start", 4, 4)]


# ---------------------------------------------------------------------- two ranks


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for all tests of this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: "ddp",
    "fsdp2": lambda: FSDP2Strategy(wrap=["Linear"]),
    "fsdp2-own-unit": lambda: FSDP2Strategy(wrap=["Linear", "IncrementalHead"]),
}


class Hooked(Headed):
    """A module with a hook of its own, which may grow its head: it is not checked before."""

    def on_task_start(self, task: Task) -> None:
        self.heard = task.index


def fit_on_this_rank(
    root: Path, strategy: str, settings: dict[str, Any], ckpt_path: Path | None = None
) -> tuple[Tensor, list[bool]]:
    """Fit the toy stream with half of each batch; return the full weights and the classes seen."""
    module = Headed(**settings)
    fit = trainer(root, [saver(root)], strategy=STRATEGIES[strategy](), devices=2)
    fit.fit(module, datamodule=toy_stream(batch_size=4), ckpt_path=ckpt_path)
    full = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return torch.cat([p.detach().flatten() for p in full]), module.head.seen.tolist()


def refused_on_this_rank(root: Path, strategy: str, kind: type[Headed]) -> str:
    """Return the error of a head with two rows too few."""
    try:
        trainer(root, strategy=STRATEGIES[strategy](), devices=2).fit(kind(2), datamodule=toy_stream(batch_size=4))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.distributed
@pytest.mark.parametrize("settings", [SETTINGS[2], SETTINGS[3]], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_end_where_one_process_ends(
    strategy: str, settings: dict[str, Any], two_ranks: Ranks, tmp_path: Path
) -> None:
    """Data-parallel and in shards, where rows of one class lie on one rank; and after a resume in the second task."""
    settings = settings | {"dropout": 0.0}
    (first, seen), (second, _) = two_ranks.run(fit_on_this_rank, tmp_path, strategy, settings)
    assert seen == [True] * 4
    assert torch.equal(first, second)
    expected = plain_loop(batch_size=4, world_size=2, **settings)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-6)
    again = two_ranks.run(fit_on_this_rank, tmp_path / "again", strategy, settings, tmp_path / "step=8.ckpt")
    assert torch.equal(again[0][0], first)
    assert again[0][1] == seen


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_growing_on_several_ranks_is_refused(strategy: str, two_ranks: Ranks, tmp_path: Path) -> None:
    """Before the first step where the stream knows its labels, else at the task's start."""
    early = two_ranks.run(refused_on_this_rank, tmp_path, strategy, Headed)
    assert all("has 2 outputs, for labels 0 to 1. Give it at least 4" in error for error in early)
    late = two_ranks.run(refused_on_this_rank, tmp_path, strategy, Hooked)
    assert all("has class 3, but the head has 2 rows" in error for error in late)
    assert all("`num_classes=4`" in error for error in late)
