"""Several ranks for tests: real processes with a gloo process group, and processes that can be killed.

Children are forked, so they start with everything imported, in milliseconds. A group serves any number of calls.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

_fork = multiprocessing.get_context("fork")
_TIMEOUT = 120


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def torchrun_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Return what torchrun sets for a rank: Lightning then starts no process itself."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }


def _prepare(rank: int, world_size: int, port: int) -> None:
    # a process group that the parent left to its garbage collector must not be deleted here: it would wait for threads
    # that a fork does not copy
    gc.freeze()
    torch.set_num_threads(1)
    if world_size > 1:
        os.environ.update(torchrun_environment(rank, world_size, port))


def _serve(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    _prepare(rank, world_size, port)
    os.environ.update(torchrun_environment(rank, world_size, port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    while (job := pipe.recv()) is not None:
        function, arguments = job
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """A process group that runs functions on all of its ranks."""

    def __init__(self, world_size: int) -> None:
        port = free_port()
        self.world_size = world_size
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            ours, theirs = _fork.Pipe()
            process = _fork.Process(target=_serve, args=(rank, world_size, port, theirs), daemon=False)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call a module-level function on every rank; return the results in rank order, or raise with the traceback."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(_TIMEOUT):
                self.kill()
                raise TimeoutError(f"rank {rank} did not answer within {_TIMEOUT} s")
            good, value = pipe.recv()
            if not good:
                self.kill()
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            results.append(value)
        return results

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(_TIMEOUT)

    def kill(self) -> None:
        """End the processes at once."""
        for process in self._processes:
            process.kill()
            process.join()


def _call(rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    _prepare(rank, world_size, port)
    function(*arguments)


def exit_codes(function: Callable[..., Any], *arguments: Any, world_size: int = 1) -> list[int | None]:
    """Run a function in fresh processes that may die, and return how each of them ended (-9: killed by SIGKILL)."""
    port = free_port()
    processes = [
        _fork.Process(target=_call, args=(rank, world_size, port, function, arguments)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + _TIMEOUT
    # `join` would also wait for the workers that a killed process leaves behind
    while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]
