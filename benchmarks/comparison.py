"""All methods on three streams: ``python benchmarks/comparison.py --data data/clinc150/data_full.json [--quick]``.

The streams and the settings are those of ``examples/cli/methods_class.yaml`` and ``methods_domain.yaml`` (digits) and
``text.yaml`` (CLINC150; ``examples/cli/README.md`` says where its data is). The tables go to ``benchmarks/results``,
from where the documentation takes them. An idle machine with two cores takes about an hour.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

# before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import yaml

from lightning_cl.cli.compare import compare

CONFIGS = Path(__file__).parents[1] / "examples" / "cli"
RESULTS = Path(__file__).parent / "results"
STREAMS = {"class": "methods_class.yaml", "domain": "methods_domain.yaml", "clinc150": "text.yaml"}


def stream_config(stream: str, data: Path | None, folder: Path, *, epochs: int | None = None) -> tuple[Path, list[str]]:
    """Write the example's config with the data's path put in; return its place and its methods, bounds included."""
    text = (CONFIGS / STREAMS[stream]).read_text("utf-8")
    config = yaml.safe_load(text)
    settings = config["data"]["init_args"]
    if data is not None:
        for split in ("train", "val", "test"):
            settings[split]["init_args"]["path"] = str(data.resolve())
    if epochs is not None:
        settings["epochs_per_task"] = epochs
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "stream.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path, ["finetune", *config["methods"], "joint"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare all methods on digits and on CLINC150.")
    parser.add_argument("--data", type=Path, help="path of data_full.json, for the stream clinc150")
    parser.add_argument("--streams", default=",".join(STREAMS), help="of " + ", ".join(STREAMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs a task; results/ is left alone")
    parser.add_argument("--output", type=Path, default=Path("runs/comparison"), help="folder for runs and reports")
    given = parser.parse_args()
    streams = given.streams.split(",")
    if unknown := set(streams) - set(STREAMS):
        parser.error(f"--streams names {sorted(unknown)}; known are {', '.join(STREAMS)}")
    if "clinc150" in streams and (given.data is None or not given.data.is_file()):
        parser.error(f"--data={given.data} is no file; examples/cli/README.md says where to get it")
    for stream in streams:
        folder = given.output / stream
        data = given.data if stream == "clinc150" else None
        config, methods = stream_config(stream, data, folder, epochs=2 if given.quick else None)
        compare(config, methods=methods, seeds=1 if given.quick else given.seeds, jobs=given.jobs, output=folder)
        if not given.quick:
            (RESULTS / f"comparison-{stream}.md").write_text((folder / "table.md").read_text("utf-8"), "utf-8")


if __name__ == "__main__":
    main()
