"""Forgetting digits, by every method, beside the model retrained without them: ``python benchmarks/unlearning.py``.

Three requests, each on its own: a whole class; 5 percent of the training samples at random; and 5 percent whose labels
are wrong, so that nothing but the samples themselves could have taught them. For each method: the accuracy on what was
to be forgotten, on what was retained and on test data; how well the loss tells forgotten samples from unseen ones
(membership AUC); whether the forgotten is gone or only hidden (relearning attack, linear probe); and its time as a
fraction of retraining. What counts is the distance to the retrained model's numbers.

``--search`` looks for the settings of every method on seeds of its own and prints the table ``CHOSEN``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

# before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from measuring import be_quiet
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_cl.core.requests import ForgetRequest
from lightning_cl.datamodules import DigitsSource, UnlearningDataModule
from lightning_cl.metrics.unlearning import loss_score, membership_auc
from lightning_cl.modules import MLP, Classifier
from lightning_cl.unlearning import (
    CEU,
    NPO,
    PDU,
    RMU,
    UNDIAL,
    WGA,
    ForgetLoss,
    GradientAscent,
    MaximumEntropy,
    RandomLabel,
    SatImp,
    SelectiveSynapticDampening,
    SimNPO,
    TaskVectorNegation,
    Unlearn,
    probe_layers,
    relearning_attack,
)

RESULTS = Path(__file__).parent / "results"
EPOCHS, BATCH = 60, 32
FORGOTTEN_CLASS, CLASSES, LAST_HIDDEN = 3, 10, "network.4"
Kind = Literal["class", "random", "mislabelled"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WHAT = {"class": "a whole class", "random": "5 percent of the samples", "mislabelled": "5 percent with wrong labels"}

# about 10 and 40 steps
EPOCHS_TRIED: dict[Kind, tuple[int, int]] = {"class": (3, 10), "random": (5, 20), "mislabelled": (5, 20)}

# ---------------------------------------------------------------------- methods and their settings


class Settings(NamedTuple):
    """How a method is run.

    Args:
        learning_rate: Of Adam.
        epochs: Passes over what is to be forgotten.
        value: Of the setting that the method names.
    """

    learning_rate: float
    epochs: int
    value: Any


@dataclass(frozen=True)
class Method:
    """A method, and what the search tries.

    Args:
        make: Makes its callback from a value of its setting and the kind of request.
        setting: What the search varies besides learning rate and epochs.
        values: What it may be.
        trains: Whether learning rate and epochs mean anything.
    """

    make: Callable[[Any, Kind], Callback]
    setting: str
    values: Sequence[Any]
    trains: bool = True

    def grid(self, kind: Kind) -> list[Settings]:
        """Return what the search tries: 18 settings of each method."""
        if not self.trains:
            return [Settings(1e-3, 1, value) for value in self.values]
        return [Settings(*each) for each in product((3e-4, 1e-3, 3e-3), EPOCHS_TRIED[kind], self.values)]


def _by(loss: Callable[[Any], ForgetLoss], retain: Any = "nll") -> Callable[[Any, Kind], Callback]:
    return lambda value, kind: Unlearn(loss(value), retain=retain, measure_samples=1)


def _weighted(loss: Callable[[Kind], ForgetLoss]) -> Callable[[Any, Kind], Callback]:
    return lambda value, kind: Unlearn(loss(kind), forget_weight=value, measure_samples=1)


def _random_label(kind: Kind) -> RandomLabel:
    return RandomLabel([FORGOTTEN_CLASS] if kind == "class" else None)


def _ssd(value: tuple[float, float], kind: Kind) -> Callback:
    return SelectiveSynapticDampening(value[0], lambda_=value[1], measure_samples=1)


# SSD selects nothing from alpha = 10 on for the class, a tenth of the data, and from 20 on for 5 percent
METHODS = {
    "gradient ascent": Method(_by(lambda v: GradientAscent(bound=v), None), "bound", (0.3, "uniform", 10.0)),
    "GradDiff": Method(_by(lambda v: GradientAscent(bound=v)), "bound", (0.3, "uniform", 10.0)),
    "NPO": Method(_by(lambda v: NPO(beta=v)), "beta", (0.1, 0.5, 2.0)),
    "NPO, KL": Method(_by(lambda v: NPO(beta=v), "kl"), "beta", (0.1, 0.5, 2.0)),
    "SimNPO": Method(_by(lambda v: SimNPO(beta=v)), "beta", (0.5, 1.5, 4.5)),
    "UNDIAL": Method(_by(lambda v: UNDIAL(beta=v)), "beta", (5.0, 15.0, 30.0)),
    "WGA": Method(_by(lambda v: WGA(beta=v)), "beta", (0.25, 1.0, 4.0)),
    "SatImp": Method(_by(lambda v: SatImp(beta2=v)), "beta2", (0.1, 0.3, 1.0)),
    "CE-U": Method(_weighted(lambda kind: CEU(skip=0)), "forget_weight", (0.1, 0.3, 1.0)),
    "PDU": Method(_by(lambda v: PDU(epsilon=v)), "epsilon", (0.01, 0.05, 0.2)),
    "max entropy": Method(_weighted(lambda kind: MaximumEntropy()), "forget_weight", (0.1, 1.0, 10.0)),
    "random label": Method(_weighted(_random_label), "forget_weight", (0.1, 0.3, 1.0)),
    "RMU": Method(
        _by(lambda v: RMU(v[0], coefficient=v[1]), "own"),
        "layer, coefficient",
        (("network.2", 20.0), ("network.4", 20.0), ("network.4", 60.0)),
    ),
    "SSD": Method(_ssd, "alpha, lambda", list(product((1.5, 2.0, 3.0, 5.0, 8.0, 12.0), (0.3, 1.0, 2.0))), trains=False),
    "task vector": Method(lambda v, kind: TaskVectorNegation(v, measure_samples=1), "alpha", (0.5, 1.0, 2.0)),
}

# printed by `--search`
CHOSEN: dict[Kind, dict[str, Settings]] = {
    "class": {
        "gradient ascent": Settings(0.0003, 3, 0.3),
        "GradDiff": Settings(0.001, 3, 0.3),
        "NPO": Settings(0.001, 3, 2.0),
        "NPO, KL": Settings(0.0003, 10, 2.0),
        "SimNPO": Settings(0.001, 3, 4.5),
        "UNDIAL": Settings(0.0003, 10, 30.0),
        "WGA": Settings(0.001, 3, 4.0),
        "SatImp": Settings(0.001, 3, 0.1),
        "CE-U": Settings(0.001, 10, 0.3),
        "PDU": Settings(0.003, 10, 0.01),
        "max entropy": Settings(0.003, 3, 0.1),
        "random label": Settings(0.003, 3, 0.1),
        "RMU": Settings(0.003, 10, ("network.4", 20.0)),
        "SSD": Settings(0.001, 1, (3.0, 1.0)),
        "task vector": Settings(0.0003, 3, 2.0),
    },
    "random": {
        "gradient ascent": Settings(0.0003, 5, 0.3),
        "GradDiff": Settings(0.0003, 20, 0.3),
        "NPO": Settings(0.0003, 20, 2.0),
        "NPO, KL": Settings(0.0003, 20, 2.0),
        "SimNPO": Settings(0.0003, 20, 4.5),
        "UNDIAL": Settings(0.001, 20, 5.0),
        "WGA": Settings(0.0003, 20, 4.0),
        "SatImp": Settings(0.0003, 20, 0.3),
        "CE-U": Settings(0.0003, 5, 0.1),
        "PDU": Settings(0.0003, 5, 0.01),
        "max entropy": Settings(0.003, 5, 0.1),
        "random label": Settings(0.0003, 5, 0.1),
        "RMU": Settings(0.001, 5, ("network.2", 20.0)),
        "SSD": Settings(0.001, 1, (2.0, 1.0)),
        "task vector": Settings(0.001, 20, 0.5),
    },
    "mislabelled": {
        "gradient ascent": Settings(0.0003, 20, 0.3),
        "GradDiff": Settings(0.003, 20, 10.0),
        "NPO": Settings(0.001, 20, 0.5),
        "NPO, KL": Settings(0.003, 20, 0.5),
        "SimNPO": Settings(0.003, 5, 0.5),
        "UNDIAL": Settings(0.003, 5, 15.0),
        "WGA": Settings(0.001, 20, 0.25),
        "SatImp": Settings(0.003, 5, 0.1),
        "CE-U": Settings(0.003, 20, 1.0),
        "PDU": Settings(0.003, 20, 0.2),
        "max entropy": Settings(0.003, 20, 1.0),
        "random label": Settings(0.003, 20, 0.1),
        "RMU": Settings(0.0003, 20, ("network.2", 20.0)),
        "SSD": Settings(0.001, 1, (1.5, 1.0)),
        "task vector": Settings(0.003, 20, 1.0),
    },
}


@dataclass(frozen=True)
class Scores:
    """What a model knows, as shares and probabilities, and the seconds that it took to make it.

    Args:
        forget: Accuracy on the training samples to forget; of wrong labels, how many it repeats.
        retain: Accuracy on the other training samples.
        unseen: Accuracy on data that no model saw, with true labels; without the forgotten class.
        membership_auc: How well the loss tells forgotten from unseen samples, of that class or with wrong labels too.
        seconds: Processor time.
        relearned: Steps of the attack until the forgotten was recovered; ``None`` if it never was, or not attacked.
        recovered: The most that the attack recovered.
        probe: Accuracy of a linear probe that tells the forgotten class from the others.
    """

    forget: float
    retain: float
    unseen: float
    membership_auc: float
    seconds: float
    relearned: int | None = None
    recovered: float | None = None
    probe: float | None = None


# ---------------------------------------------------------------------- the experiment

# the attack: forgotten samples that it has of a class, retained ones beside them in each batch, and what counts as
# recovered: half of the class with nothing else lost, or more wrong labels than a guess gets
SHOWN_OF_CLASS, BESIDE, ATTACK_BATCHES, ATTACK_STEPS, ATTACK_RATE = 10, 32, 10, 60, 1e-3
RECOVERED: dict[Kind, float] = {"class": 0.75, "mislabelled": 0.25}


class Run:
    """One seed of one kind of request: the model that learned all, the one that never saw it, and the data.

    Args:
        kind: What is asked to be forgotten.
        seed: Of the split, the samples, the weights and the order.
        epochs: Of learning.
        retrains: Whether the model without the samples is wanted too.
    """

    def __init__(self, kind: Kind, seed: int, epochs: int, *, retrains: bool = True) -> None:
        self.kind = kind
        self.seed = seed
        inputs, labels = _tensors("train", seed)
        draw = np.random.default_rng(seed)
        rows = draw.permutation(len(labels))[: len(labels) // 20]
        rows = np.flatnonzero(labels == FORGOTTEN_CLASS) if kind == "class" else np.sort(rows)
        self.rows = torch.from_numpy(rows)
        if kind == "mislabelled":
            labels[self.rows] = _wrong(labels[self.rows], seed)
        self.train = inputs, labels
        self.kept = torch.from_numpy(np.setdiff1d(np.arange(len(labels)), rows))
        self.original, _ = self._fit(torch.arange(len(labels)), epochs)
        if retrains:
            self.retrained, self.seconds = self._fit(self.kept, epochs)

    def _module(self, learning_rate: float = 1e-3) -> Classifier:
        seed_everything(self.seed, verbose=False)
        return Classifier(MLP(num_inputs=64, num_outputs=CLASSES, hidden=[256, 256]), learning_rate=learning_rate)

    def _fit(self, rows: Tensor, epochs: int) -> tuple[Classifier, float]:
        module = self._module()
        data = TensorDataset(*(tensor[rows] for tensor in self.train))
        loader = DataLoader(data, batch_size=BATCH, shuffle=True)
        return module, _timed(lambda: _trainer([], max_epochs=epochs).fit(module, loader))

    def unlearned(self, method: Method, settings: Settings) -> tuple[LightningModule, float]:
        """Return the original model after a method, and its seconds."""
        module = self._module(settings.learning_rate)
        module.load_state_dict(deepcopy(self.original.state_dict()))
        data = UnlearningDataModule(
            TensorDataset(*self.train),
            requests=[ForgetRequest("digits", rows=self.rows.tolist())],
            batch_size=BATCH,
            epochs_per_request=settings.epochs,
            seed=self.seed,
        )
        callback = method.make(settings.value, self.kind)
        return module, _timed(lambda: _trainer([callback]).fit(module, datamodule=data))

    def scores(self, module: LightningModule, seconds: float, split: str = "test", *, attack: bool = False) -> Scores:
        """Return the scores of a model, beside unseen data of a split."""
        inputs, labels = _tensors(split, self.seed)
        of_class = labels == FORGOTTEN_CLASS
        everything = torch.ones_like(of_class)
        like_forgotten, others = (of_class, ~of_class) if self.kind == "class" else (everything, everything)
        train, train_labels = self.train
        with torch.no_grad():
            forget, unseen = module.eval()(train[self.rows]), module(inputs)
            retained = _accuracy(module(train[self.kept]), train_labels[self.kept])
        accuracies = _accuracy(forget, train_labels[self.rows]), retained, _accuracy(unseen[others], labels[others])
        answers = _wrong(labels, self.seed) if self.kind == "mislabelled" else labels
        losses = (
            loss_score(forget, train_labels[self.rows]),
            loss_score(unseen[like_forgotten], answers[like_forgotten]),
        )
        attacked = self._attacked(module) if attack else {}
        return Scores(*accuracies, membership_auc(*losses).auc, seconds, **attacked)

    def _attacked(self, module: LightningModule) -> dict[str, Any]:
        """Return what an attacker recovers who has some of the forgotten samples, and some of the retained."""
        if self.kind == "random":
            # the retrained model is right about them as well: there is nothing to recover
            return {}
        inputs, labels = (tensor[self.rows] for tensor in self.train)
        shown = SHOWN_OF_CLASS if self.kind == "class" else len(labels) // 2
        drawn = self.kept[torch.randperm(len(self.kept), generator=torch.Generator().manual_seed(self.seed))]
        beside = drawn[: ATTACK_BATCHES * BESIDE].view(ATTACK_BATCHES, BESIDE)
        batches = [tuple(torch.cat([t[self.rows[:shown]], t[rows]]) for t in self.train) for rows in beside]
        others, of_others = self._unseen("test", of_class=False)

        def known(attacked: LightningModule) -> float:
            hidden = _accuracy(attacked(inputs[shown:]), labels[shown:])
            # to answer always with the class is not to know it
            return hidden if self.kind == "mislabelled" else (hidden + _accuracy(attacked(others), of_others)) / 2

        # the same for all, whatever rate the method had
        module.learning_rate = ATTACK_RATE
        threshold = RECOVERED[self.kind]
        course = relearning_attack(module, batches, known, threshold=threshold, max_steps=ATTACK_STEPS, seed=self.seed)
        found = {"relearned": course.steps_to_recover, "recovered": max(course.scores)}
        return found | ({"probe": self._probed(module)} if self.kind == "class" else {})

    def _unseen(self, split: str, *, of_class: bool) -> tuple[Tensor, Tensor]:
        inputs, labels = _tensors(split, self.seed)
        chosen = (labels == FORGOTTEN_CLASS) == of_class
        return inputs[chosen], labels[chosen]

    def _probed(self, module: LightningModule) -> float:
        """Return how well the last hidden layer tells the class from as many unseen samples of the others."""
        parts = [self._unseen(split, of_class=of_class) for of_class in (True, False) for split in ("val", "test")]
        of_class = torch.cat([inputs for inputs, _ in parts[:2]])
        others = torch.cat([inputs for inputs, _ in parts[2:]])
        drawn = torch.randperm(len(others), generator=torch.Generator().manual_seed(self.seed))[: len(of_class)]
        is_class = torch.arange(2).flip(0).repeat_interleave(len(of_class))
        batch = torch.cat([of_class, others[drawn]]), is_class
        return probe_layers(module, [batch], is_class, layers=[LAST_HIDDEN])[LAST_HIDDEN].accuracy


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(-1) == labels).float().mean())


def _wrong(labels: Tensor, seed: int) -> Tensor:
    shift = torch.randint(1, CLASSES, labels.shape, generator=torch.Generator().manual_seed(seed))
    return (labels + shift) % CLASSES


def _tensors(split: Any, seed: int) -> tuple[Tensor, Tensor]:
    source = DigitsSource(split, seed=seed)
    samples = [source[index] for index in range(len(source))]
    return torch.stack([s[0] for s in samples]), torch.tensor([int(s[1]) for s in samples])


def _trainer(callbacks: list[Callback], **settings: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    folder = tempfile.mkdtemp()
    return Trainer(
        accelerator="cpu", default_root_dir=folder, enable_checkpointing=False, callbacks=callbacks, **quiet, **settings
    )


def _timed(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


# ---------------------------------------------------------------------- the search

# none is one of the tables; what brings the accuracy on a class to just 0 on one seed may leave half of it on another
SEARCH_SEEDS: dict[Kind, tuple[int, ...]] = {"class": (100, 101), "random": (100,), "mislabelled": (100,)}
MOST_LOST = 0.01


@dataclass(frozen=True)
class Tried:
    """Settings, and how far they forgot: means over the seeds of the search.

    Args:
        left: What is left to forget: of a class the accuracy on it, else how far the membership AUC is from 0.5.
        kept: Accuracy on validation data, as :attr:`Scores.unseen`.
    """

    settings: Settings
    left: float
    kept: float

    @staticmethod
    def mean(seeds: Sequence[Tried]) -> Tried:
        """Return the mean of the same settings on several seeds."""
        left, kept = (statistics.mean(getattr(each, name) for each in seeds) for name in ("left", "kept"))
        return Tried(seeds[0].settings, left, kept)


def choose(settings: Sequence[Tried], kept_before: float) -> Tried:
    """Return the settings that forget most among those that cost at most a point of accuracy on validation data.

    Among equals, those that keep most; where all cost more, those with the least sum of both losses. The retrained
    model, which nobody has in earnest, has no part in it.
    """
    if within := [each for each in settings if each.kept >= kept_before - MOST_LOST]:
        return min(within, key=lambda each: (each.left, -each.kept, each.settings.epochs))
    return min(settings, key=lambda each: each.left - each.kept)


def search() -> None:
    """Try all settings on seeds that are not in the tables, keep the numbers and print what was chosen."""
    record: dict[str, Any] = {}
    for kind, seeds in SEARCH_SEEDS.items():
        found = [tried(kind, seed) for seed in seeds]
        kept_before = statistics.mean(before.kept for before, _ in found)
        record[kind] = {"original": [round(kept_before, 4)]}
        print(f'    "{kind}": {{')
        for name in METHODS:
            means = [Tried.mean(each) for each in zip(*(methods[name] for _, methods in found), strict=True)]
            best = choose(means, kept_before)
            print(f'        "{name}": Settings{tuple(best.settings)},  # {best.left:.3f} {best.kept:.3f}')
            record[kind][name] = [[*each.settings, round(each.left, 4), round(each.kept, 4)] for each in means]
        print("    },", flush=True)
    (RESULTS / "unlearning_search.json").write_text(json.dumps({"seeds": SEARCH_SEEDS, **record}) + "\n")


def tried(kind: Kind, seed: int) -> tuple[Tried, dict[str, list[Tried]]]:
    """Return what the original model keeps, and what every setting of every method left and kept."""
    run = Run(kind, seed, EPOCHS, retrains=False)

    def scored(settings: Settings, module: LightningModule) -> Tried:
        scores = run.scores(module, 0.0, "val")
        left = scores.forget if kind == "class" else abs(scores.membership_auc - 0.5)
        return Tried(settings, left, scores.unseen)

    found = {
        name: [scored(settings, run.unlearned(method, settings)[0]) for settings in method.grid(kind)]
        for name, method in METHODS.items()
    }
    return scored(Settings(0.0, 0, None), run.original), found


# ---------------------------------------------------------------------- tables


def measure(kind: Kind, seeds: int, epochs: int) -> dict[str, list[Scores]]:
    """Return the scores of all models, one for each seed."""
    found: dict[str, list[Scores]] = {}
    for seed in range(seeds):
        run = Run(kind, seed, epochs)
        made = {"original": (run.original, 0.0), "retrained": (run.retrained, run.seconds)}
        made |= {name: run.unlearned(METHODS[name], chosen) for name, chosen in CHOSEN[kind].items()}
        for name, (module, seconds) in made.items():
            found.setdefault(name, []).append(run.scores(module, seconds, attack=True))
    return found


def write(found: dict[Kind, dict[str, list[Scores]]]) -> None:
    """Keep all scores, and the tables for the docs."""
    versions = {name: version(name) for name in ("torch", "lightning")}
    content = {kind: {name: [asdict(s) for s in rows] for name, rows in runs.items()} for kind, runs in found.items()}
    (RESULTS / "unlearning.json").write_text(json.dumps({"versions": versions, **content}, indent=1) + "\n")
    seeds = len(found["class"]["retrained"])
    note = (
        f"Mean and standard deviation over {seeds} seeds, steps one by one; processor time; torch {versions['torch']}."
    )
    tables = "\n\n".join(table(kind, runs) for kind, runs in found.items())
    (RESULTS / "unlearning.md").write_text(f"{tables}\n\n{note}\n")


def table(kind: Kind, runs: dict[str, list[Scores]]) -> str:
    """Return the table of one kind of request in Markdown: means and standard deviations over seeds."""
    columns: dict[str, Callable[[list[Scores]], str]] = {
        "forget": lambda scores: _cell([s.forget for s in scores]),
        "retain": lambda scores: _cell([s.retain for s in scores]),
        "test, other classes" if kind == "class" else "test": lambda scores: _cell([s.unseen for s in scores]),
        "membership AUC": lambda scores: _cell([s.membership_auc for s in scores]),
    }
    if kind in RECOVERED:
        columns["steps to recover"] = lambda scores: ", ".join(
            "–" if s.relearned is None else f"{s.relearned}" for s in scores
        )
    if kind == "mislabelled":
        columns["recovered at most"] = lambda scores: _cell([s.recovered or 0.0 for s in scores])
    if kind == "class":
        columns["probe"] = lambda scores: _cell([s.probe or 0.0 for s in scores])
    base = statistics.mean(scores.seconds for scores in runs["retrained"])
    columns["time / retraining"] = lambda scores: f"{statistics.mean(s.seconds for s in scores) / base:.2f}"
    lines = [
        f"Forgetting {WHAT[kind]}:",
        "",
        f"| method | learning rate, epochs | setting | {' | '.join(columns)} |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for name, scores in runs.items():
        cells = [*_settings(kind, name), *(cell(scores) for cell in columns.values())]
        cells[-1] = "" if name == "original" else cells[-1]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _settings(kind: Kind, name: str) -> tuple[str, str]:
    if name not in METHODS:
        return "", ""
    method, chosen = METHODS[name], CHOSEN[kind][name]
    values = chosen.value if isinstance(chosen.value, tuple) else (chosen.value,)
    shown = ", ".join(f"{v:g}" if isinstance(v, float) else f"`{v}`" for v in values)
    return f"{chosen.learning_rate:g}, {chosen.epochs}" if method.trains else "", f"{method.setting} {shown}"


def _cell(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {spread:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed and fewer epochs, written nowhere")
    parser.add_argument("--search", action="store_true", help="look for settings, on another seed, instead")
    options = parser.parse_args()
    be_quiet()
    if options.search:
        search()
        return
    found = {}
    for kind in KINDS:
        found[kind] = measure(kind, *((1, 20) if options.quick else (options.seeds, EPOCHS)))
        print(table(kind, found[kind]), flush=True)
    if not options.quick:
        write(found)


if __name__ == "__main__":
    main()
