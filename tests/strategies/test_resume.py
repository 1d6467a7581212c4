"""Runs of the strategy that are saved and resumed: to the same bits, on other numbers of ranks, over the same base."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_cl import EWC, ExperienceReplay, FSDP2Strategy
from lightning_cl.strategies.checkpoint import is_complete
from ranks import Ranks
from toys import NUM_CLASSES, NUM_FEATURES, ToyModule, fit_stream, toy_stream, trainer

GLOBAL_BATCH = 12


class Adapted(ToyModule):
    """A frozen body that is most of the module, a trainable head, and a buffer that counts."""

    def __init__(self, base_seed: int = 3, dropout: float = 0.0) -> None:
        super().__init__(dropout, learning_rate=0.05)
        torch.manual_seed(base_seed)
        self.model[0] = nn.Linear(NUM_FEATURES, 32).requires_grad_(False)
        torch.manual_seed(5)
        self.model[3] = nn.Linear(32, NUM_CLASSES)
        self.register_buffer("steps", torch.zeros(()))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.steps += 1
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)}


def full(module: nn.Module) -> Tensor:
    """All weights, gathered."""
    values = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return torch.cat([value.detach().flatten() for value in values])


def saver(directory: Path) -> ModelCheckpoint:
    """A checkpoint at every step."""
    return ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1)


class Watch(Callback):
    """What a run finds when it starts."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ewc, replay = (callback for callback in trainer.callbacks if isinstance(callback, (EWC, ExperienceReplay)))
        self.found = {
            "step": trainer.global_step,
            "shards": all(
                value.shape == ewc.parameters[name].to_local().shape for name, value in ewc.importance.items()
            ),
            "protected": sorted(ewc.importance),
            "ids": sorted(replay.buffer.all_samples.sample_ids.tolist()),
            "share": len(replay.buffer),
        }


def fit_on_this_rank(
    root: Path,
    make: Callable[[], ToyModule],
    settings: dict[str, Any],
    ckpt_path: Path | None,
    saved: str,
) -> dict[str, Any]:
    """Fit the toy stream on all ranks of the group, with a checkpoint at every step."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    watch = Watch()
    callbacks: list[Any] = [EWC(5.0), ExperienceReplay(10, seed=1), watch]
    callbacks.append(saver(root / saved))
    module = make()
    fit = trainer(root, callbacks, strategy=FSDP2Strategy(**settings), devices=ranks)
    fit.fit(module, datamodule=toy_stream(batch_size=GLOBAL_BATCH // ranks), ckpt_path=ckpt_path)
    return {"weights": full(module), "start": watch.found, "steps": float(getattr(module, "steps", 0))}


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[int, Ranks]]:
    """Groups of one, two and three processes for all tests of this file."""
    made = {size: Ranks(size) for size in (1, 2, 3)}
    yield made
    for ranks in made.values():
        ranks.close()


@pytest.fixture(autouse=True)
def one_rank_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parent process is no rank."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)


FORMS: dict[str, dict[str, Any]] = {
    "folder": {},
    "asynchronous": {"async_checkpoint": True},
    "file": {"save_distributed_checkpoint": False},
}
MODULES: dict[str, Callable[[], ToyModule]] = {
    "whole": functools.partial(ToyModule, dropout=0.3),
    "frozen base": functools.partial(Adapted, dropout=0.3),
}


@pytest.mark.distributed
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_resume_to_the_same_bits(form: str, module: str, groups: dict[int, Ranks], tmp_path: Path) -> None:
    """In the first task, at the boundary and in the second, with dropout, Adam, a schedule, EWC and replay."""
    arguments = (tmp_path, MODULES[module], FORMS[form])
    straight = groups[2].run(fit_on_this_rank, *arguments, None, "straight")
    assert torch.equal(straight[0]["weights"], straight[1]["weights"])
    for step in (1, 4, 6):
        path = tmp_path / "straight" / f"step={step}.ckpt"
        assert path.is_file() if form == "file" else is_complete(path)
        resumed = groups[2].run(fit_on_this_rank, *arguments, path, "resumed")
        for mine, theirs in zip(resumed, straight, strict=True):
            assert torch.equal(mine["weights"], theirs["weights"])
            assert mine["steps"] == theirs["steps"]
            assert mine["start"]["step"] == step
            assert mine["start"]["shards"]
            assert bool(mine["start"]["protected"]) == (step >= 4)


@pytest.mark.distributed
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("form", ["folder", "file"])
def test_another_number_of_ranks_goes_on(
    form: str, before: int, after: int, groups: dict[int, Ranks], tmp_path: Path
) -> None:
    """In the second task: weights, optimizer, Fisher information and anchors are cut anew, the memory is dealt anew."""
    arguments = (tmp_path, Adapted, FORMS[form])
    straight = groups[before].run(fit_on_this_rank, *arguments, None, "straight")
    resumed = groups[after].run(fit_on_this_rank, *arguments, tmp_path / "straight" / "step=6.ckpt", "resumed")
    same = groups[before].run(fit_on_this_rank, *arguments, tmp_path / "straight" / "step=6.ckpt", "same")
    found = [result["start"] for result in resumed]
    assert all(start["ids"] == same[0]["start"]["ids"] for start in found)
    assert sum(start["share"] for start in found) == len(found[0]["ids"]) == 10
    assert max(start["share"] for start in found) <= -(-10 // after)
    assert all(start["shards"] and start["protected"] == ["model.3.bias", "model.3.weight"] for start in found)
    assert all(torch.equal(result["weights"], resumed[0]["weights"]) for result in resumed)
    # the draws of a step differ with the number of ranks, so the end is near and not the same
    assert (resumed[0]["weights"] - straight[0]["weights"]).abs().max() < 0.2


def fit_with_ewc(root: Path, settings: dict[str, Any], ckpt_path: Path | None, saved: str) -> Tensor:
    """As above with EWC alone, whose steps are the same on any number of ranks."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    callbacks: list[Any] = [EWC(5.0), saver(root / saved)]
    module = Adapted()
    fit = trainer(root, callbacks, strategy=FSDP2Strategy(**settings), devices=ranks)
    fit.fit(module, datamodule=toy_stream(batch_size=GLOBAL_BATCH // ranks), ckpt_path=ckpt_path)
    return full(module)


@pytest.mark.distributed
@pytest.mark.parametrize("form", ["folder", "file"])
def test_another_number_of_ranks_ends_where_the_straight_run_ends(
    form: str, groups: dict[int, Ranks], tmp_path: Path
) -> None:
    """Momenta, Fisher information and anchors are those of before, on 1, 2 and 3 ranks."""
    straight = groups[2].run(fit_with_ewc, tmp_path, FORMS[form], None, "straight")[0]
    for ranks in (1, 3):
        path = tmp_path / "straight" / "step=5.ckpt"
        resumed = groups[ranks].run(fit_with_ewc, tmp_path, FORMS[form], path, "resumed")[0]
        torch.testing.assert_close(resumed, straight, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- one rank, other strategies, the base


def test_single_file_moves_between_strategies(tmp_path: Path) -> None:
    """A run on one device goes on sharded, and a sharded one on one device, to where each would have ended."""
    plain = fit_stream(tmp_path, [EWC(5.0), saver(tmp_path / "plain")])
    sharded = ToyModule()
    fit = trainer(tmp_path, [EWC(5.0), saver(tmp_path / "sharded")], strategy=one_file())
    fit.fit(sharded, datamodule=toy_stream(), ckpt_path=tmp_path / "plain" / "step=8.ckpt")
    torch.testing.assert_close(full(sharded), plain, rtol=0, atol=1e-6)
    torch.distributed.destroy_process_group()
    back = fit_stream(tmp_path, [EWC(5.0), saver(tmp_path / "back")], ckpt_path=tmp_path / "sharded" / "step=10.ckpt")
    torch.testing.assert_close(back, plain, rtol=0, atol=1e-6)


def one_file(**settings: Any) -> FSDP2Strategy:
    """The strategy with checkpoints in one file."""
    return FSDP2Strategy(save_distributed_checkpoint=False, **settings)


def keys_in(path: Path) -> set[str]:
    """The names of the weights in a file."""
    return set(torch.load(path, weights_only=True)["state_dict"])


def test_frozen_base_is_left_out_and_recognised(tmp_path: Path) -> None:
    """Only what trains is written; over another base the resume is refused, and an evaluation too."""
    trainer(tmp_path, [EWC(5.0), saver(tmp_path)], strategy=one_file()).fit(Adapted(), datamodule=toy_stream())
    path = tmp_path / "step=8.ckpt"
    assert keys_in(path) == {"model.3.weight", "model.3.bias", "steps"}
    other = trainer(tmp_path, [EWC(5.0), saver(tmp_path)], strategy=one_file())
    with pytest.raises(ValueError, match=r"step=8.ckpt' was trained on another frozen base.*model.0.weight"):
        other.fit(Adapted(base_seed=4), datamodule=toy_stream(), ckpt_path=path)
    with pytest.raises(ValueError, match="another frozen base"):
        trainer(tmp_path, strategy=one_file()).validate(Adapted(base_seed=4), datamodule=toy_stream(), ckpt_path=path)


def test_frozen_base_is_kept_where_asked_or_small(tmp_path: Path) -> None:
    """A module without a base, and one whose frozen part is small, is saved whole; so is any with `save_frozen`."""
    everything = {"model.0.weight", "model.0.bias", "model.3.weight", "model.3.bias"}
    for name, module, settings in (
        ("asked", Adapted(), {"save_frozen": True}),
        ("small", ToyModule(), {}),
        ("left out", Adapted(), {}),
    ):
        if name == "small":
            module.model[0].bias.requires_grad_(False)
        fit = trainer(tmp_path, [saver(tmp_path / name)], strategy=one_file(**settings))
        fit.fit(module, datamodule=toy_stream())
        assert (keys_in(tmp_path / name / "step=8.ckpt") >= everything) == (name != "left out")


class Thawed(Adapted):
    """A frozen weight that a task's end changes, as the folding of adapters does, and one that is thawed."""

    def on_task_end(self, task: Any) -> None:
        with torch.no_grad():
            self.model[0].bias += 1.0


def test_what_changes_in_the_base_is_saved(tmp_path: Path) -> None:
    """And resumed, also after a second fit of the same module: the base is what a fresh module has."""
    straight = Thawed()
    trainer(tmp_path, [EWC(5.0), saver(tmp_path)], strategy=one_file()).fit(straight, datamodule=toy_stream())
    assert "model.0.bias" not in keys_in(tmp_path / "step=5.ckpt")
    assert "model.0.bias" in keys_in(tmp_path / "step=8.ckpt")
    resumed = Thawed()
    fit = trainer(tmp_path, [EWC(5.0), saver(tmp_path)], strategy=one_file())
    fit.fit(resumed, datamodule=toy_stream(), ckpt_path=tmp_path / "step=8.ckpt")
    assert torch.equal(full(resumed), full(straight))
    again = trainer(tmp_path, [saver(tmp_path / "again")], strategy=one_file())
    again.fit(straight, datamodule=toy_stream())
    assert "model.0.bias" in keys_in(tmp_path / "again" / "step=2.ckpt")


def test_checkpoint_of_weights_alone_is_refused_for_fit_and_serves_a_test(tmp_path: Path) -> None:
    """Lightning restores no callback from it; the weights are there."""
    saving = ModelCheckpoint(tmp_path, filename="{step}", save_weights_only=True)
    module = ToyModule()
    trainer(tmp_path, [EWC(5.0), saving], strategy="fsdp2").fit(module, datamodule=toy_stream())
    refused = trainer(tmp_path, [EWC(5.0), saver(tmp_path)], strategy="fsdp2")
    with pytest.raises((ValueError, KeyError), match=r"no state for|save_weights_only"):
        refused.fit(ToyModule(), datamodule=toy_stream(), ckpt_path=tmp_path / "step=12.ckpt")
    other = ToyModule(seed=8)
    trainer(tmp_path, strategy="fsdp2").validate(
        other, datamodule=toy_stream(), ckpt_path=tmp_path / "step=12.ckpt", verbose=False
    )
    assert torch.equal(full(other), full(module))


@pytest.mark.parametrize("whole", [False, True], ids=["folder", "file"])
def test_an_evaluation_loads_a_full_checkpoint(whole: bool, tmp_path: Path) -> None:
    """With the state of optimizers and callbacks in it, which an evaluation has no use for."""
    module, other = ToyModule(), ToyModule(seed=8)
    settings = {"save_distributed_checkpoint": not whole}
    trainer(tmp_path, [EWC(5.0), saver(tmp_path)], strategy=FSDP2Strategy(**settings)).fit(
        module, datamodule=toy_stream()
    )
    trainer(tmp_path, [EWC(5.0), saver(tmp_path)], strategy=FSDP2Strategy(**settings)).validate(
        other, datamodule=toy_stream(), ckpt_path=tmp_path / "step=12.ckpt", verbose=False
    )
    assert torch.equal(full(other), full(module))


def test_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    """In both forms, with the name of the weight."""
    for settings in ({}, {"save_distributed_checkpoint": False}):
        directory = tmp_path / str(len(settings))
        strategy = FSDP2Strategy(**settings)
        trainer(tmp_path, [saver(directory)], strategy=strategy).fit(ToyModule(), datamodule=toy_stream())
        wider = ToyModule()
        wider.model[0], wider.model[3] = nn.Linear(NUM_FEATURES, 9), nn.Linear(9, NUM_CLASSES)
        with pytest.raises((ValueError, RuntimeError), match=r"model\.0\.(weight|bias)"):
            trainer(tmp_path, [saver(directory)], strategy=FSDP2Strategy(**settings)).fit(
                wider, datamodule=toy_stream(), ckpt_path=directory / "step=2.ckpt"
            )


class Several(ToyModule):
    """Two optimizers, stepped by the module itself, or a single one of both layers."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        layers = [self.model[0], self.model[3]] if self.number == 2 else [self.model]
        return [torch.optim.AdamW(layer.parameters(), lr=0.01) for layer in layers]


@pytest.mark.parametrize("whole", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_optimizers_is_refused(whole: bool, before: int, after: int, tmp_path: Path) -> None:
    """In both forms, with both numbers."""
    settings = {"save_distributed_checkpoint": not whole}
    path = tmp_path / "first.ckpt"
    fit = trainer(tmp_path, [SaveFirst(path)], strategy=FSDP2Strategy(**settings), max_steps=before)
    fit.fit(Several(before), datamodule=toy_stream())
    other = trainer(tmp_path, strategy=FSDP2Strategy(**settings))
    with pytest.raises(ValueError, match=f"is of {before} optimizers, and the module has {after}"):
        other.fit(Several(after), datamodule=toy_stream(), ckpt_path=path)


def test_a_file_that_lacks_state_is_refused(tmp_path: Path) -> None:
    """The run had it, as the file tells."""
    trainer(tmp_path, [saver(tmp_path)], strategy=one_file(), max_steps=2).fit(Adapted(), datamodule=toy_stream())
    path = tmp_path / "step=2.ckpt"
    saved = torch.load(path, weights_only=False)
    del saved["optimizer_states"][0]["state"][1]
    torch.save(saved, path)
    again = trainer(tmp_path, [saver(tmp_path / "again")], strategy=one_file())
    with pytest.raises(ValueError, match=r"lacks the state of AdamW for \['model.3.bias'\]"):
        again.fit(Adapted(), datamodule=toy_stream(), ckpt_path=path)


class SaveFirst(Callback):
    """Writes a checkpoint before the first optimizer step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("whole", [False, True], ids=["folder", "file"])
def test_a_save_before_the_first_step_changes_nothing(whole: bool, tmp_path: Path) -> None:
    """AdamW's count of steps neither."""
    ends = []
    for callbacks in ([], [SaveFirst(tmp_path / "first.ckpt")]):
        module = Adapted()
        strategy = FSDP2Strategy(save_distributed_checkpoint=not whole)
        fit = trainer(tmp_path, callbacks, strategy=strategy)
        fit.fit(module, datamodule=toy_stream())
        ends.append(full(module))
    assert torch.equal(*ends)
