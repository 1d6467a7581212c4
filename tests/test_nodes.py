"""Several nodes: two network namespaces as hosts, torchrun in each, and what happens to real clusters."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.distributed_c10d import _world

import node_job
from killed import KILLED
from lightning_cl import EWC, FSDP2Strategy
from lightning_cl.strategies.checkpoint import is_complete
from node_job import STEPS, fit
from nodes import Hosts, two_hosts
from ranks import exit_codes, torchrun_environment
from toys import ToyModule, toy_stream, trainer

pytestmark = pytest.mark.distributed
IN_SECOND_TASK = 8
CLUSTER = Path(__file__).parents[1] / "examples" / "cluster"


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Two hosts for all tests of this file."""
    with two_hosts() as made:
        yield made


def fit_on_this_rank(root: Path) -> None:
    """The job on one host with as many processes as the group has."""
    rank, nodes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    # each process is said to be a node, as it is on the two hosts
    os.environ.update(LOCAL_RANK="0", GROUP_RANK=str(rank))
    torch.save(fit(root, nodes), root / f"result-{rank}.pt")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What one process and two on one host end with, undisturbed."""
    found = {}
    for size in (1, 2):
        root = tmp_path_factory.mktemp(f"reference-{size}")
        assert exit_codes(functools.partial(fit_on_this_rank, root), world_size=size) == [0] * size
        found[size] = results(root, size)
    return found


def results(root: Path, size: int = 2) -> list[dict[str, Any]]:
    """What every rank ended with."""
    return [torch.load(root / f"result-{rank}.pt", weights_only=True) for rank in range(size)]


def lives(root: Path) -> list[list[int]]:
    """The steps from which the lives of every rank set out."""
    return [[int(step) for step in (root / f"lives-{rank}.txt").read_text().split()] for rank in range(2)]


def assert_same_bits(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Weights, Fisher information and memory of every rank."""
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["steps"] == theirs["steps"] == STEPS
        for name in ("weights", "fisher", "memory"):
            assert torch.equal(mine[name], theirs[name]), name


def test_two_hosts_end_where_one_ends(hosts: Hosts, reference: dict[int, list[dict[str, Any]]], tmp_path: Path) -> None:
    """Undisturbed; the memory is the one that a single process keeps."""
    launch = hosts.launch(tmp_path)
    assert launch.wait() == [0, 0], launch.log(0) + launch.log(1)
    assert lives(tmp_path) == [[0]] * 2
    assert_same_bits(results(tmp_path), reference[2])
    assert torch.equal(results(tmp_path)[0]["memory"], reference[1][0]["memory"])


# ---------------------------------------------------------------------- processes that die


def test_kill_in_the_second_task_is_made_good_by_a_restart(
    hosts: Hosts, reference: dict[int, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """SIGKILL on the second host: torchrun starts the processes of both again, and they end with the same bits."""
    launch = hosts.launch(tmp_path, f"--accident=Kill:{IN_SECOND_TASK}:1", max_restarts=1)
    assert launch.wait() == [0, 0], launch.log(0) + launch.log(1)
    assert lives(tmp_path) == [[0, IN_SECOND_TASK]] * 2
    assert_same_bits(results(tmp_path), reference[2])


def test_kill_in_the_middle_of_a_write_leaves_the_checkpoint_before(
    hosts: Hosts, reference: dict[int, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """The run goes on from it, and nothing is left of the write."""
    launch = hosts.launch(tmp_path, f"--accident=KillInWrite:{IN_SECOND_TASK}:1", max_restarts=1)
    assert launch.wait() == [0, 0], launch.log(0) + launch.log(1)
    assert lives(tmp_path) == [[0, IN_SECOND_TASK]] * 2
    assert_same_bits(results(tmp_path), reference[2])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert is_complete(tmp_path / "checkpoints" / "last.ckpt")


def test_error_of_one_rank_ends_the_other_host_at_once(hosts: Hosts, tmp_path: Path) -> None:
    """It says that it lost a rank, and where to look; the host with the error shows the error."""
    launch = hosts.launch(tmp_path, f"--accident=Fail:{IN_SECOND_TASK}:1", "--seconds=600")
    assert launch.wait() == [1, 1]
    assert "ArithmeticError: only on this rank" in launch.log(1)
    assert "lost another rank" not in launch.log(1)
    assert "Rank 0 lost another rank, which has failed or hangs" in launch.log(0)


# ---------------------------------------------------------------------- a network that is cut


def test_cut_link_ends_in_an_error_within_the_timeout_and_the_run_goes_on_later(
    hosts: Hosts, reference: dict[int, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Both hosts say so and name the setting; started again over a mended link, they end with the same bits."""
    pauses = [f"--accident=Pause:{IN_SECOND_TASK}:{rank}" for rank in range(2)]
    launch = hosts.launch(tmp_path, *pauses, "--seconds=8")
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("Pause-*"))) < 2:
        assert time.monotonic() < deadline, launch.log(0) + launch.log(1)
        time.sleep(0.02)
    hosts.cut()
    try:
        began = time.monotonic()
        (tmp_path / "go").touch()
        assert launch.wait(40) == [1, 1]
        assert 7 < time.monotonic() - began < 30  # 8 s, and the end of the processes
    finally:
        hosts.mend()
    for rank in range(2):
        assert f"Rank {rank} lost another rank, which has failed or hangs, or the network between" in launch.log(rank)
        assert "waited for 8 s (`FSDP2Strategy(timeout=...)`)" in launch.log(rank)

    again = hosts.launch(tmp_path)
    assert again.wait() == [0, 0], again.log(0) + again.log(1)
    assert lives(tmp_path) == [[0, IN_SECOND_TASK]] * 2
    assert_same_bits(results(tmp_path), reference[2])


def fit_hybrid(root: Path) -> None:
    """Two nodes of two processes each, as the strategy sees it; the timeouts of all groups that it uses."""
    rank = int(os.environ["RANK"])
    os.environ.update(LOCAL_RANK=str(rank % 2), GROUP_RANK=str(rank // 2), LOCAL_WORLD_SIZE="2")
    strategy = FSDP2Strategy(hybrid=True, timeout=timedelta(seconds=50))
    module = ToyModule()
    fitted = trainer(root, [EWC(5.0)], strategy=strategy, num_nodes=2, devices=2)
    fitted.fit(module, datamodule=toy_stream(batch_size=2))
    groups = [group._get_backend(torch.device("cpu")) for group in _world.pg_map]
    torch.save(
        {"seconds": [group.options._timeout.total_seconds() for group in groups], "weights": node_job.full(module)},
        root / f"result-{rank}.pt",
    )


def test_every_group_of_two_nodes_in_hybrid_sharding_waits_as_long_as_asked(tmp_path: Path) -> None:
    """Also those of a mesh inside a node, which torch gives half an hour; the weights are those of one process."""
    assert exit_codes(functools.partial(fit_hybrid, tmp_path), world_size=4) == [0] * 4
    one = ToyModule()
    trainer(tmp_path, [EWC(5.0)]).fit(one, datamodule=toy_stream(batch_size=8))
    for result in results(tmp_path, 4):
        assert len(result["seconds"]) >= 3
        assert set(result["seconds"]) == {50.0}
        torch.testing.assert_close(result["weights"], node_job.full(one), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- SLURM, and the scripts of the example


def fit_as_slurm_task(root: Path) -> None:
    """The job as `srun` starts it, one task on each of two nodes; the second is killed in its first life."""
    rank = os.environ["RANK"]
    for name in torchrun_environment(0, 1, 0).keys() - {"MASTER_ADDR", "MASTER_PORT"}:
        del os.environ[name]
    os.environ.update(SLURM_JOB_ID="17", SLURM_JOB_NAME="test", SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="1")
    os.environ.update(SLURM_NNODES="2", SLURM_NODEID=rank, SLURM_PROCID=rank, SLURM_LOCALID="0")
    accidents = (node_job.Lives(root), node_job.Kill(root, IN_SECOND_TASK))
    torch.save(fit(root, 2, accidents=accidents), root / f"result-{rank}.pt")


def test_slurm_job_that_starts_again_goes_on(reference: dict[int, list[dict[str, Any]]], tmp_path: Path) -> None:
    """By the same command, to the same bits; the task that is not killed ends by itself."""
    task = functools.partial(fit_as_slurm_task, tmp_path)
    assert exit_codes(task, world_size=2) == [1, KILLED]
    assert exit_codes(task, world_size=2) == [0, 0]
    assert lives(tmp_path) == [[0, IN_SECOND_TASK]] * 2
    assert_same_bits(results(tmp_path), reference[2])


def script(name: str, folder: Path, **commands: str) -> subprocess.Popen[bytes]:
    """Start a script of the example, with commands of a cluster that write down how they are called."""
    for command, body in commands.items():
        (folder / command).write_text(f'#!/bin/bash\necho "$@" >> {folder}/{command}.log\n{body}\n')
        (folder / command).chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        **{"HEAD": "node-1", "NODES": "2", "GPUS": "4"},
        **{"SLURM_JOB_ID": "17", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4"},
        "SLURM_RESTART_COUNT": str(sum(1 for _ in folder.glob("restarted-*"))),
    }
    return subprocess.Popen(["bash", str(CLUSTER / name), "run.yaml", "--seed=3"], env=environment, cwd=folder)


FIT = "fit --config run.yaml --seed=3 --trainer.num_nodes 2 --trainer.devices 4 --ckpt_path last"


def test_slurm_script_puts_the_job_back_when_its_time_is_over(tmp_path: Path) -> None:
    """Once; SLURM's signal reaches the script alone, which waits for the training until SLURM ends it."""
    training = "touch started; until [ -e scontrol.log ]; do sleep 0.05; done; exit 1"
    job = script("slurm.sbatch", tmp_path, srun=training, scontrol="")
    while not (tmp_path / "started").exists():
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 1
    assert (tmp_path / "scontrol.log").read_text() == "requeue 17\n"
    assert (tmp_path / "srun.log").read_text() == f"--kill-on-bad-exit=1 lightning-cl {FIT}\n"


def test_slurm_script_puts_a_failed_job_back_three_times(tmp_path: Path) -> None:
    """And then lets it fail, with the status of the training."""
    for restart in range(4):
        assert script("slurm.sbatch", tmp_path, srun="exit 3", scontrol="").wait(30) == 3
        (tmp_path / f"restarted-{restart}").touch()
    assert (tmp_path / "scontrol.log").read_text() == "requeue 17\n" * 3


def test_torchrun_script_can_restart(tmp_path: Path) -> None:
    """Every node gives the same line, with the variable without which restarts fail."""
    environment = "env | grep TORCH_ >> torchrun.log"
    assert script("torchrun.sh", tmp_path, torchrun=environment).wait(30) == 0
    called, variable = (tmp_path / "torchrun.log").read_text().splitlines()
    rendezvous = "--rdzv-backend=c10d --rdzv-endpoint=node-1:29400 --rdzv-id=lightning-cl"
    assert called == f"--nnodes=2 --nproc-per-node=4 --max-restarts=3 {rendezvous} -m lightning_cl.cli.main {FIT}"
    assert variable == "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
