"""What every method owes, one row for each method in `support/rows`: a method without a row fails here."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from contract import Row, all_rows, methods_elsewhere
from lightning_cl import ContinualCallback, FSDP2Strategy
from lightning_cl.cli.main import main
from lightning_cl.cli.methods import method_classes
from lightning_cl.core.shards import gathered
from ranks import Ranks, exit_codes
from toys import (
    LoraToy,
    SelfSharded,
    SelfShardedLora,
    ToyModule,
    fit_stream,
    toy_loaders,
    toy_stream,
    trainer,
    trainer_yaml,
    weights,
)

ROWS = all_rows()


def saver(directory: Path, **settings: Any) -> ModelCheckpoint:
    """A checkpoint at every step."""
    return ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1, **settings)


every_method = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
STATEFUL = {name: row for name, row in ROWS.items() if row.method.needs_state}
every_stateful_method = pytest.mark.parametrize("row", STATEFUL.values(), ids=STATEFUL.keys())


def test_every_method_has_a_row() -> None:
    """A method is what `lightning-cl methods` lists; one that has no row here names a file of its own."""
    elsewhere = methods_elsewhere()
    assert set(method_classes().values()) == {row.method for row in ROWS.values()} | elsewhere.keys()
    assert all((Path(__file__).parent / file).is_file() for file in elsewhere.values())


@every_method
def test_ends_where_a_plain_loop_ends(row: Row, tmp_path: Path) -> None:
    """Over two tasks the weights are those of a torch loop with the method written into it."""
    torch.testing.assert_close(
        fit_stream(tmp_path, [row.make()], module=row.module()), row.plain_loop(), rtol=0, atol=row.tolerance
    )


@every_method
def test_is_not_a_no_op(row: Row, tmp_path: Path) -> None:
    """Without its key line a method would end where fine-tuning ends."""
    with_method = fit_stream(tmp_path, [row.make()], module=row.module())
    assert (with_method - fit_stream(tmp_path, module=row.module())).abs().max() > 1e-2


@every_method
def test_one_fit_for_each_task_is_the_same(row: Row, tmp_path: Path) -> None:
    """With plain loaders and a fresh Trainer for each task, the callback's state lives on in the object."""
    method, module = row.make(), row.module(learning_rate=0.05)
    for loader in toy_loaders():
        trainer(tmp_path, [method], max_epochs=1).fit(module, loader, loader)
    assert method.completed_tasks == 2
    plain = row.module(learning_rate=0.05)
    for loader in toy_loaders():
        trainer(tmp_path, max_epochs=1).fit(plain, loader, loader)
    assert (weights(module) - weights(plain)).abs().max() > 1e-3


@every_method
def test_one_fit_for_each_task_through_checkpoints_is_the_same(row: Row, tmp_path: Path) -> None:
    """A refresh job with fresh objects that loads the last checkpoint ends where one object ends."""
    kept, module = row.make(), row.module()
    for number, loader in enumerate(toy_loaders(), start=1):
        job = trainer(tmp_path, [kept], max_epochs=number)
        job.fit(module, loader, loader, ckpt_path=None if number == 1 else tmp_path / "last.ckpt")
        job.save_checkpoint(tmp_path / "last.ckpt")
    fresh = row.module()
    for number, loader in enumerate(toy_loaders(), start=1):
        job = trainer(tmp_path, [row.make()], max_epochs=number)
        job.fit(fresh, loader, loader, ckpt_path=None if number == 1 else tmp_path / "fresh.ckpt")
        job.save_checkpoint(tmp_path / "fresh.ckpt")
    assert torch.equal(weights(fresh), weights(module))


@every_method
@pytest.mark.parametrize("step", [2, 6, 8], ids=["first task", "boundary", "second task"])
def test_resumes_to_the_same_bits(row: Row, step: int, tmp_path: Path) -> None:
    """From a checkpoint at any step, with dropout, read with ``weights_only=True``."""
    through = row.make()
    straight = fit_stream(tmp_path, [through, saver(tmp_path)], module=row.module(dropout=0.3))
    torch.manual_seed(999)
    resumed, path, again = row.module(dropout=0.3), tmp_path / f"step={step}.ckpt", row.make()
    fit = trainer(tmp_path, [again, saver(tmp_path / "resumed")])
    fit.fit(resumed, datamodule=toy_stream(), ckpt_path=path, weights_only=True)
    assert torch.equal(weights(resumed), straight)
    # what only a third task would feel
    assert_same(gathered(again.state_dict()), gathered(through.state_dict()))


def assert_same(found: Any, expected: Any) -> None:
    """Nested containers hold the same values, tensors to the bit."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert found == expected


@every_stateful_method
def test_missing_state_is_refused(row: Row, tmp_path: Path) -> None:
    """A checkpoint without the method's state would leave the model unprotected."""
    fit_stream(tmp_path, [saver(tmp_path)], module=row.module())
    with pytest.raises(ValueError, match=f"no state for {row.method.__name__}.*load_from_checkpoint"):
        fit_stream(tmp_path, [row.make(), saver(tmp_path)], module=row.module(), ckpt_path=tmp_path / "step=8.ckpt")


@every_method
def test_weights_only_checkpoint_is_refused(row: Row, tmp_path: Path) -> None:
    """Lightning restores no callback from it, and says nothing."""
    fit_stream(tmp_path, [row.make(), saver(tmp_path, save_weights_only=True)], module=row.module())
    with pytest.raises((ValueError, KeyError), match=r"no state for|save_weights_only"):
        fit_stream(tmp_path, [row.make()], module=row.module(), ckpt_path=tmp_path / "step=8.ckpt")


@every_method
def test_survives_pickling(row: Row, tmp_path: Path) -> None:
    """As it reaches another process before a fit."""
    found = fit_stream(tmp_path, [pickle.loads(pickle.dumps(row.make()))], module=row.module())
    assert torch.equal(found, fit_stream(tmp_path, [row.make()], module=row.module()))


@every_method
def test_spawning_launchers_are_refused(row: Row, tmp_path: Path) -> None:
    """They run the fit in children that keep what was learned to themselves."""
    codes = exit_codes(functools.partial(fit_with_fork, tmp_path, row.method, row.settings, row.toy))
    assert codes == [1]
    assert "ddp_spawn" in (tmp_path / "error.txt").read_text()


def fit_with_fork(root: Path, method: type[ContinualCallback], settings: dict[str, Any], toy: type[ToyModule]) -> None:
    """Fit by a launcher that must be refused; leave the error's text."""
    try:
        trainer(root, [method(**settings)], strategy="ddp_fork", devices=2).fit(toy(), datamodule=toy_stream())
    except Exception as error:
        (root / "error.txt").write_text(str(error))
        raise


ADAPTER = "    adapter: {peft_type: LORA, r: 4, target_modules: all-linear}"


@every_method
def test_built_by_the_command_line(row: Row, tmp_path: Path) -> None:
    """The class's signature is its YAML."""
    settings = "\n".join(f"        {name}: {value}" for name, value in row.settings.items())
    adapter = "" if row.toy is ToyModule else ADAPTER
    (tmp_path / "run.yaml").write_text(
        f"""
{trainer_yaml(tmp_path)}
  callbacks:
    - class_path: {row.method.__name__}
      init_args:
{settings}
    - class_path: ContinualMetrics
      init_args:
        directory: {tmp_path}
model:
  class_path: Classifier
  init_args:
    network:
      class_path: MLP
      init_args: {{num_inputs: 64, num_outputs: 10, hidden: [16]}}
{adapter}
data:
  class_path: TaskStreamDataModule
  init_args:
    train: {{class_path: DigitsSource, init_args: {{split: train}}}}
    val: {{class_path: DigitsSource, init_args: {{split: val}}}}
    scenario: {{class_path: ClassIncremental, init_args: {{n_tasks: 2}}}}
"""
    )
    main(["fit", "--config", str(tmp_path / "run.yaml")])
    assert row.method.__name__ in (tmp_path / "record.json").read_text()


# ---------------------------------------------------------------------- two ranks


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """One pair of processes for all tests of this file."""
    ranks = Ranks(2)
    yield ranks
    ranks.close()


SELF_SHARDED = {ToyModule: SelfSharded, LoraToy: SelfShardedLora}
STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: "ddp",
    "fsdp2": lambda: FSDP2Strategy(wrap=["Linear"]),
    "model-parallel": lambda: ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
}


def fit_on_this_rank(
    root: Path,
    method: type[ContinualCallback],
    settings: dict[str, Any],
    optimizer: Callable[..., Optimizer] | None,
    toy: type[ToyModule],
    strategy: str,
    saved: str | None = None,
    ckpt_path: Path | None = None,
) -> Tensor:
    """Fit the toy stream with half of each batch; return the full weights."""
    kind = SELF_SHARDED[toy] if strategy == "model-parallel" else toy
    module = kind(dropout=0.3 if saved else 0.0, optimizer=optimizer)
    callbacks = [method(**settings), *([saver(root / saved)] if saved else ())]
    fit = trainer(root, callbacks, strategy=STRATEGIES[strategy](), devices=2)
    fit.fit(module, datamodule=toy_stream(batch_size=4), ckpt_path=ckpt_path)
    return weights(module)


@pytest.mark.distributed
@every_method
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_end_where_one_process_ends(row: Row, strategy: str, two_ranks: Ranks, tmp_path: Path) -> None:
    """Over two tasks, with the joined batch: data-parallel, and sharded by our strategy and by Lightning's."""
    expected = row.plain_loop(batch_size=4, world_size=2)
    first, second = two_ranks.run(
        fit_on_this_rank, tmp_path, row.method, row.settings, row.optimizer, row.toy, strategy
    )
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, rtol=0, atol=max(row.tolerance, 1e-6))


@pytest.mark.distributed
@every_method
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_resume_to_the_same_bits(row: Row, strategy: str, two_ranks: Ranks, tmp_path: Path) -> None:
    """In the second task, with dropout; a sharded checkpoint keeps the method's state as shards."""
    fixed = (row.method, row.settings, row.optimizer, row.toy, strategy)
    straight = two_ranks.run(fit_on_this_rank, tmp_path, *fixed, "straight")
    path = tmp_path / "straight" / "step=8.ckpt"
    assert path.is_dir() == (strategy == "fsdp2")
    resumed = two_ranks.run(fit_on_this_rank, tmp_path, *fixed, "resumed", path)
    assert torch.equal(resumed[0], straight[0])
    assert torch.equal(resumed[1], straight[1])
