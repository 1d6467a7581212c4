"""What torchrun starts on every node in tests: the script of a user, and accidents that a test may add to it.

The script has one command line for its first start and for every later one.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_cl import EWC, ExperienceReplay, FSDP2Strategy
from toys import ToyModule, toy_stream, trainer

GLOBAL_BATCH, STEPS = 8, 12


def fit(root: Path, nodes: int, *, seconds: int = 60, accidents: tuple[Callback, ...] = ()) -> dict[str, Any]:
    """Fit two tasks of two epochs of three steps, with a checkpoint at every step; go on from the last one."""
    torch.manual_seed(11)
    ewc, replay = EWC(5.0), ExperienceReplay(10, seed=1)
    saver = ModelCheckpoint(root / "checkpoints", every_n_train_steps=1, save_top_k=0, save_last=True)
    module = ToyModule(dropout=0.3)
    strategy = FSDP2Strategy(timeout=timedelta(seconds=seconds))
    fitted = trainer(root, [ewc, replay, *accidents, saver], strategy=strategy, num_nodes=nodes)
    # what Lightning says at the first start
    warnings.filterwarnings("ignore", r'.*ckpt_path="last"\) is set, but there is no last checkpoint', UserWarning)
    fitted.fit(module, datamodule=toy_stream(batch_size=GLOBAL_BATCH // nodes), ckpt_path="last")
    return {
        "weights": full(module),
        "fisher": torch.cat([value.flatten() for value in ewc.importance.values()]),
        "memory": replay.buffer.all_samples.sample_ids,
        "steps": fitted.global_step,
    }


def full(module: nn.Module) -> Tensor:
    """All weights, gathered."""
    values = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return torch.cat([value.detach().flatten() for value in values])


class Lives(Callback):
    """Writes down from which step every life of a rank sets out."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        with (self.root / f"lives-{trainer.global_rank}.txt").open("a") as file:
            file.write(f"{trainer.global_step}\n")


class Accident(Callback):
    """Something that happens at a step, once: never in a life that begins at this step or later."""

    def __init__(self, root: Path, step: int, rank: int = 1) -> None:
        self.root, self.step, self.rank = root, step, rank

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            marker = self.root / f"{type(self).__name__}-{self.rank}"
            if not marker.exists():
                marker.touch()
                self.happen()

    def happen(self) -> None:
        raise NotImplementedError


class Kill(Accident):
    """SIGKILL."""

    def happen(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class KillInWrite(Accident):
    """SIGKILL when this rank opens the file of its shards for the next checkpoint."""

    def happen(self) -> None:
        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open" and str(arguments[0]).endswith(".distcp"):
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)


class Fail(Accident):
    """An error that only this rank has."""

    def happen(self) -> None:
        raise ArithmeticError("only on this rank")


class Pause(Accident):
    """Waits for the test, which pulls the cable meanwhile."""

    def happen(self) -> None:
        while not (self.root / "go").exists():
            time.sleep(0.02)


ACCIDENTS: dict[str, type[Accident]] = {kind.__name__: kind for kind in (Kill, KillInWrite, Fail, Pause)}


def main(arguments: list[str] | None = None) -> None:
    """Fit as the command line says, and save what this rank ends with."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--accident", action="append", default=[], help="NAME:STEP:RANK")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    accidents: list[Callback] = [Lives(given.root)]
    for accident in given.accident:
        name, step, rank = accident.split(":")
        accidents.append(ACCIDENTS[name](given.root, int(step), int(rank)))
    result = fit(given.root, int(os.environ["WORLD_SIZE"]), seconds=given.seconds, accidents=tuple(accidents))
    torch.save(result, given.root / f"result-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main()
