"""Forgetting people by a language model: ``python benchmarks/unlearning_lm.py [--seeds 3] [--quick]``.

A small Llama learns the synthetic biographies of ``biographies.py`` and forgets a tenth of the authors, by each method,
beside the model that never learned them; then three requests in a row. An idle core takes about ten minutes.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from biographies import Biographies, Fact, Texts, Vocabulary, joined
from lightning.pytorch import seed_everything
from measuring import be_quiet, conditions
from PIL import Image
from processes import quiet
from torch import Tensor
from torch.utils.data import DataLoader
from workloads import quiet_trainer

from lightning_cl.core.requests import ForgetRequest
from lightning_cl.datamodules import UnlearningDataModule
from lightning_cl.functional.unlearning import token_nll
from lightning_cl.metrics.unlearning import (
    exact_memorization,
    extraction_strength,
    forget_quality,
    loss_score,
    membership_auc,
    model_utility,
    probability,
    revival,
    rouge_l,
    truth_ratio,
    truth_ratio_score,
)
from lightning_cl.modules import CausalLM
from lightning_cl.report import Statistic
from lightning_cl.report.style import LIGHT, new_figure, png
from lightning_cl.unlearning import NPO, RMU, UNDIAL, GradientAscent, SimNPO, Unlearn

ROOT = Path(__file__).parents[1]
RESULTS, ASSETS = ROOT / "benchmarks" / "results", ROOT / "docs" / "assets"
LENGTH, NEW_TOKENS, BATCH, FORGET_BATCH = 18, 9, 32, 8
LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Size:
    """How much is run: authors, epochs of learning, seeds, authors whose facts measure the utility."""

    authors: int = 80
    epochs: int = 40
    measured: int = 16
    seeds: int = 3


QUICK = Size(authors=40, epochs=30, measured=8, seeds=1)


@dataclass(frozen=True)
class Case:
    """How a method is run.

    Args:
        make: Makes its callback from the settings that all of them share.
        learning_rate: Of AdamW, constant.
        epochs: Passes over what is to be forgotten.
    """

    make: Callable[..., Unlearn]
    learning_rate: float
    epochs: int = 10


def _by(method: Any, retain: Any = None) -> Callable[..., Unlearn]:
    return lambda **settings: Unlearn(method(), retain=retain, **settings)


def _rmu() -> RMU:
    return RMU(layer="network.model.layers.1", coefficient=20.0)


def _npo() -> NPO:
    return NPO(beta=0.5)


def _simnpo() -> SimNPO:
    return SimNPO(beta=1.5)


# of a few learning rates, epochs and betas those with the highest utility where the forget quality was above p = 0.05,
# else with the highest quality, on another seed (100)
CASES = {
    "GA, no bound": Case(_by(lambda: GradientAscent(bound=None)), 1e-4),
    "GA": Case(_by(GradientAscent), 1e-4),
    "GradDiff": Case(_by(GradientAscent, "nll"), 1e-4, 20),
    "NPO": Case(_by(_npo), 1e-4),
    "NPO + nll": Case(_by(_npo, "nll"), 3e-4, 20),
    "NPO + kl": Case(_by(_npo, "kl"), 3e-4),
    "SimNPO": Case(_by(_simnpo), 1e-4),
    "SimNPO + nll": Case(_by(_simnpo, "nll"), 3e-4, 20),
    "RMU": Case(_by(_rmu, "own"), 3e-4, 20),
    "UNDIAL": Case(_by(UNDIAL), 3e-4),
    "UNDIAL + nll": Case(_by(UNDIAL, "nll"), 1e-3, 20),
}
IN_A_ROW = ("GradDiff", "NPO + nll")


@dataclass(frozen=True)
class Scores:
    """What a model knows.

    Args:
        log10_p: Forget quality: of the truth ratios against the retrained model's, at most 0.
        distance: D of the same test.
        utility: Harmonic mean of nine scores on what is to stay.
        probability: Of the forgotten answers, as the next three.
        memorized: Exact memorisation.
        extracted: Extraction strength.
        membership_auc: How well the loss tells forgotten from unseen authors.
        seconds: Processor time that it took to make the model.
        parts: The nine scores.
    """

    log10_p: float
    distance: float
    utility: float
    probability: float
    memorized: float
    extracted: float
    membership_auc: float
    seconds: float
    parts: dict[str, float]


@dataclass(frozen=True)
class Found:
    """All that a seed gave: scores by model, and by method the request matrix and the utility after each request.

    Args:
        scores: By name of the model.
        matrices: Probability of forget set j (columns) after request i (rows), as far as it was served.
        retained: Probability of what is retained, at the start and after each request.
        unseen: Probability of the answers about unseen authors by the original model.
    """

    scores: dict[str, Scores]
    matrices: dict[str, list[list[float]]]
    retained: dict[str, list[float]]
    unseen: float


class Experiment:
    """One seed: the data, the model that learned all of them, and the one that never saw what is to be forgotten.

    The first tenth of the authors is to be forgotten; in three requests in a row a twentieth each.
    """

    def __init__(self, seed: int, size: Size) -> None:
        self.seed, self.size = seed, size
        self.facts = Biographies.make(seed, authors=size.authors)
        self.vocabulary = Vocabulary(self.facts.words(), LENGTH)
        self.forget = joined(self.facts.authors[: size.authors // 10])
        self.pairs = [(f.question, f.answer) for f in joined(self.facts.authors)] + self.facts.learned_by_all()
        self.original, self.learning_seconds = self._learn(self.pairs)
        self.retrained, self.seconds = self._learn(self.pairs[len(self.forget) :])
        self.ratios = self._truth_ratios(self.retrained, self.forget)

    def _module(self, learning_rate: float, **settings: Any) -> CausalLM:
        config = LLAMA | {"vocab_size": len(self.vocabulary)}
        module = CausalLM(config, learning_rate=learning_rate, weight_decay=0.0, seed=self.seed, **settings)
        module.configure_model()
        return module

    def _learn(self, pairs: Sequence[tuple[str, str]]) -> tuple[CausalLM, float]:
        seed_everything(self.seed, verbose=False)
        module = self._module(2e-3, warmup=0.05)
        loader = DataLoader(Texts(self.vocabulary.encode(pairs)), batch_size=BATCH, shuffle=True)
        trainer = quiet_trainer(max_epochs=self.size.epochs)
        return module, _timed(lambda: trainer.fit(module, loader))

    def serve(
        self, case: Case, requests: Sequence[ForgetRequest], measure_samples: int = 1
    ) -> tuple[CausalLM, Unlearn, float]:
        """Return the original model after requests, the callback that served them and the processor time."""
        seed_everything(self.seed, verbose=False)
        module = self._module(case.learning_rate, schedule="constant", warmup=0)
        module.load_state_dict(deepcopy(self.original.state_dict()))
        callback = case.make(measure_samples=measure_samples, seed=self.seed)
        unseen = [(f.question, f.answer) for f in joined(self.facts.unseen)]
        data = UnlearningDataModule(
            Texts(self.vocabulary.encode(self.pairs)),
            Texts(self.vocabulary.encode(unseen)),
            requests=list(requests),
            batch_size=FORGET_BATCH,
            epochs_per_request=case.epochs,
            seed=self.seed,
        )
        with tempfile.TemporaryDirectory() as folder:
            trainer = quiet_trainer(callbacks=[callback], default_root_dir=folder, limit_val_batches=0)
            seconds = _timed(lambda: trainer.fit(module, datamodule=data))
        return module, callback, seconds

    def unlearned(self, case: Case) -> Scores:
        """Return the scores of the original model after a method."""
        request = ForgetRequest("a tenth", rows=list(range(len(self.forget))))
        module, _, seconds = self.serve(case, [request])
        return self.scores(module, seconds)

    def in_a_row(self, case: Case) -> tuple[list[list[float]], list[float]]:
        """Return the request matrix of three requests, and what is retained at the start and after each."""
        rows = 5 * (self.size.authors // 20)
        requests = [ForgetRequest(f"{i}", rows=list(range(i * rows, (i + 1) * rows))) for i in range(3)]
        records = self.serve(case, requests, measure_samples=10**6)[1].ledger.records
        names = [[*(f"request:{j}" for j in range(i)), "forget"] for i in range(len(records))]
        matrix = [
            [record.after[f"{name}/probability"] for name in row] for record, row in zip(records, names, strict=True)
        ]
        retained = [records[0].before["retain/probability"], *(r.after["retain/probability"] for r in records)]
        return matrix, retained

    # ------------------------------------------------------------------ measurements

    @torch.no_grad()
    def scores(self, module: CausalLM, seconds: float) -> Scores:
        """Return all scores of a model."""
        module.eval()
        logits, labels = self._answers(module, self.forget)
        unseen = loss_score(*self._answers(module, joined(self.facts.unseen)))
        quality = forget_quality(self._truth_ratios(module, self.forget), self.ratios)
        measured = self.facts.authors[-self.size.measured :]
        kept = {"authors": joined(measured), "famous": joined(self.facts.famous), "world": self.facts.world}
        parts = {f"{name}, {what}": v for name, facts in kept.items() for what, v in self._kept(module, facts).items()}
        return Scores(
            *quality,
            model_utility(list(parts.values())),
            float(probability(logits, labels).mean()),
            float(exact_memorization(logits, labels).mean()),
            float(extraction_strength(logits, labels).mean()),
            membership_auc(loss_score(logits, labels), unseen).auc,
            seconds,
            parts,
        )

    def unseen_probability(self) -> float:
        """Return the mean probability of the answers about unseen authors by the original model."""
        return float(probability(*self._answers(self.original, joined(self.facts.unseen))).mean())

    def _kept(self, module: CausalLM, facts: Sequence[Fact]) -> dict[str, float]:
        said = module.generate(*self.vocabulary.prompts([f.question for f in facts]), NEW_TOKENS)
        texts = [self.vocabulary.text(ids) for ids in said.tolist()]
        # either wording is right, and greedy decoding takes one
        recall = [
            rouge_l(texts, [getattr(f, wording) for f in facts], stem=False) for wording in ("answer", "paraphrase")
        ]
        ratios = truth_ratio_score(self._truth_ratios(module, facts), "retain")
        return {
            "probability": float(probability(*self._answers(module, facts)).mean()),
            "ROUGE-L": float(torch.maximum(*recall).mean()),
            "truth ratio": float(ratios.mean()),
        }

    @torch.no_grad()
    def _logits(self, module: CausalLM, pairs: Sequence[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        rows = self.vocabulary.encode(pairs)
        labels = rows.pop("labels")
        return module.eval()(**rows), labels

    def _answers(self, module: CausalLM, facts: Sequence[Fact]) -> tuple[Tensor, Tensor]:
        return self._logits(module, [(f.question, f.answer) for f in facts])

    def _truth_ratios(self, module: CausalLM, facts: Sequence[Fact]) -> Tensor:
        pairs = [(f.question, text) for f in facts for text in (f.paraphrase, *f.wrong)]
        losses = token_nll(*self._logits(module, pairs), reduction="sequence_mean").view(len(facts), -1)
        return truth_ratio(losses[:, 0], losses[:, 1:])


def _timed(function: Callable[[], Any]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def run(seed: int, size: Size) -> Found:
    """Return all that a seed gives."""
    be_quiet()
    quiet()
    experiment = Experiment(seed, size)
    models = (experiment.original, experiment.learning_seconds), (experiment.retrained, experiment.seconds)
    scores = {name: experiment.scores(*made) for name, made in zip(("original", "retrained"), models, strict=True)}
    for name, case in CASES.items():
        scores[name] = made = experiment.unlearned(case)
        print(f"seed {seed}, {name}: log10 p {made.log10_p:.1f}, utility {made.utility:.2f}", flush=True)
    rows = {name: experiment.in_a_row(CASES[name]) for name in IN_A_ROW}
    matrices = {name: matrix for name, (matrix, _) in rows.items()}
    return Found(
        scores, matrices, {name: retained for name, (_, retained) in rows.items()}, experiment.unseen_probability()
    )


# ---------------------------------------------------------------------- tables and figure


def _cells(values: Sequence[float], digits: int = 2) -> str:
    return Statistic.of(values).text(digits)


def table(found: Sequence[Found]) -> str:
    """Lay out the scores of all models, means ± standard deviations over seeds."""
    lines = [
        "| model | learning rate, epochs | forget quality, log10 p | D | utility | probability | exact memorisation |"
        " extraction strength | membership AUC | time / retraining |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in found[0].scores:
        rows = [each.scores[name] for each in found]
        spent = [each.scores[name].seconds / each.scores["retrained"].seconds for each in found]
        case = CASES.get(name)
        cells = ["" if case is None else f"{case.learning_rate:g}, {case.epochs}"]
        cells += [_cells([row.log10_p for row in rows], 1)]
        fields = ("distance", "utility", "probability", "memorized", "extracted", "membership_auc")
        cells += [_cells([getattr(row, field) for row in rows]) for field in fields]
        cells += [f"{statistics.fmean(spent):.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sequence_table(found: Sequence[Found]) -> str:
    """Lay out the request matrices."""
    lines = [
        "| method | after | set 1 | set 2 | set 3 | retained |",
        "|---|---|---|---|---|---|",
    ]
    for name in IN_A_ROW:
        start = _cells([each.retained[name][0] for each in found])
        lines.append(f"| {name} | the start | | | | {start} |")
        for i in range(3):
            sets = [_cells([each.matrices[name][i][j] for each in found]) if j <= i else "" for j in range(3)]
            kept = _cells([each.retained[name][i + 1] for each in found])
            lines.append(f"| | request {i + 1} | {' | '.join(sets)} | {kept} |")
        back = [revival(_square(each.matrices[name])).tolist() for each in found]
        sets = [_cells([values[j] for values in back]) for j in range(2)]
        lines.append(f"| | *revival* | {' | '.join(sets)} | – | |")
    unseen = _cells([each.unseen for each in found])
    return "\n".join([*lines, "", f"Authors whom the model never saw: {unseen}."])


def _square(matrix: list[list[float]]) -> Tensor:
    return torch.tensor([row + [math.nan] * (len(matrix) - len(row)) for row in matrix])


def figure(found: Sequence[Found]) -> bytes:
    """Draw forget quality against utility: a dot for each seed, joined to the mean of its model."""
    drawing, axes = new_figure(4.6, "Forget quality against model utility", LIGHT, width=7.2)
    markers = {"GA": "o", "GradDiff": "D", "NPO": "^", "SimNPO": "v", "RMU": "P", "UNDIAL": "s"}
    others = {"original": "X", "retrained": "*", "GA, no bound": "x"}
    colors = dict(zip(markers, LIGHT.methods, strict=False)) | {"GA, no bound": LIGHT.methods[0]}
    fills = {"": "none", "kl": "left"}
    for name in found[0].scores:
        rows = [each.scores[name] for each in found]
        x, y = [row.utility for row in rows], [row.log10_p for row in rows]
        family, _, term = name.partition(" + ")
        color = colors.get(family, LIGHT.ink)
        mean = statistics.fmean(x), statistics.fmean(y)
        for point in zip(x, y, strict=True):
            axes.plot(*zip(mean, point, strict=True), color=color, linewidth=0.6, alpha=0.4, zorder=2)
        axes.scatter(x, y, color=color, s=7, alpha=0.4, zorder=2, linewidths=0)
        # open without a term on what is retained
        fill = "full" if family in ("GradDiff", "RMU", *others) else fills.get(term, "full")
        shape: dict[str, Any] = {"marker": others.get(family) or markers[family], "fillstyle": fill, "linestyle": ""}
        axes.plot(*mean, color=color, markersize=8, markeredgewidth=1.4, zorder=3, label=name, **shape)
    axes.set_xlabel("model utility (harmonic mean of nine scores)")
    axes.set_ylabel("forget quality, log10 p (0 = like the retrained)")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8.5, labelcolor=LIGHT.ink)
    kept = io.BytesIO()
    # a palette: a third of the bytes
    colored = Image.open(io.BytesIO(png(drawing))).convert("RGB")
    colored.quantize(256, Image.Quantize.FASTOCTREE).save(kept, "png", optimize=True)
    return kept.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare unlearning methods on a small language model.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="seeds at the same time")
    parser.add_argument("--quick", action="store_true", help="one seed, half the authors; no result is kept")
    given = parser.parse_args()
    size = QUICK if given.quick else replace(Size(), seeds=given.seeds)
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(run, range(size.seeds), [size] * size.seeds))
    tables = f"{table(found)}\n", f"{sequence_table(found)}\n"
    print(*tables, sep="\n")
    if given.quick:
        return
    record = conditions("transformers") | {"model": LLAMA, "size": asdict(size), "runs": [asdict(f) for f in found]}
    (RESULTS / "unlearning_lm.json").write_text(json.dumps(record, indent=1) + "\n")
    for name, text in zip(("unlearning_lm", "unlearning_lm_requests"), tables, strict=True):
        (RESULTS / f"{name}.md").write_text(text)
    ASSETS.mkdir(exist_ok=True)
    (ASSETS / "unlearning-lm.png").write_bytes(figure(found))


if __name__ == "__main__":
    main()
