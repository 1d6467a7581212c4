"""What momentum interpolation and Reptile share: a second set of weights in float32 that follows the trained ones."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_cl.core.callback import ContinualCallback
from lightning_cl.core.copies import WeightCopy
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.requests import Influence
from lightning_cl.core.task import Task

__all__ = ["SlowWeights"]


class SlowWeights(ContinualCallback):
    """Keeps slow weights, which begin as what the first fit began with; a subclass says how they follow."""

    compares_weights = True
    boundaries: ClassVar[Literal["required", "unused", "evaluation"]] = "unused"

    def __init__(self) -> None:
        self._slow = WeightCopy(type(self).__name__, float32=True, buffers=False)
        self._names: set[str] = set()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._slow.widen(pl_module)
        self._slow.place(pl_module)
        if not self._slow:
            self._slow.take(pl_module)
        self._names = _trainable(pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            # a module grows its head at a task's start, behind the callbacks; new rows begin as the module's
            self._slow.widen(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if thawed := _trainable(pl_module) - self._names:
            rank_zero_warn(
                f"`{type(self).__name__}` has no slow weights of {sorted(thawed)[:3]}, which became trainable after the"
                " fit began: they stay as they train. Make them trainable before it."
            )

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        self._slow.take(pl_module)
        return [Influence(type(self).__name__, "the slow weights", "recomputed")]

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        return Footprint(device=self._slow.num_bytes(pl_module))

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._slow.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._slow.load_state_dict(state_dict)


def _trainable(pl_module: LightningModule) -> set[str]:
    return {name for name, parameter in pl_module.named_parameters() if parameter.requires_grad}
