"""Streams with a request between learning tasks, and a callback that serves it without a method of unlearning."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map
from typing_extensions import override

from lightning_cl import ContinualCallback, TaskStreamDataModule
from lightning_cl.core.requests import ForgetRequest, Influence
from lightning_cl.core.shards import PerRank, gathered
from lightning_cl.core.task import Task
from lightning_cl.core.update import OptimizerStep
from lightning_cl.datamodules import ClassIncremental
from lightning_cl.unlearning.request_callback import RequestCallback
from toys import ToyModule, fit_stream, toy_data, toy_stream

# of the first task's class and of the second's
FORGOTTEN = [0, 4, 16, 17, 21]
INPUTS, LABELS = toy_data().tensors
RETAINED = torch.tensor([row for row in range(48) if row % 4 < 2 and row not in FORGOTTEN])


def forgetting_stream(rows: list[int] | None = None, after: int = 2, **settings: Any) -> TaskStreamDataModule:
    """Four tasks of a class each, 12 samples: learn, learn, forget rows of both, learn, learn."""
    request = ForgetRequest("rows", rows=rows or FORGOTTEN, after=after)
    return toy_stream(requests=[request], **{"scenario": ClassIncremental(n_tasks=4), **settings})


class Serves(RequestCallback):
    """Steps by ascent on what is forgotten, or not at all; looks at all state before and after.

    Args:
        ascends: Whether the weights move.
    """

    def __init__(self, ascends: bool = False) -> None:
        super().__init__()
        self.ascends = ascends
        self.before: Any = None
        self.after: Any = None

    @property
    def influences(self) -> list[Influence]:
        """What the callbacks answered to the last request."""
        return list(self.ledger.records[-1].influences)

    @override
    def serve_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self.before = everything(trainer, pl_module, self)

    @override
    def serve_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self.after = everything(trainer, pl_module, self)

    @override
    def transform_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> Any:
        return batch["forget"]

    @override
    def change_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        for parameter in step.parameters.values():
            if parameter.grad is not None and self.ascends:
                parameter.grad.neg_()
            else:
                parameter.grad = None


def everything(trainer: Trainer, pl_module: LightningModule, but: ContinualCallback) -> dict[str, Any]:
    """Return copies of the states of all callbacks, of the module, its optimizers and schedules."""
    callbacks = [c for c in trainer.callbacks if isinstance(c, ContinualCallback) and c is not but]
    state = {
        "module": pl_module.state_dict(),
        "callbacks": [callback.state_dict() for callback in callbacks],
        "optimizers": [optimizer.state_dict()["state"] for optimizer in trainer.optimizers],
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
    }
    return tree_map(_copied, state)


def _copied(value: Any) -> Any:
    if isinstance(value, PerRank):
        return tree_map(_copied, value.value)
    if isinstance(value, DTensor):
        return value.to_local().clone()
    return value.clone() if isinstance(value, Tensor) else pickle.loads(pickle.dumps(value))


def differing(first: Any, second: Any, path: str = "") -> list[str]:
    """Return where two nested states differ."""
    if isinstance(first, Tensor):
        return [] if isinstance(second, Tensor) and torch.equal(first, second) else [path]
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return [found for key in first for found in differing(first[key], second[key], f"{path}/{key}")]
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)) and len(first) == len(second):
        return [p for n, pair in enumerate(zip(first, second, strict=True)) for p in differing(*pair, f"{path}/{n}")]
    return [] if first == second else [path]


def content(value: Any) -> bytes:
    """Return all bytes of a value, those of tensors side by side."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def learned_and_forgotten(
    root: Path | str, method: Callback, *others: Callback, ascends: bool = False, **settings: Any
) -> Serves:
    """Fit the stream with a method, and return what served its request."""
    serves = Serves(ascends)
    settings = {"module": ToyModule(), "stream": forgetting_stream()} | settings
    fit_stream(root, [method, serves, *others], **settings)
    return serves


class AfterRequest(ContinualCallback):
    """Keeps what ``look`` returns of the module once a request has ended; stands behind what serves it."""

    acts_on = ("forget",)
    boundaries = "unused"
    needs_state = False

    def __init__(self, look: Callable[[Any], Any]) -> None:
        self.look = look
        self.found: Any = None

    def on_task_end(self, trainer: Any, pl_module: Any, task: Any) -> None:
        self.found = self.look(pl_module)


def after_request(root: Path, method: ContinualCallback, **settings: Any) -> tuple[ToyModule, dict[str, Any], Serves]:
    """Fit with a request that moves the weights; return a copy of the module then, and the method's state."""

    def look(pl_module: ToyModule) -> tuple[ToyModule, dict[str, Any]]:
        module = ToyModule()
        module.load_state_dict(pl_module.state_dict())
        return module, pickle.loads(pickle.dumps(gathered(method.state_dict())))

    probe = AfterRequest(look)
    settings = {"module": ToyModule(learning_rate=0.05)} | settings
    serves = learned_and_forgotten(root, method, probe, ascends=True, **settings)
    return *probe.found, serves


def outcomes(serves: Serves, method: ContinualCallback) -> list[tuple[str, int | None]]:
    """Return outcome and count of each answer of a method."""
    return [(i.outcome, i.count) for i in serves.influences if i.owner == type(method).__name__]


def as_dict(module: ToyModule, values: list[Tensor]) -> dict[str, Tensor]:
    """Return tensors by the names of the module's parameters."""
    return dict(zip((name for name, _ in module.named_parameters()), values, strict=True))


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, and values up to rounding."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach().to(found[name].dtype), rtol=1e-5, atol=1e-7)
