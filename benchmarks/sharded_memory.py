"""Memory of sharded training, and loading of quantized models: time and memory."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import Figure, on_ranks
from sharded_workloads import (
    NF4,
    SIDES,
    SMALL,
    Peak,
    Size,
    fit,
    language_model,
    root_device,
    stream,
    synchronize,
)
from workloads import Cost

from lightning_cl.core.state import local
from lightning_cl.modules import CausalLM
from lightning_cl.quantization import CheckpointReader, quantization_bytes, quantize_base

# ---------------------------------------------------------------------- memory


def memory(side: str, folder: str, small: str, size: Size, quantized: bool) -> dict[str, float]:
    """Return the peaks of one side: until the first step, and in the steps; in bytes above what the imports take."""

    def nothing(_: bool) -> None:
        pass

    # imports, tables and buffers that come with a first step
    SIDES[side](nothing, small, SMALL, quantized, 2, 0)
    peak, peaks, start = Peak(), [], time.perf_counter()

    def boundary(_: bool) -> None:
        if not peaks:
            peaks.append((peak.restart(), time.perf_counter() - start))

    SIDES[side](boundary, folder, size, quantized, 3 * size.lap, 0)
    return {"setup": peaks[0][0], "setup_s": peaks[0][1], "steps": peak.restart()}


def memories(world: int, folder: str, small: str, size: Size, quantized: bool, what: str) -> list[Figure]:
    """Compare the peaks of the largest rank."""
    loop, library = (
        {name: max(rank[name] for rank in ranks) for name in ranks[0]}
        for ranks in (on_ranks(world, memory, side, folder, small, size, quantized) for side in SIDES)
    )
    return [
        Figure(
            f"{what}, peak memory {part}: CausalLM / torch loop",
            library[name] / loop[name],
            1.05 if name == "steps" else None,
            {"MB": [loop[name] / 1e6, library[name] / 1e6]},
        )
        for part, name in (("of steps", "steps"), ("until the first step", "setup"))
    ]


# ---------------------------------------------------------------------- loading


class TimedLoading(CausalLM):
    """Notes what filling costs, and the peak of memory until training starts."""

    peak: Peak
    held = 0
    highest = 0
    cost = Cost(0.0, 0.0)

    def configure_model(self) -> None:
        super().configure_model()
        self.peak = Peak()

    def fill_weights(self, name: str, block: Any, device: torch.device) -> None:
        start = Cost.now()
        super().fill_weights(name, block, device)
        synchronize()
        taken = Cost.now() - start
        self.cost = Cost(self.cost.wall + taken.wall, self.cost.cpu + taken.cpu)

    def on_train_start(self) -> None:
        self.highest = self.peak.restart()
        self.held = sum(local(parameter.detach()).nbytes for parameter in self.parameters())
        self.held += quantization_bytes(self)["state"]


def load(folder: str, small: str, size: Size) -> dict[str, Any]:
    """Return what it costs to read the files plainly and to load them in 4 bits, and the peak with its bound."""
    fit(language_model(small, SMALL, True), stream(SMALL, [1], 1), [])
    files = sorted(Path(folder).glob("*.safetensors"))
    # of the first, pages may come from the disk
    read = _median([_read(files) for _ in range(4)][1:])
    quantize = _median([_quantize(size) for _ in range(3)])
    module: Any = language_model(folder, size, True, TimedLoading)
    fit(module, stream(size, [1], 1), [])
    reader = CheckpointReader(folder)
    block = sum(reader.nbytes(name) for name in reader.names("model.layers.0"))
    total = sum(reader.nbytes(name) for name in reader.names())
    return {
        "bytes": total,
        "read": read,
        "quantize": quantize * size.blocks,
        "load": module.cost,
        "peak": module.highest,
        # embeddings and the output layer are one unit
        "bound": module.held + max(block, total - block * size.blocks),
    }


def _median(costs: list[Cost]) -> Cost:
    return Cost(statistics.median(cost.wall for cost in costs), statistics.median(cost.cpu for cost in costs))


def _read(files: list[Path]) -> Cost:
    buffer = bytearray(2**24)
    dist.barrier()
    start = Cost.now()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return Cost.now() - start


def _quantize(size: Size) -> Cost:
    """Return what bitsandbytes takes to pack a block that stands in memory."""
    from transformers import AutoModelForCausalLM

    config, device, dtype = size.config(), root_device(), getattr(torch, size.dtype)
    config.num_hidden_layers = 1
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)
    synchronize()
    start = Cost.now()
    quantize_base(model, compute_dtype=dtype, **NF4)
    synchronize()
    return Cost.now() - start


def loading(world: int, folder: str, small: str, size: Size, turns: int) -> list[Figure]:
    """Compare loading with reading, and its peak with the rank's shard and one unit in full precision."""
    ranks = [rank for _ in range(turns) for rank in on_ranks(world, load, folder, small, size)]
    held = "wall" if torch.cuda.device_count() else "cpu"

    def seconds(rank: dict[str, Any], *names: str) -> float:
        return sum(getattr(rank[name], held) for name in names)

    speed = {
        f"{name}_MB_per_s": statistics.median(rank["bytes"] / rank[name].wall for rank in ranks) / 1e6
        for name in ("read", "quantize", "load")
    }
    details = {"held": "clock" if held == "wall" else held, "file_MB": ranks[0]["bytes"] / 1e6, "turns": turns, **speed}
    parts = [seconds(rank, "load") / seconds(rank, "read", "quantize") for rank in ranks]
    reads = [rank["load"].wall / rank["read"].wall for rank in ranks]
    worst = max(ranks, key=lambda rank: rank["peak"] / rank["bound"])
    return [
        Figure("loading in 4 bits / reading the files", statistics.median(reads), None, {"pages": "cached, for both"}),
        Figure("loading in 4 bits / reading and quantizing", statistics.median(parts), 1.10, details),
        Figure(
            "loading, peak memory / shard and one full unit",
            worst["peak"] / worst["bound"],
            1.10,
            {"MB": [worst["bound"] / 1e6, worst["peak"] / 1e6]},
        ),
    ]
