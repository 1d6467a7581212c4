"""A run with EWC, replay and metrics that a test kills with SIGKILL and resumes."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import Dataset

from lightning_cl import EWC, ContinualCallback, ContinualMetrics, ExperienceReplay, TaskStreamDataModule
from lightning_cl.datamodules import ClassIncremental
from toys import ToyModule, toy_data, trainer, weights

KILLED = -9


class NoisyData(Dataset):
    """Toy data with a random augmentation, as image data sets have."""

    def __init__(self) -> None:
        self.inputs, self.targets = toy_data().tensors

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index] + 0.1 * torch.randn(self.inputs.shape[1]), self.targets[index]


class KillAt(ContinualCallback):
    """Kills its process without warning, at a hook and the step at which the hook finds the run."""

    boundaries = "evaluation"
    needs_state = False

    def __init__(self, hook: str, step: int) -> None:
        self.hook, self.step = hook, step

    def _kill(self, hook: str, trainer: Any) -> None:
        if hook == self.hook and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self._kill("on_train_batch_start", trainer)

    def on_task_end(self, trainer: Any, *_: Any) -> None:
        self._kill("on_task_end", trainer)

    def on_task_start(self, trainer: Any, *_: Any) -> None:
        self._kill("on_task_start", trainer)

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        self._kill("on_validation_end", trainer)


def run(
    root: Path,
    *,
    num_workers: int = 0,
    kill: tuple[str, int] | None = None,
    ckpt_path: Path | None = None,
    batch_size: int = 8,
    devices: int = 1,
    extra: Sequence[Callback] = (),
    stream_settings: dict[str, Any] | None = None,
    **trainer_settings: Any,
) -> dict[str, Any]:
    """Fit two tasks of two epochs of three steps, with a checkpoint at every step; return all that must be the same."""
    random.seed(11)
    np.random.seed(11)
    torch.manual_seed(11)
    ewc, replay = EWC(20.0, mode="separate"), ExperienceReplay(10)
    metrics = ContinualMetrics(directory=root / "record")
    # the kill comes after the Fisher information is there and before the other callbacks hear of the task's end
    callbacks: list[Callback] = [ewc, *([] if kill is None else [KillAt(*kill)]), replay, metrics, *extra]
    callbacks.append(ModelCheckpoint(root / "checkpoints", filename="{step}", every_n_train_steps=1, save_top_k=-1))
    module = ToyModule(dropout=0.3)
    settings = {"scenario": ClassIncremental(n_tasks=2), "epochs_per_task": 2, **(stream_settings or {})}
    stream = TaskStreamDataModule(
        NoisyData(), toy_data(16, seed=1), batch_size=batch_size, num_workers=num_workers, **settings
    )
    strategy = {"strategy": "ddp", "devices": devices} if devices > 1 else {}
    fitted = trainer(root, callbacks, **strategy, **trainer_settings)
    fitted.fit(module, datamodule=stream, ckpt_path=ckpt_path, weights_only=True)
    return {
        "weights": weights(module),
        "optimizer": [s["momentum_buffer"] for s in fitted.optimizers[0].state.values()],
        "fisher": {name: ewc.importance[name] for name in ewc.importance},
        "anchors": {name: ewc.anchors[name] for name in ewc.anchors},
        "replay": replay.buffer.all_samples.sample_ids,
        "stored": sorted(float(row.sum()) for row in replay.buffer.storage.read(_slots(replay), None)["0"]),
        "matrix": metrics.matrix,
        "curves": torch.tensor([sum(scores) for scores in metrics._step_scores]),
        "evaluated": metrics._steps,
        "rng": torch.get_rng_state(),
        "numpy rng": torch.from_numpy(np.random.get_state()[1].astype(np.int64)),
        "python rng": torch.tensor(random.getstate()[1]),
    }


def _slots(replay: ExperienceReplay) -> Any:
    return np.arange(len(replay.buffer))


def run_and_save(root: Path, **settings: Any) -> None:
    """As :func:`run`, for a process of its own; each rank saves its result."""
    result = run(root, **settings)
    torch.save(result, root / f"result-{os.environ.get('RANK', '0')}.pt")


def assert_same(resumed: dict[str, Any], straight: dict[str, Any]) -> None:
    """The same bits everywhere."""
    assert resumed.keys() == straight.keys()
    for name, value in straight.items():
        torch.testing.assert_close(
            resumed[name], value, rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )
