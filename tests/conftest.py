"""Fixtures that keep the tests apart from each other.

What Lightning and torch are known to leave behind is taken back without a word; what our own code leaves behind
fails the test that did it.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import numpy as np
import pytest
import torch
import torch.distributed as dist
import tqdm
from lightning.pytorch.utilities.rank_zero import rank_zero_only

torch.set_num_threads(1)
tqdm.tqdm.monitor_interval = 0  # no thread of its own for a progress bar

HOST_VARIABLES = {
    "CUBLAS_WORKSPACE_CONFIG",  # Trainer(deterministic=True)
    "PL_GLOBAL_SEED",  # seed_everything
    "PL_SEED_WORKERS",
    "MASTER_ADDR",  # DDP on one process
    "MASTER_PORT",
    "WORLD_SIZE",
    "NODE_RANK",
    "LOCAL_RANK",
    "KMP_DUPLICATE_LIB_OK",  # torch
    "KMP_INIT_AT_FORK",
    "TORCHINDUCTOR_CACHE_DIR",  # torch.compile
    "TRITON_CACHE_DIR",
    "PYTEST_CURRENT_TEST",
    "PYTEST_VERSION",
}
HOST_THREADS = (
    "child-process-observer",  # Lightning's launcher; a daemon that ends by itself
    "fsspecIO",  # one for the life of the process, started by the first remote file system
)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def temporary_working_directory(tmp_path: Path) -> Iterator[None]:
    """Logs and checkpoints of a Trainer without a folder stay out of the repository."""
    # without `monkeypatch`, which would then be undone after the fixtures below have looked
    previous = Path.cwd()
    os.chdir(tmp_path)
    yield
    os.chdir(previous)


@pytest.fixture(autouse=True)
def no_environment_leak() -> Iterator[None]:
    """Fails a test that sets, changes or removes an environment variable for good."""
    before = dict(os.environ)
    yield
    changed = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
    for name in changed - {"PYTEST_CURRENT_TEST"}:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]
    leaked = changed - HOST_VARIABLES
    assert not leaked, f"the test changed environment variables: {sorted(leaked)}"


@pytest.fixture(autouse=True)
def no_thread_or_process_leak() -> Iterator[None]:
    """Fails a test that leaves a thread or a child process running."""
    threads, children = set(threading.enumerate()), set(multiprocessing.active_children())
    yield
    new_threads = [t for t in threading.enumerate() if t not in threads and not t.name.startswith(HOST_THREADS)]
    new_children = [c for c in multiprocessing.active_children() if c not in children]
    if new_threads or new_children:
        gc.collect()  # the workers of a loader end with the last reference to its iterator
    for runner in (*new_threads, *new_children):
        runner.join(timeout=5)
    running = [runner.name for runner in (*new_threads, *new_children) if runner.is_alive()]
    for child in new_children:
        child.kill()
    assert not running, f"the test left running: {running}"


def torch_state() -> dict[str, object]:
    """Return the process-wide settings of torch that no test may change for good."""
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "matmul precision": torch.get_float32_matmul_precision(),
    }


@pytest.fixture(autouse=True)
def no_torch_state_leak() -> Iterator[None]:
    """Fails a test that leaves torch with other settings than it found."""
    before = torch_state()
    yield
    # Trainer(deterministic=True) sets the first and never takes it back
    torch.use_deterministic_algorithms(False)
    after = torch_state()
    torch.set_default_dtype(before["default dtype"])
    torch.set_default_device(before["default device"])
    torch.set_grad_enabled(before["grad mode"])
    torch.set_num_threads(before["threads"])
    torch.set_float32_matmul_precision(before["matmul precision"])
    assert after == before, "the test changed torch for the tests after it"


@pytest.fixture(autouse=True)
def host_state_restored() -> Iterator[None]:
    """Takes back what Lightning keeps for the process: the process group, the rank and signal handlers."""
    rank = rank_zero_only.rank
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()
    rank_zero_only.rank = rank
    for number, handler in handlers.items():
        signal.signal(number, handler)
