"""What every method owes, for the methods whose samples need tokens: prompts on a tiny encoder."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from prompts import (
    TASKS,
    CodaLoop,
    DiversifiedLoop,
    DualLoop,
    L2PLoop,
    ProgressiveLoop,
    PromptToy,
    ResidualLoop,
    SPromptsLoop,
    TwoTasks,
    prompt_stream,
    trained,
)
from torch import Tensor

from lightning_cl import (
    L2P,
    CODAPrompt,
    ContinualCallback,
    DualPrompt,
    FSDP2Strategy,
    ProgressivePrompts,
    SPrompts,
    Task,
)
from lightning_cl.cli.main import main
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.shards import gathered
from ranks import Ranks, exit_codes
from toys import trainer, trainer_yaml


def residual_loop(method: Any) -> ResidualLoop:
    """The loop with the weights that the residual network starts anew with."""
    starts = []
    for task in (0, 1):
        generator = torch.Generator().manual_seed(derived_seed(0, "residual", task))
        starts.append(torch.nn.init.kaiming_uniform_(torch.empty(5, 16), a=5**0.5, generator=generator))
    return ResidualLoop(method, starts)


@dataclass(frozen=True)
class PromptRow:
    """A prompt method and its plain loop."""

    method: type[ContinualCallback]
    settings: dict[str, Any]
    loop: Callable[[Any], Any]
    tells_task: bool = False

    def make(self) -> ContinualCallback:
        return self.method(**self.settings)

    def plain(self, **settings: Any) -> Tensor:
        return self.loop(self.make()).run(**settings)

    def stream(self, batch_size: int = 8) -> Any:
        return prompt_stream(batch_size, tells_task=self.tells_task)


POOL = {"pool": 4, "length": 2, "top_k": 2, "strength": 0.5}
ROWS = {
    "l2p": PromptRow(L2P, POOL, L2PLoop),
    "l2p-diversify": PromptRow(L2P, {**POOL, "diversify": True}, DiversifiedLoop),
    "dual-prompt": PromptRow(
        DualPrompt, {"general_layers": [0], "expert_layers": [1, 2], "general_length": 2, "expert_length": 3}, DualLoop
    ),
    "coda-prompt": PromptRow(
        CODAPrompt, {"per_task": 3, "length": 2, "layers": [0, 2], "orthogonality": 0.1}, CodaLoop
    ),
    "progressive": PromptRow(ProgressivePrompts, {"length": 3}, ProgressiveLoop, tells_task=True),
    "progressive-residual": PromptRow(
        ProgressivePrompts, {"length": 3, "reparametrisation": 5}, residual_loop, tells_task=True
    ),
    "s-prompts": PromptRow(SPrompts, {"length": 3, "k": 2}, SPromptsLoop),
}
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
METHODS = {name: row for name, row in ROWS.items() if name not in ("l2p-diversify", "progressive-residual")}
every_method = pytest.mark.parametrize("row", METHODS.values(), ids=METHODS.keys())


def saver(directory: Path, **settings: Any) -> ModelCheckpoint:
    """A checkpoint at every step."""
    return ModelCheckpoint(directory, filename="{step}", every_n_train_steps=1, save_top_k=-1, **settings)


def fit(
    root: Path, row: PromptRow, *callbacks: Any, module: Any = None, batch_size: int = 8, ckpt: Any = None, **more: Any
) -> Any:
    """Fit both tasks and return the module."""
    module = module or PromptToy()
    trainer(root, callbacks, **more).fit(module, datamodule=row.stream(batch_size), ckpt_path=ckpt)
    return module


@every_row
def test_ends_where_a_plain_loop_ends(row: PromptRow, tmp_path: Path) -> None:
    """Over two tasks, with momentum and weight decay, against an encoder computed by hand."""
    torch.testing.assert_close(trained(fit(tmp_path, row, row.make())), row.plain(), rtol=0, atol=1e-5)


@every_method
def test_is_not_a_no_op(row: PromptRow, tmp_path: Path) -> None:
    """Prompts move, and the head ends elsewhere than without them; the network itself does not move at all."""
    module = fit(tmp_path, row, row.make())
    fresh = PromptToy()
    start = dict(row.make().attach(fresh, 2).named_parameters())
    moved = [(p - start[name]).abs().max() for name, p in module.model.bert.prompts.named_parameters()]
    assert max(moved) > 1e-2
    alone = PromptToy()
    alone.model.bert.requires_grad_(False)
    fit(tmp_path, row, module=alone)
    assert (module.model.classifier.weight - alone.model.classifier.weight).abs().max() > 1e-2
    before = dict(PromptToy().model.bert.named_parameters())
    for name, parameter in module.model.bert.named_parameters():
        assert name.startswith("prompts.") or torch.equal(parameter, before[name])
        assert parameter.requires_grad


@every_row
@pytest.mark.parametrize("step", [2, 4, 6], ids=["first task", "boundary", "second task"])
def test_resumes_to_the_same_bits(row: PromptRow, step: int, tmp_path: Path) -> None:
    """From a checkpoint at any step, with dropout, read with ``weights_only=True``."""
    through, again = row.make(), row.make()
    straight = fit(tmp_path, row, through, saver(tmp_path), module=PromptToy(0.3))
    torch.manual_seed(999)
    module = PromptToy(0.3)
    path = tmp_path / f"step={step}.ckpt"
    trainer(tmp_path, [again, saver(tmp_path / "resumed")]).fit(
        module, datamodule=row.stream(), ckpt_path=path, weights_only=True
    )
    assert torch.equal(trained(module), trained(straight))
    assert module.state_dict().keys() == straight.state_dict().keys()
    assert all(torch.equal(value, straight.state_dict()[name]) for name, value in module.state_dict().items())
    assert str(gathered(again.state_dict())) == str(gathered(through.state_dict()))


@every_method
def test_missing_state_is_refused(row: PromptRow, tmp_path: Path) -> None:
    """A checkpoint without the method's state does not go on."""
    module = PromptToy()
    row.make().attach(module, 2)
    # which nobody else tells it then
    module.current_task = Task(0, "first")
    fit(tmp_path, row, saver(tmp_path), module=module)
    with pytest.raises(ValueError, match=f"no state for {row.method.__name__}.*load_from_checkpoint"):
        fit(tmp_path, row, row.make(), saver(tmp_path), ckpt=tmp_path / "step=4.ckpt")


@every_method
def test_one_fit_for_each_task_is_the_same(row: PromptRow, tmp_path: Path) -> None:
    """With plain loaders and a fresh Trainer for each task, the prompts are found again and go on."""
    loaders = []
    for rows in TASKS:
        loaders.append(torch.utils.data.DataLoader(torch.utils.data.Subset(TwoTasks(), rows.tolist()), batch_size=8))
    kept, module = row.method(**row.settings, **rooms(row)), PromptToy()
    for number, loader in enumerate(loaders, start=1):
        job = trainer(tmp_path, [kept], max_epochs=number)
        job.fit(module, loader, loader, ckpt_path=None if number == 1 else tmp_path / "last.ckpt")
        job.save_checkpoint(tmp_path / "last.ckpt")
    assert kept.completed_tasks == 2
    fresh = PromptToy()
    for number, loader in enumerate(loaders, start=1):
        job = trainer(tmp_path, [row.method(**row.settings, **rooms(row))], max_epochs=number)
        job.fit(fresh, loader, loader, ckpt_path=None if number == 1 else tmp_path / "fresh.ckpt")
        job.save_checkpoint(tmp_path / "fresh.ckpt")
    assert torch.equal(trained(fresh), trained(module))
    pickle.loads(pickle.dumps(kept))


def rooms(row: PromptRow) -> dict[str, int]:
    """Return what a method must be told where no stream says it."""
    return {} if row.method is L2P else {"num_tasks": 2}


@every_method
def test_survives_pickling(row: PromptRow, tmp_path: Path) -> None:
    """As it reaches another process before a fit."""
    found = fit(tmp_path, row, pickle.loads(pickle.dumps(row.make())))
    assert torch.equal(trained(found), trained(fit(tmp_path, row, row.make())))


@every_method
def test_spawning_launchers_are_refused(row: PromptRow, tmp_path: Path) -> None:
    """They run the fit in children that keep what was learned to themselves."""
    assert exit_codes(functools.partial(fit_with_fork, tmp_path, row)) == [1]
    assert "ddp_spawn" in (tmp_path / "error.txt").read_text()


def fit_with_fork(root: Path, row: PromptRow) -> None:
    """Fit by a launcher that must be refused; leave the error's text."""
    try:
        fit(root, row, row.make(), strategy="ddp_fork", devices=2)
    except Exception as error:
        (root / "error.txt").write_text(str(error))
        raise


@every_method
def test_built_by_the_command_line(row: PromptRow, tmp_path: Path) -> None:
    """The class's signature is its YAML, and the reference classifier takes it."""
    settings = "\n".join(f"        {name}: {value}" for name, value in row.settings.items())
    rows = [f'{{"text": "{"abcd"[i % 4] * 5}", "label": {i % 4}}}' for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    arguments = f"{{path: {tmp_path}/rows.jsonl, tokenizer: bytes, max_length: 12, as_dict: true}}"
    source = f"{{class_path: TextFileSource, init_args: {arguments}}}"
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
  class_path: SequenceClassifier
  init_args:
    model: {{model_type: bert, vocab_size: 300, hidden_size: 16, num_hidden_layers: 3, num_attention_heads: 2,
      intermediate_size: 24}}
    num_labels: 4
data:
  class_path: TaskStreamDataModule
  init_args:
    train: {source}
    val: {source}
    scenario: {{class_path: {"TaskIncremental" if row.tells_task else "ClassIncremental"}, init_args: {{n_tasks: 2}}}}
    batch_size: 4
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


def fit_on_this_rank(
    root: Path, row: PromptRow, strategy: str, saved: str | None = None, ckpt_path: Path | None = None
) -> Tensor:
    """Fit with half of each batch; return prompts and head in full."""
    callbacks = [row.make(), *([saver(root / saved)] if saved else ())]
    kind = FSDP2Strategy() if strategy == "fsdp2" else "ddp"
    module = PromptToy(0.3 if saved else 0.0)
    return trained(fit(root, row, *callbacks, module=module, batch_size=4, ckpt=ckpt_path, strategy=kind, devices=2))


@pytest.mark.distributed
@every_row
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_end_where_one_process_ends(row: PromptRow, strategy: str, two_ranks: Ranks, tmp_path: Path) -> None:
    """Over two tasks, with the joined batch; embeddings and blocks are units of their own under fsdp2."""
    expected = row.plain(batch_size=4, world_size=2)
    first, second = two_ranks.run(fit_on_this_rank, tmp_path, row, strategy)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-5)


@pytest.mark.distributed
@every_row
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_resume_to_the_same_bits(row: PromptRow, strategy: str, two_ranks: Ranks, tmp_path: Path) -> None:
    """In the second task, with dropout."""
    straight = two_ranks.run(fit_on_this_rank, tmp_path, row, strategy, "straight")
    path = tmp_path / "straight" / "step=6.ckpt"
    resumed = two_ranks.run(fit_on_this_rank, tmp_path, row, strategy, "resumed", path)
    assert torch.equal(resumed[0], straight[0])
    assert torch.equal(resumed[1], straight[1])
