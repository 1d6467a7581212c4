"""Sharded and quantized language models against a plain torch loop: ``python benchmarks/sharded.py [--quick]``.

Both sides stand in the same processes, on two ranks with gloo on a CPU or on all GPUs with nccl, and take turns of a
few steps each (A B A B ...). The median of the ratios of neighbouring turns is shown, by the processor time of all
ranks and by the clock of the slowest; the bar is held against the processor time on a CPU, which other processes move
less, and against the clock on GPUs. Both sides must end at the same weights. Memory and loading are measured in new
processes. On a CPU that needs Linux, to read the peak of memory.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

# before torch is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

import torch
import torch.distributed as dist
from processes import Figure, on_ranks, quiet, rounded, show
from sharded_memory import loading, memories
from sharded_workloads import (
    SIDES,
    SMALL,
    Boundary,
    Pace,
    Relay,
    Size,
    fit,
    language_model,
    root_device,
    stream,
    write_checkpoint,
)

from lightning_cl import EWC, ExperienceReplay

RESULTS = Path(__file__).parent / "results" / "sharded.json"
WARM = 2

# A step of the first takes about a second of a core; that of the second shows what a step costs that computes nothing.
CPU = Size(512, 1408, 4, (8, 4), 4096, (2, 256))
STORED = Size(1024, 2816, 8, (8, 4), 2048, (1, 16), "bfloat16")
# by billions of weights; for each a turn of some steps, so that to wait for the GPU at its end counts little
GPU = {
    8: Size(4096, 14336, 32, (32, 8), 32000, (2, 1024), "bfloat16", lap=4),
    3: Size(3072, 8192, 28, (24, 8), 32000, (2, 1024), "bfloat16", lap=4),
    1: Size(2048, 5632, 22, (32, 4), 32000, (2, 1024), "bfloat16", lap=4),
}


# ---------------------------------------------------------------------- time


def timed(what: str, relay: Relay, bar: float | None, tokens: int) -> Figure:
    """Let two runs take turns, base first; ``tokens`` are those of a turn on all ranks."""
    pairs = list(zip(*relay.go(), strict=True))
    on_gpu = torch.cuda.is_available()
    ratios = [run.wall / base.wall if on_gpu else run.cpu / base.cpu for base, run in pairs]
    quartiles = statistics.quantiles(ratios, n=4)
    walls = [statistics.median(costs[i].wall for costs in pairs) for i in (0, 1)]
    return Figure(
        what,
        statistics.median(ratios),
        bar,
        {
            "held": "clock" if on_gpu else "cpu",
            "cpu": statistics.median(run.cpu / base.cpu for base, run in pairs),
            "clock": statistics.median(run.wall / base.wall for base, run in pairs),
            "quartiles": [quartiles[0], quartiles[2]],
            "turns": len(pairs),
            "base_cpu_s": statistics.median(base.cpu for base, _ in pairs),
            "tokens_per_second": [tokens / wall for wall in walls],
        },
    )


def against_a_loop(folder: str, size: Size, quantized: bool, turns: int, what: str, bar: float | None) -> Figure:
    """Compare the library with a loop of torch that ends at the same weights."""
    warm = WARM * size.lap
    how = {"folder": folder, "size": size, "quantized": quantized, "steps": warm + (turns + 1) * size.lap, "warm": warm}
    relay = Relay(*(functools.partial(side, **how) for side in SIDES.values()))
    figure = timed(what, relay, bar, size.tokens * size.lap * dist.get_world_size())
    figure.details["largest_difference_of_weights"] = check_equal(*relay.results, size)
    return figure


def check_equal(loop: dict[str, Any], library: dict[str, Any], size: Size) -> float:
    """Raise unless both sides trained the same parameters to the same values; return the largest difference."""
    assert loop.keys() == library.keys(), loop.keys() ^ library.keys()
    tolerance = 1e-5 if size.dtype == "float32" else 2e-2
    for name, weight in loop.items():
        torch.testing.assert_close(library[name], weight, rtol=tolerance, atol=tolerance)
        assert "lora_B" not in name or not weight.numel() or weight.any(), f"{name} did not train"
    return max(float((library[name] - weight).abs().max()) for name, weight in loop.items() if weight.numel())


def second_task(
    boundary: Boundary, folder: str, size: Size, turns: int, rows: int, callback: Any = None
) -> dict[str, Any]:
    """Train adapters in 4 bits over two tasks, of which the turns of the second count."""
    first, warm = 2 * size.lap, WARM * size.lap
    pace = Pace(boundary, size.lap, first + warm)
    tasks = [first, warm + (turns + 1) * size.lap]
    fit(language_model(folder, size, True), stream(size, tasks, rows), [pace, *([callback] if callback else [])])
    return pace.weights


def ewc(folder: str, size: Size, turns: int) -> Figure:
    """Compare steps with the penalty on the adapters with steps without."""
    callback = EWC(1.0, n_samples=2 * dist.get_world_size())
    run = functools.partial(second_task, folder=folder, size=size, turns=turns, rows=size.batch[0])
    relay = Relay(run, functools.partial(run, callback=callback))
    figure = timed("EWC on the adapters / without", relay, 1.03, size.tokens * size.lap * dist.get_world_size())
    without, protected = relay.results
    assert any(not torch.equal(without[name], protected[name]) for name in without), "the penalty did not act"
    return figure


def replay(folder: str, size: Size, turns: int) -> Figure:
    """Compare batches of which half is replayed with plain batches of as many tokens."""
    rows = size.batch[0]
    callback = ExperienceReplay(64 * rows * dist.get_world_size())
    run = functools.partial(second_task, folder=folder, size=size, turns=turns)
    relay = Relay(functools.partial(run, rows=rows), functools.partial(run, rows=rows // 2, callback=callback))
    tokens = size.tokens * size.lap * dist.get_world_size()
    figure = timed("replay: a token / a token without", relay, 1.03, tokens)
    assert len(callback.buffer) > 0, "nothing was stored"
    return figure


# ---------------------------------------------------------------------- the whole


def facts() -> dict[str, Any]:
    """Return what a rank runs on."""
    if torch.cuda.is_available():
        properties: Any = torch.cuda.get_device_properties(root_device())
        return {"device": properties.name, "memory_GB": properties.total_memory / 1e9, "cuda": torch.version.cuda}
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {"device": names[0] if names else platform.processor(), "cores": os.cpu_count()}


def sizes(device: dict[str, Any], world: int, quick: bool) -> dict[str, Size]:
    """Return what is trained: adapters on 4 bits, all weights, and what is loaded."""
    if "memory_GB" not in device:
        tune = Size(256, 704, 4, (4, 2), 1024, (2, 128)) if quick else CPU
        stored = replace(STORED, blocks=3) if quick else STORED
        return {"adapters": tune, "all weights": tune, "stored": stored}
    # two models at a time in 4 bits, with activations of one
    large = next((GPU[billions] for billions in GPU if 9 * billions <= device["memory_GB"]), GPU[1])
    # weights, gradients and two moments in bfloat16, twice
    whole = next((GPU[b] for b in GPU if 20 * b + 20 <= world * device["memory_GB"]), GPU[1])
    return {"adapters": large, "all weights": whole, "stored": large}


def measure(world: int, quick: bool) -> tuple[list[Figure], dict[str, Any]]:
    device = on_ranks(1, facts)[0]
    chosen = sizes(device, world, quick)
    turns = 5 if quick else 12
    figures: list[Figure] = []

    def add(found: Figure | list[Figure]) -> None:
        for figure in found if isinstance(found, list) else [found]:
            figures.append(figure)
            show(figure)

    with tempfile.TemporaryDirectory() as root:
        folders: dict[Size, str] = {}
        for size in {SMALL, *chosen.values()}:
            folders[size] = str(Path(root) / str(len(folders)))
            on_ranks(1, write_checkpoint, size, folders[size])
        small = folders[SMALL]
        for what, quantized in (("adapters", True), ("all weights", False)):
            size = chosen[what]
            for each, name, bar, count in ((size, "", 1.05, turns), (SMALL, " of a tiny model", None, 4 * turns)):
                title = f"{what}{name}, a step: CausalLM / torch loop"
                add(on_ranks(world, against_a_loop, folders[each], each, quantized, count, title, bar)[0])
            add(memories(world, folders[size], small, size, quantized, what))
        tuned = chosen["adapters"]
        add(on_ranks(world, ewc, folders[tuned], tuned, turns)[0])
        add(on_ranks(world, replay, folders[tuned], tuned, turns)[0])
        add(loading(world, folders[chosen["stored"]], small, chosen["stored"], 1 if quick else 2))
    machine = device | {"ranks": world, "billions": {what: size.weights() / 1e9 for what, size in chosen.items()}}
    return figures, machine


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure sharded training of language models, as ratios.")
    parser.add_argument("--quick", action="store_true", help="a smaller model and few turns; prints, writes no file")
    parser.add_argument("--devices", type=int, help="ranks: all GPUs, or 2 on a CPU, unless given")
    arguments = parser.parse_args()
    quiet()
    start, load_average = time.perf_counter(), os.getloadavg()
    figures, machine = measure(arguments.devices or torch.cuda.device_count() or 2, arguments.quick)
    if arguments.quick:
        return
    packages = ("torch", "lightning", "transformers", "peft", "bitsandbytes", "lightning-cl")
    record = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "machine": machine,
        "load_average": {"before": load_average, "after": os.getloadavg()},
        "seconds": time.perf_counter() - start,
        "figures": [
            {"what": f.what, "ratio": f.ratio, "bar": f.bar, "verdict": f.verdict, **f.details} for f in figures
        ],
    }
    RESULTS.write_text(json.dumps(rounded(record), indent=2) + "\n")


if __name__ == "__main__":
    main()
