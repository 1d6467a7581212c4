"""Forgetting digits, by every method, beside the model retrained without them: ``python benchmarks/unlearning.py``.

Two requests, each on its own: a whole class, and 5 percent of the training samples at random. For each method: the
accuracy on what was to be forgotten, on what was retained and on test data; how well the loss tells forgotten samples
from unseen ones (membership AUC: what counts is the distance to that of the retrained model, not to 0.5); and its time
as a fraction of retraining.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

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
)

RESULTS = Path(__file__).parent / "results"
EPOCHS = 60
BATCH = 32
Kind = Literal["class", "random"]


@dataclass(frozen=True)
class Case:
    """How a method is run.

    Args:
        make: Makes its callback.
        epochs: Passes over what is to be forgotten.
        learning_rate: Of Adam.
    """

    make: Callable[[], Callback]
    epochs: int = 5
    learning_rate: float = 1e-3


def _trained(loss: Callable[[], ForgetLoss], retain: Any = "nll", **settings: Any) -> Callable[[], Callback]:
    return lambda: Unlearn(loss(), retain=retain, measure_samples=1, **settings)


def cases(kind: Kind) -> dict[str, Case]:
    """Return every method; settings are the defaults but for those that the size of the network decides."""
    epochs = 10 if kind == "class" else 4
    return {
        "gradient ascent": Case(_trained(GradientAscent, None), epochs),
        "GradDiff": Case(_trained(GradientAscent), epochs),
        "NPO": Case(_trained(lambda: NPO(beta=0.5)), epochs),
        "NPO, KL": Case(_trained(lambda: NPO(beta=0.5), "kl"), epochs),
        "SimNPO": Case(_trained(lambda: SimNPO(beta=0.5)), epochs),
        "UNDIAL": Case(_trained(UNDIAL), epochs),
        "WGA": Case(_trained(WGA), epochs),
        "SatImp": Case(_trained(SatImp), epochs),
        "CE-U": Case(_trained(lambda: CEU(skip=0)), epochs),
        "PDU": Case(_trained(lambda: PDU(epsilon=0.05)), epochs),
        "max entropy": Case(_trained(MaximumEntropy), epochs),
        "random label": Case(_trained(lambda: RandomLabel([3] if kind == "class" else None)), epochs),
        "RMU": Case(_trained(lambda: RMU(layer="network.3", coefficient=5.0), "own"), epochs),
        "SSD": Case(lambda: SelectiveSynapticDampening(alpha=3.0, measure_samples=1), 1),
        "task vector": Case(lambda: TaskVectorNegation(measure_samples=1), epochs // 2),
    }


@dataclass(frozen=True)
class Scores:
    """What a model knows, as shares and probabilities, and the seconds that it took to make it."""

    forget: float
    retain: float
    test: float
    membership_auc: float
    seconds: float


class Run:
    """One seed of one kind of request: the model that learned all, the one that never saw it, and the data."""

    def __init__(self, kind: Kind, seed: int, epochs: int) -> None:
        self.kind = kind
        self.seed = seed
        self.train = _tensors("train", seed)
        self.test = _tensors("test", seed)
        labels = self.train.tensors[1]
        rows = np.random.default_rng(seed).permutation(len(labels))[: len(labels) // 20]
        self.rows = np.flatnonzero(labels == 3) if kind == "class" else np.sort(rows)
        kept = np.setdiff1d(np.arange(len(labels)), self.rows)
        self.original, _ = self._fit(np.arange(len(labels)), epochs)
        self.retrained, self.seconds = self._fit(kept, epochs)
        self.kept = kept

    def _module(self, learning_rate: float = 1e-3) -> Classifier:
        seed_everything(self.seed, verbose=False)
        return Classifier(MLP(num_inputs=64, num_outputs=10, hidden=[256, 256]), learning_rate=learning_rate)

    def _fit(self, rows: np.ndarray, epochs: int) -> tuple[Classifier, float]:
        module = self._module()
        data = TensorDataset(*(tensor[torch.from_numpy(rows)] for tensor in self.train.tensors))
        loader = DataLoader(data, batch_size=BATCH, shuffle=True)
        return module, _timed(lambda: _trainer([], max_epochs=epochs).fit(module, loader))

    def unlearned(self, case: Case) -> tuple[LightningModule, float]:
        """Return the original model after a method, and its seconds."""
        module = self._module(case.learning_rate)
        module.load_state_dict(deepcopy(self.original.state_dict()))
        request = ForgetRequest("digits", rows=self.rows.tolist())
        settings = {"batch_size": BATCH, "epochs_per_request": case.epochs, "seed": self.seed}
        data = UnlearningDataModule(self.train, requests=[request], **settings)
        callback = case.make()
        return module, _timed(lambda: _trainer([callback]).fit(module, datamodule=data))

    def scores(self, module: LightningModule, seconds: float) -> Scores:
        """Return the scores; in a class request those of test data without the class, and unseen samples of it."""
        inputs, labels = self.test.tensors
        of_class = labels == 3
        unseen, others = (of_class, ~of_class) if self.kind == "class" else (torch.ones_like(of_class),) * 2
        train, train_labels = self.train.tensors
        rows, kept = torch.from_numpy(self.rows), torch.from_numpy(self.kept)
        with torch.no_grad():
            forget, holdout = module.eval()(train[rows]), module(inputs[unseen])
            accuracies = [
                _accuracy(forget, train_labels[rows]),
                _accuracy(module(train[kept]), train_labels[kept]),
                _accuracy(module(inputs[others]), labels[others]),
            ]
        losses = loss_score(forget, train_labels[rows]), loss_score(holdout, labels[unseen])
        return Scores(*accuracies, membership_auc(*losses).auc, seconds)


def _accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(-1) == labels).float().mean())


def _tensors(split: Any, seed: int) -> TensorDataset:
    source = DigitsSource(split, seed=seed)
    samples = [source[index] for index in range(len(source))]
    return TensorDataset(torch.stack([s[0] for s in samples]), torch.tensor([int(s[1]) for s in samples]))


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


def table(kind: Kind, runs: dict[str, list[Scores]]) -> str:
    """Return the table of one kind of request in Markdown: means and standard deviations over seeds."""
    what = "a whole class" if kind == "class" else "5 percent of the samples"
    test = "test, other classes" if kind == "class" else "test"
    lines = [
        f"Forgetting {what}:",
        "",
        f"| method | forget | retain | {test} | membership AUC | time / retraining |",
        "|---|---|---|---|---|---|",
    ]
    base = statistics.mean(scores.seconds for scores in runs["retrained"])
    for name, scores in runs.items():
        cells = [_cell([getattr(s, field) for s in scores]) for field in ("forget", "retain", "test", "membership_auc")]
        spent = statistics.mean(s.seconds for s in scores) / base
        lines.append(f"| {name} | {' | '.join(cells)} | {'' if name == 'original' else f'{spent:.2f}'} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {spread:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one seed and fewer epochs, written nowhere")
    options = parser.parse_args()
    be_quiet()
    found: dict[str, dict[str, list[Scores]]] = {}
    kinds: tuple[Kind, Kind] = ("class", "random")
    for kind in kinds:
        found[kind] = {}
        for seed in range(1 if options.quick else options.seeds):
            run = Run(kind, seed, 20 if options.quick else EPOCHS)
            rows = {"original": run.scores(run.original, 0.0), "retrained": run.scores(run.retrained, run.seconds)}
            rows |= {name: run.scores(*run.unlearned(case)) for name, case in cases(kind).items()}
            for name, scores in rows.items():
                found[kind].setdefault(name, []).append(scores)
        print(table(kind, found[kind]), flush=True)
    if options.quick:
        return
    versions = {name: version(name) for name in ("torch", "lightning")}
    content = {kind: {name: [asdict(s) for s in rows] for name, rows in runs.items()} for kind, runs in found.items()}
    (RESULTS / "unlearning.json").write_text(json.dumps({"versions": versions, **content}, indent=1) + "\n")
    note = f"Mean and standard deviation over {options.seeds} seeds; processor time; torch {versions['torch']}."
    tables = "\n\n".join(table(kind, found[kind]) for kind in kinds)
    (RESULTS / "unlearning.md").write_text(f"{tables}\n\n{note}\n")


if __name__ == "__main__":
    main()
