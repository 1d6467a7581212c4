"""Process groups for benchmarks, each in new processes, and what they find."""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist


@dataclass
class Figure:
    """A measured ratio.

    Args:
        what: What was measured, and what it is compared with.
        ratio: The ratio that the bar is held against.
        bar: The most that ``ratio`` may be; ``None`` where it is only shown.
        details: What it was made of.
    """

    what: str
    ratio: float
    bar: float | None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        if self.bar is None:
            return ""
        return "pass" if self.ratio <= self.bar else "miss"


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call a function in a new process group; return what it returned on every rank, or end with its error."""
    # a process that has touched a GPU cannot be forked, and one that has not cannot be told apart
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.device_count() else "fork")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes, pipes = [], []
    for rank in range(world):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, world, port, theirs, function, arguments))
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    try:
        results: dict[int, Any] = {}
        while len(results) < world:
            for pipe in wait([pipe for rank, pipe in enumerate(pipes) if rank not in results]):
                # a rank that fails closes its pipe
                results[pipes.index(pipe)] = pipe.recv()
        for process in processes:
            process.join()
        return [results[rank] for rank in range(world)]
    except EOFError:
        sys.exit(f"{getattr(function, '__name__', function)} failed on a rank, see above.")
    finally:
        for process in processes:
            process.kill()


def _rank(
    rank: int, world: int, port: int, pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    # as torchrun does: Lightning then starts no process itself
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "benchmark",
    }
    quiet()
    try:
        torch.set_num_threads(1)
        if torch.cuda.is_available():
            torch.cuda.set_device(rank)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", rank=rank, world_size=world)
        pipe.send(function(*arguments))
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        pipe.close()
        os._exit(1)


def quiet() -> None:
    import transformers

    # said once for each of many models
    for name in ("lightning.pytorch", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")


def show(figure: Figure) -> None:
    bar = "" if figure.bar is None else f"{figure.bar:.2f}"
    numbers = []
    for name, value in figure.details.items():
        values = [f"{v:.4g}" for v in (value if isinstance(value, list) else [value]) if isinstance(v, float | int)]
        numbers.append(f"{name} {' '.join(values) or value}")
    print(f"{figure.what:<60} {figure.ratio:>7.3f} {bar:>5} {figure.verdict:<4}  {', '.join(numbers)}", flush=True)


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value
