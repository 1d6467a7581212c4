"""Adapter methods on a language model with a 4-bit base: ``python benchmarks/adapter_lm.py [--quick]``.

A small Llama learns a mixture of three domains for a short while: Python's standard library, the documentation of the
language and the C++ headers of torch, which stand on every machine that runs this. Its linear layers are packed as NF4,
and it learns the domains one after the other by LoRA. An idle machine with two cores takes about five minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import spike_runs
from lightning.pytorch import Callback
from measuring import be_quiet, conditions
from processes import quiet
from spike_runs import BLOCK, DOMAINS, LLAMA, write_texts
from workloads import quiet_trainer

from lightning_cl.adapters import AdapterSlots, OLoRA
from lightning_cl.callbacks import ContinualMetrics, ExperienceReplay
from lightning_cl.datamodules import Joint, PackedTextSource, Predefined, TaskStreamDataModule
from lightning_cl.modules import CausalLM
from lightning_cl.report import Statistic

RESULTS = Path(__file__).parent / "results"
RANK = 8
LORA = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
SLOTS = RANK * len(DOMAINS)
ARMS: dict[str, Callable[[int], list[Callback]]] = {
    "sequential": lambda seed: [],
    "adapter-slots": lambda seed: [AdapterSlots(SLOTS, seed=seed)],
    "o-lora": lambda seed: [OLoRA(form="cosine", strength=1.0, capacity=SLOTS, seed=seed)],
    "replay": lambda seed: [ExperienceReplay(96, seed=seed)],
}


@dataclass(frozen=True)
class Size:
    """How much is run: steps of the base and of a task, sequences of a step, validation blocks of a domain, seeds."""

    base_steps: int = 250
    steps: int = 80
    batch: int = 8
    val_blocks: int = 24
    seeds: int = 3


QUICK = Size(base_steps=20, steps=5, val_blocks=4, seeds=1)


@dataclass(frozen=True)
class Run:
    """What a run gave: perplexities of a byte before the first task and after each (rows), by domain (columns)."""

    arm: str
    seed: int
    perplexity: list[list[float]]


def stream(folder: Path, size: Size, seed: int, *, joint: bool = False) -> TaskStreamDataModule:
    """Return the domains, one after the other or at once."""
    source = partial(PackedTextSource, block_size=BLOCK, across_documents=True, drop_tails=True, cache_dir=folder)
    scenario = Predefined(list(DOMAINS))
    return TaskStreamDataModule(
        [source(str(folder / f"{name}.train.jsonl")) for name in DOMAINS],
        [source(str(folder / f"{name}.val.jsonl"), max_tokens=BLOCK * size.val_blocks) for name in DOMAINS],
        scenario=Joint(scenario) if joint else scenario,
        batch_size=size.batch,
        steps_per_task=size.base_steps if joint else size.steps,
        seed=seed,
        evaluate="all",
    )


def train_base(folder: Path, size: Size) -> None:
    """Write the domains' texts, and the language model that has read a mixture of them."""
    write_texts(folder, spike_runs.Settings())
    module = CausalLM(LLAMA, learning_rate=2e-3, warmup=0.1)
    trainer = quiet_trainer(default_root_dir=folder)
    trainer.fit(module, datamodule=stream(folder, size, 0, joint=True))
    module.network.save_pretrained(folder / "base")


def train(folder: Path, size: Size, arm: str, seed: int) -> Run:
    """Let the packed base learn the domains in order."""
    be_quiet()
    quiet()
    metrics = ContinualMetrics("val_perplexity", mode="min", baseline=True)
    settings: dict[str, Any] = {"adapter": LORA, "quantization": {"mode": "nf4"}, "seed": seed}
    module = CausalLM(str(folder / "base"), tokenizer="bytes", learning_rate=3e-3, warmup=0.1, **settings)
    with tempfile.TemporaryDirectory() as directory:
        trainer = quiet_trainer(callbacks=[*ARMS[arm](seed), metrics], default_root_dir=directory)
        trainer.fit(module, datamodule=stream(folder, size, seed))
    return Run(arm, seed, [metrics.state_dict()["baseline"], *metrics.matrix.tolist()])


def table(runs: list[Run]) -> str:
    """Lay out means over the seeds, with half the widths of their 95 % intervals at the end."""
    lines = [f"| arm | after | {' | '.join(DOMAINS)} | mean |", f"|---|---|{'---|' * (len(DOMAINS) + 1)}"]

    def cells(rows: list[list[float]]) -> str:
        values = [Statistic.of(column) for column in zip(*rows, strict=True)]
        values.append(Statistic.of(map(statistics.fmean, rows)))
        return " | ".join(Statistic(v.mean, v.interval(), v.n).text(2) for v in values)

    before = [run.perplexity[0] for run in runs]
    lines.append(f"| the packed base | – | {cells(before[:1])} |")
    for arm in ARMS:
        found = [run.perplexity for run in runs if run.arm == arm]
        for task, name in enumerate(DOMAINS, start=1):
            lines.append(f"| `{arm}` | {name} | {cells([matrix[task] for matrix in found])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare adapter methods on a language model with a 4-bit base.")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps; no result is kept")
    given = parser.parse_args()
    be_quiet()
    quiet()
    size = QUICK if given.quick else Size()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        train_base(folder, size)
        with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
            waiting = [pool.submit(train, folder, size, arm, seed) for arm, seed in product(ARMS, range(size.seeds))]
            runs = [each.result() for each in waiting]
    print(table(runs))
    if not given.quick:
        record = conditions("peft", "transformers", "bitsandbytes") | {"model": LLAMA, "size": asdict(size)}
        record["runs"] = [asdict(run) for run in runs]
        (RESULTS / "adapter_lm.json").write_text(json.dumps(record, indent=2) + "\n")
        (RESULTS / "adapter_lm.md").write_text(table(runs))


if __name__ == "__main__":
    main()
