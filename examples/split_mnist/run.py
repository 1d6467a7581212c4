"""Split MNIST as in Hsu et al. 2018 ("Re-evaluating Continual Learning Scenarios", arXiv:1810.12488, table 2).

    python examples/split_mnist/run.py path/to/mnist

needs the four files of MNIST, as they are published (`train-images-idx3-ubyte`, ..., or the same with `.gz`). It writes
the arrays that the three configs beside it read into `data/split_mnist`, compares the methods in all scenarios, and
prints our accuracies beside those of the paper. Ten seeds of all methods take many hours; `--seeds 1` is a first look.
"""

from __future__ import annotations

import argparse
import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np

from lightning_cl.cli.compare import compare
from lightning_cl.metrics.record import read_records
from lightning_cl.report import summarise

HERE = Path(__file__).parent
SCENARIOS = ("task", "domain", "class")
# final average accuracy in per cent, Adam: task-, domain- and class-incremental
PAPER = {
    "finetune": (93.46, 55.16, 19.71),
    "l2": (98.18, 66.00, 22.52),
    "ewc": (97.70, 58.85, 19.80),
    "ewc-online": (98.04, 57.33, 19.77),
    "si": (98.56, 64.76, 19.67),
    "mas": (99.22, 68.57, 19.52),
    "lwf": (99.60, 71.02, 24.17),
    "gem": (98.42, 96.16, 92.20),
    "er": (99.57, 97.11, 95.59),
    "joint": (99.52, 98.59, 97.53),
}
# one module masks its head by the task of the whole batch, in which replayed samples would belong to other tasks
NOT_SERVED = {("task", "er"), ("task", "gem")}
MEAN, DEVIATION = 0.1000, 0.2752


def read_idx(folder: Path, name: str) -> np.ndarray:
    """Read a file of MNIST: a magic number whose last byte counts the dimensions, these, and the bytes."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            shape = np.frombuffer(data, dtype=">u4", count=data[3], offset=4)
            return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    raise SystemExit(f"{str(folder)!r} holds neither {name} nor {name}.gz.")


def prepare(mnist: Path, output: Path) -> None:
    """Write images, padded to 32 x 32 and normalised as in the paper, with digits, pairs of digits and their order."""
    output.mkdir(parents=True, exist_ok=True)
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images, digits = read_idx(mnist, f"{prefix}-images-idx3-ubyte"), read_idx(mnist, f"{prefix}-labels-idx1-ubyte")
        padded = np.pad(images, ((0, 0), (2, 2), (2, 2))).astype(np.float32) / 255
        np.save(output / f"{part}-images.npy", (padded - MEAN) / DEVIATION)
        np.save(output / f"{part}-digits.npy", digits.astype(np.int64))
        np.save(output / f"{part}-odd.npy", digits.astype(np.int64) % 2)
        np.save(output / f"{part}-pair.npy", digits.astype(np.int64) // 2)


def main(arguments: list[str] | None = None) -> None:
    """Prepare the data, run the comparisons and print them beside the paper's."""
    parser = argparse.ArgumentParser(description="Reproduce split MNIST of Hsu et al. 2018.")
    parser.add_argument("mnist", type=Path, help="folder with the four files of MNIST")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--methods", default=",".join(PAPER), help="of " + ", ".join(PAPER))
    parser.add_argument("--scenarios", default=",".join(SCENARIOS), help="of " + ", ".join(SCENARIOS))
    parser.add_argument("--output", type=Path, default=Path("runs/split_mnist"))
    given = parser.parse_args(arguments)
    methods, scenarios = given.methods.split(","), given.scenarios.split(",")
    for setting, names, known in (("methods", methods, tuple(PAPER)), ("scenarios", scenarios, SCENARIOS)):
        if unknown := set(names) - set(known):
            parser.error(f"--{setting} names {sorted(unknown)}; known are {', '.join(known)}")
    # where the configs look for it
    prepare(given.mnist, Path("data/split_mnist"))
    for scenario in scenarios:
        folder = given.output / scenario
        served = [method for method in methods if (scenario, method) not in NOT_SERVED]
        compare(HERE / f"{scenario}.yaml", methods=served, seeds=given.seeds, jobs=given.jobs, output=folder)
        found = {row.method: row.values for row in summarise(read_records([folder / name for name in served]))}
        print(f"\n{scenario}-incremental: final average accuracy in per cent\n{'method':<12}{'here':>16}{'paper':>8}")
        for method in served:
            accuracy = found[method]["average_accuracy"]
            here = replace(accuracy, mean=100 * accuracy.mean, std=100 * accuracy.std).text(2)
            print(f"{method:<12}{here:>16}{PAPER[method][SCENARIOS.index(scenario)]:>8.2f}")


if __name__ == "__main__":
    main()
