"""Two hosts on one machine: network namespaces with a cable between them, and torchrun in each."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from torch.distributed.run import main as torchrun

JOB = Path(__file__).with_name("node_job.py")
ADDRESSES = ("10.0.0.1", "10.0.0.2")  # no other machine is in reach of the namespaces
CABLE = "cable"  # the interface on both hosts
PREFIX = "lightning-cl-"
FIRST_PORT = 29400
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_fork = multiprocessing.get_context("fork")


def ip(*arguments: str) -> str:
    """Run the command of iproute2."""
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def why_not() -> str | None:
    """Return why this machine cannot have two hosts, or ``None`` if it can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the command `ip` of iproute2 is missing"
    name = f"{PREFIX}{os.getpid()}-probe"
    try:
        ip("netns", "add", name)
        try:
            ip("-n", name, "link", "add", CABLE, "type", "veth", "peer", "name", "other")
            ip("netns", "exec", name, "true")
        finally:
            ip("netns", "delete", name)
    except subprocess.CalledProcessError as error:
        return f"the kernel makes no network namespaces here: {error.stderr.strip()}"
    return None


class Hosts:
    """Two hosts, each with its own network, and the file system in common."""

    def __init__(self) -> None:
        reason = why_not()
        if reason is not None:
            pytest.skip(f"two nodes are NOT TESTED: {reason}")
        _remove_left_over()
        self.names = [f"{PREFIX}{os.getpid()}-{host}" for host in range(2)]
        self._launches: list[Launch] = []
        try:
            for name in self.names:
                ip("netns", "add", name)
            first, second = self.names
            ip("-n", first, "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", second)
            for name, address in zip(self.names, ADDRESSES, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
                for interface in ("lo", CABLE):
                    ip("-n", name, "link", "set", interface, "up")
        except BaseException:
            self.close()
            raise

    def cut(self) -> None:
        """Pull the cable: packets are lost without a word, connections stay."""
        ip("-n", self.names[1], "link", "set", CABLE, "down")

    def mend(self) -> None:
        """Put the cable back."""
        ip("-n", self.names[1], "link", "set", CABLE, "up")

    def launch(self, root: Path, *arguments: str, max_restarts: int = 0) -> Launch:
        """Start torchrun on both hosts, with the job in a folder that both see.

        It is torchrun's own function in a forked process, which in turn forks those of the job: they need not import
        anything, which would take most of the time.

        Args:
            root: The folder.
            *arguments: For the job.
            max_restarts: How often torchrun starts the processes again.
        """
        root.mkdir(exist_ok=True)
        port = FIRST_PORT + len(self._launches)
        self._launches.append(Launch(self.names, port, root, arguments, max_restarts))
        return self._launches[-1]

    def close(self) -> None:
        """End all that runs on the hosts, and the hosts."""
        for launch in self._launches:
            launch.kill()
        for name in self.names:
            _remove(name)


class Launch:
    """A torchrun on each host."""

    def __init__(
        self, names: Sequence[str], port: int, root: Path, arguments: Sequence[str], max_restarts: int
    ) -> None:
        self._root = root
        self._processes = []
        for host, (name, address) in enumerate(zip(names, ADDRESSES, strict=True)):
            line = ["--nnodes=2", "--nproc-per-node=1", f"--local-addr={address}", f"--max-restarts={max_restarts}"]
            if max_restarts:
                line += ["--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:{port}", "--rdzv-id=test"]
                line += [f"--rdzv-conf=is_host={int(host == 0)}"]
            else:
                line += [f"--master-addr={ADDRESSES[0]}", f"--master-port={port}", f"--node-rank={host}"]
            line += ["--run-path", "--start-method=fork", str(JOB), str(root), *arguments]
            process = _fork.Process(target=_host, args=(name, line, self.log_file(host)))
            process.start()
            self._processes.append(process)

    def log_file(self, host: int) -> Path:
        """Return where a host writes what a user sees."""
        return self._root / f"host-{host}.log"

    def log(self, host: int) -> str:
        """Return what a user sees on a host."""
        return self.log_file(host).read_text()

    def wait(self, seconds: float = 100) -> list[int | None]:
        """Wait for both hosts; return how torchrun ended on each, ``None`` where it runs on."""
        deadline = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(0, deadline - time.monotonic()))
        return [process.exitcode for process in self._processes]

    def kill(self) -> None:
        """End it at once, with all of its processes."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()


def _host(name: str, line: list[str], log: Path) -> None:
    """Become a host's torchrun."""
    os.setpgid(0, 0)
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(stream, standard)
    for variable in ("WORLD_SIZE", "LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(variable, None)
    os.environ.update(GLOO_SOCKET_IFNAME=CABLE, OMP_NUM_THREADS="1")
    # otherwise ranks that start again find each other's old addresses
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    sys.stdout, sys.stderr = (os.fdopen(standard, "w", buffering=1, closefd=False) for standard in (1, 2))
    warnings.resetwarnings()  # pytest's filters are not those of a user
    _enter(name)
    torchrun(line)


def _enter(name: str) -> None:
    """Move this process into a network namespace; ``os.setns`` came with Python 3.12."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{name}") as namespace:
        if libc.setns(namespace.fileno(), _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name!r}")


def _remove(name: str) -> None:
    with contextlib.suppress(subprocess.CalledProcessError):
        for process in ip("netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        ip("netns", "delete", name)


def _remove_left_over() -> None:
    """Remove the hosts of test runs that died."""
    for line in ip("netns", "list").splitlines():
        name = line.split()[0]
        owner = name.removeprefix(PREFIX).split("-")[0]
        if name.startswith(PREFIX) and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            _remove(name)


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Two hosts for as long as the context lasts."""
    hosts = Hosts()
    try:
        yield hosts
    finally:
        hosts.close()
