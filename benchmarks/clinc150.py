"""CLINC150 as 15 tasks of 10 intents: ``python benchmarks/clinc150.py --data data/clinc150/data_full.json [--quick]``.

The stream, the network and the settings of the methods are those of ``examples/cli/text.yaml``; the README beside it
says where the data is. Fine-tuning, EWC, replay and joint training with three seeds take about five minutes on an idle
core.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

# before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import yaml

from lightning_cl.cli.compare import compare
from lightning_cl.metrics.record import RunRecord, read_records
from lightning_cl.report import format_table, summarise

CONFIG = Path(__file__).parents[1] / "examples" / "cli" / "text.yaml"
RESULTS = Path(__file__).parent / "results" / "clinc150.json"
METHODS = ["finetune", "ewc", "er", "joint"]


def stream_config(data: Path, *, epochs: int | None = None) -> dict[str, Any]:
    """Return the example's config with the data's path put in."""
    config = yaml.safe_load(CONFIG.read_text("utf-8"))
    stream = config["data"]["init_args"]
    for split in ("train", "val", "test"):
        stream[split]["init_args"]["path"] = str(data.resolve())
    if epochs is not None:
        stream["epochs_per_task"] = epochs
    return config


def run(config: dict[str, Any], seeds: int, folder: Path) -> list[RunRecord]:
    """Run all methods; print their table and write the report into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = folder / "stream.yaml"
    stream.write_text(yaml.safe_dump(config, sort_keys=False))
    compare(stream, methods=METHODS, seeds=seeds, output=folder)
    return read_records([folder / method for method in METHODS])


def write(records: list[RunRecord], config: dict[str, Any], path: Path) -> None:
    """Write the means and deviations over the seeds, and the table as Markdown beside them."""
    # time and memory are not compared here: runs far apart in time share the machine with others (see overhead.py)
    rows = summarise([replace(record, train_seconds=None, peak_memory_mib=None) for record in records])
    result = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("torch", "lightning", "lightning-cl")},
        "methods": config["methods"],
        "epochs_per_task": config["data"]["init_args"]["epochs_per_task"],
        "results": {row.method: {k: asdict(value) for k, value in row.values.items() if value.n} for row in rows},
    }
    text = json.dumps(result, indent=2, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    path.with_suffix(".md").write_text(
        "# CLINC150, class-incremental: 15 tasks of 10 intents\n\n"
        "Written by `benchmarks/clinc150.py`: mean ± standard deviation over three seeds.\n\n"
        f"```\n{format_table(rows)}\n```\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare methods on the class-incremental CLINC150 stream.")
    parser.add_argument("--data", type=Path, required=True, help="path of data_full.json")
    parser.add_argument("--quick", action="store_true", help="one seed, four epochs a task; results/ is left alone")
    parser.add_argument("--output", type=Path, default=Path("runs/clinc150"), help="folder for runs and report")
    arguments = parser.parse_args()
    if not arguments.data.is_file():
        parser.error(f"there is no file {str(arguments.data)!r}; examples/cli/README.md says where to get it")
    config = stream_config(arguments.data, epochs=4 if arguments.quick else None)
    records = run(config, 1 if arguments.quick else 3, arguments.output)
    if not arguments.quick:
        write(records, config, RESULTS)


if __name__ == "__main__":
    main()
