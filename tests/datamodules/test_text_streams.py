"""Text as a task stream: one source for each task, replay from memory and by ratio, resumed and on several ranks."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from killed import KILLED, KillAt
from lightning_cl import ExperienceReplay, TaskStreamDataModule
from lightning_cl.datamodules import PackedTextSource, Predefined, Rehearsed, Scenario
from ranks import exit_codes
from toys import trainer, weights

DOMAINS = {"low": "abcdefgh", "middle": "ijklmnop", "high": "qrstuvwx"}
BLOCK = 16


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains with letters of their own, 60 documents for training and 10 for validation."""
    root, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for name, letters in DOMAINS.items():
        for part, count in (("train", 60), ("val", 10)):
            lines = [
                json.dumps({"text": "".join(rng.choice(list(letters), rng.integers(5, 50)))}) for _ in range(count)
            ]
            (root / f"{name}.{part}.jsonl").write_text("\n".join(lines))
    return root


def sources(
    texts: Path, part: str, budgets: tuple[int | None, ...] = (None, None, None), **settings: Any
) -> list[PackedTextSource]:
    """One source for each domain."""
    settings["cache_dir"] = texts / "cache"
    return [
        PackedTextSource(str(texts / f"{name}.{part}.jsonl"), BLOCK, max_tokens=budget, **settings)
        for name, budget in zip(DOMAINS, budgets, strict=True)
    ]


class LanguageModel(LightningModule):
    """Predicts the next token from this one."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(7)
            self.model = nn.Sequential(nn.Embedding(259, 8), nn.Linear(8, 259))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.model(batch["input_ids"][:, :-1])
        return cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), batch_size=len(batch["labels"]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class Watch(Callback):
    """Counts the samples of each domain in training and in validation, by their letters, and keeps identities."""

    def __init__(self) -> None:
        self.trained: dict[int, list[int]] = {}
        self.validated: set[tuple[str, int, int]] = set()
        self.ids: list[list[int]] = []
        self.kept: list[int] = []

    def on_train_end(self, trainer: Any, module: Any) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, ExperienceReplay):
                self.kept = callback.buffer.all_samples.sample_ids.tolist()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        counts = self.trained.setdefault(trainer.current_epoch, [0] * len(DOMAINS))
        for domain in domains_of(batch):
            counts[domain] += 1
        self.ids.append(trainer.datamodule.batch_sample_ids(batch_idx)[0].tolist())

    def on_validation_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        task = trainer.datamodule.evaluated_tasks()[dataloader_idx]
        self.validated |= {(task.name, task.index, domain) for domain in domains_of(batch)}


def domains_of(batch: dict[str, Tensor]) -> list[int]:
    """Return the domain of each block; no block holds letters of two."""
    found = []
    for row in batch["labels"]:
        (domain,) = set(((row[row >= 3] - 3 - ord("a")) // 8).tolist())
        found.append(domain)
    return found


SCENARIO = Rehearsed(Predefined(names=list(DOMAINS)), ratio=0.25)


def fit(
    root: Path,
    texts: Path,
    *,
    scenario: Scenario = SCENARIO,
    replay: str | None = None,
    batch_size: int = 8,
    devices: int = 1,
    ckpt_path: Path | None = None,
    kill: tuple[str, int] | None = None,
    **settings: Any,
) -> tuple[Tensor, Watch]:
    """Fit the three domains; save and return the weights and what was seen."""
    watch = Watch()
    callbacks: list[Callback] = [watch, *([] if kill is None else [KillAt(*kill)])]
    if replay is not None:
        callbacks.append(ExperienceReplay(20, storage=replay, batch_size=4))
    callbacks.append(ModelCheckpoint(root / "checkpoints", filename="{step}", every_n_train_steps=1, save_top_k=-1))
    stream = TaskStreamDataModule(
        sources(texts, "train", **settings), sources(texts, "val"), scenario=scenario, batch_size=batch_size
    )
    strategy = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    module = LanguageModel()
    trainer(root, callbacks, **strategy).fit(module, datamodule=stream, ckpt_path=ckpt_path, weights_only=True)
    result = {"weights": weights(module), "trained": watch.trained, "ids": watch.ids}
    torch.save(result, root / f"result-{os.environ.get('RANK', '0')}.pt")
    return weights(module), watch


def test_each_source_is_a_task(texts: Path, tmp_path: Path) -> None:
    """By its name, trained on in full, and validated apart."""
    _, watch = fit(tmp_path, texts, scenario=Predefined(names=list(DOMAINS)))
    sizes = [len(source) for source in sources(texts, "train")]
    assert watch.trained == {task: [size * (domain == task) for domain in range(3)] for task, size in enumerate(sizes)}
    assert watch.validated == {(name, task, task) for task, name in enumerate(DOMAINS)}


def test_old_blocks_take_a_share_of_training_and_none_of_validation(texts: Path, tmp_path: Path) -> None:
    """A quarter of each task's blocks, with the identities they had, in as many steps as before."""
    _, watch = fit(tmp_path, texts)
    sizes = [len(source) for source in sources(texts, "train")]
    starts = np.cumsum([0, *sizes])
    for task, counts in watch.trained.items():
        assert sum(counts) == sizes[task]
        assert sum(counts[:task]) == (round(sizes[task] / 4) if task else 0)
        assert sum(counts[task + 1 :]) == 0
    assert watch.trained[2][0] > 0 < watch.trained[2][1]
    assert watch.validated == {(name, task, task) for task, name in enumerate(DOMAINS)}
    steps = [-(-size // 8) for size in sizes]
    last = [row for batch in watch.ids[steps[0] + steps[1] :] for row in batch]
    assert np.histogram(last, starts)[0].tolist() == watch.trained[2]


@pytest.mark.parametrize("across", [True, False])
def test_replay_of_blocks_from_memory_and_by_index(across: bool, texts: Path, tmp_path: Path) -> None:
    """The memory keeps blocks, or reads them again: the same model; and not the one without replay."""
    plain, _ = fit(tmp_path / "plain", texts, scenario=Predefined(), across_documents=across)
    kept, _ = fit(tmp_path / "a", texts, scenario=Predefined(), replay="memory", across_documents=across)
    read, _ = fit(tmp_path / "b", texts, scenario=Predefined(), replay="index", across_documents=across)
    assert torch.equal(kept, read)
    assert not torch.allclose(kept, plain)


def test_replay_beside_the_ratio(texts: Path, tmp_path: Path) -> None:
    """A block that comes back in a later task, or twice in a batch, is still kept once."""
    settings: dict[str, Any] = {"scenario": Rehearsed(Predefined(), ratio=0.8), "batch_size": 32}
    settings["budgets"] = (320, None, None)
    kept, watch = fit(tmp_path / "a", texts, replay="memory", **settings)
    read, _ = fit(tmp_path / "b", texts, replay="index", **settings)
    assert any(len(set(batch)) < len(batch) for batch in watch.ids)
    assert len(set(watch.kept)) == len(watch.kept) == 20
    assert torch.equal(kept, read)


def test_memory_that_needs_classes_is_refused(texts: Path, tmp_path: Path) -> None:
    """Labels of tokens are no class labels."""
    stream = TaskStreamDataModule(sources(texts, "train"), scenario=Predefined())
    replay = ExperienceReplay(20, policy="class_balanced")
    with pytest.raises(ValueError, match="needs class labels, but the stream's data has none"):
        trainer(tmp_path, [replay]).fit(LanguageModel(), datamodule=stream)


@pytest.fixture(scope="module")
def straight(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run ends with when nobody kills it."""
    root = tmp_path_factory.mktemp("straight")
    assert exit_codes(functools.partial(fit, root, texts)) == [0]
    return torch.load(root / "result-0.pt", weights_only=True)


def test_killed_in_the_second_task_and_resumed(texts: Path, straight: dict[str, Any], tmp_path: Path) -> None:
    """The same blocks come in the same order, to the same bits."""
    first = -(-sum(straight["trained"][0]) // 8)
    step = first + 3
    killed = functools.partial(fit, tmp_path, texts, kill=("on_train_batch_start", step))
    assert exit_codes(killed) == [KILLED]
    resumed = functools.partial(fit, tmp_path, texts, ckpt_path=tmp_path / "checkpoints" / f"step={step}.ckpt")
    assert exit_codes(resumed) == [0]
    result = torch.load(tmp_path / "result-0.pt", weights_only=True)
    assert result["ids"] == straight["ids"][step:]
    assert torch.equal(result["weights"], straight["weights"])


def test_resume_with_another_ratio_is_refused(texts: Path, tmp_path: Path) -> None:
    """It would be another stream."""
    fit(tmp_path, texts)
    path = tmp_path / "checkpoints" / "step=3.ckpt"
    with pytest.raises(ValueError, match="of another stream"):
        fit(tmp_path / "again", texts, scenario=Rehearsed(Predefined(), ratio=0.3), ckpt_path=path)


@pytest.mark.distributed
def test_two_ranks_read_what_one_process_reads(texts: Path, straight: dict[str, Any], tmp_path: Path) -> None:
    """The same old and new blocks in each global batch, each rank half of them."""
    ended = exit_codes(functools.partial(fit, tmp_path, texts, batch_size=4, devices=2), world_size=2)
    assert ended == [0, 0]
    first, second = (torch.load(tmp_path / f"result-{rank}.pt", weights_only=True) for rank in range(2))
    assert len(first["ids"]) == len(straight["ids"])
    for both, alone in zip(first["ids"], straight["ids"], strict=True):
        # the last batch of a task is filled up to a multiple of the ranks
        assert both[: len(alone)] == alone
        assert len(both) <= len(alone) + 1
    assert torch.equal(first["weights"], second["weights"])
    for task, counts in straight["trained"].items():
        joined = np.add(first["trained"][task], second["trained"][task])
        assert 0 <= (joined - counts).sum() <= 1
