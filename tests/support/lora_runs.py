"""Ways to train the toy module with LoRA that methods on slots must all stand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_cl import ContinualCallback, Task
from lightning_cl.adapters import Slot
from lightning_cl.core.update import OptimizerStep
from toys import LoraToy, toy_data

LAYERS = ("model.base_model.model.0", "model.base_model.model.3")


class ManualLora(LoraToy):
    """Steps its two optimizers itself: one for B, one for the rest."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.03)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        found: Any = self.optimizers()
        optimizers = found if isinstance(found, list) else [found]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(cross_entropy(self(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        groups = ([p for name, p in named if ("lora_B" in name) == up] for up in (True, False))
        return [torch.optim.SGD(group, lr=self.learning_rate, momentum=0.9) for group in groups if group]


class MappedLora(LoraToy):
    """Its step returns a mapping."""

    def __init__(self) -> None:
        super().__init__(learning_rate=0.03)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step((batch[0], batch[1]), batch_idx)}


SLOW = partial(LoraToy, learning_rate=0.03)
RUNS: dict[str, tuple[Callable[[], LoraToy], dict[str, Any]]] = {
    "plain": (SLOW, {}),
    "accumulation": (SLOW, {"accumulate_grad_batches": 2}),
    "clipped": (SLOW, {"gradient_clip_val": 0.5}),
    "bf16-mixed": (SLOW, {"precision": "bf16-mixed"}),
    "fused": (partial(LoraToy, learning_rate=0.02, optimizer=partial(torch.optim.AdamW, fused=True)), {}),
    "manual": (ManualLora, {}),
    "mapped": (MappedLora, {}),
}


def slot_of(module: LightningModule, layer: str = LAYERS[0]) -> Slot:
    """The slots of a layer, during a fit or after it."""
    return Slot(layer, module.get_submodule(layer), "default")


class Watch(ContinualCallback):
    """Notes what the module says, and its slots, where a task ends and after updates; its place says before or after.

    Attributes:
        outputs: Logits of the toy data at tasks' ends.
        steps: Logits after every update.
        mixings: Of each task, the mixing of the first layer's present slot at its end.
        factors: And its factors as they are.
    """

    needs_state = False

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.steps: list[Tensor] = []
        self.mixings: list[Tensor] = []
        self.factors: list[tuple[Tensor, Tensor]] = []

    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self.outputs.append(logits(pl_module))
        slot = slot_of(pl_module)
        self.factors.append(slot.weights("default"))
        if "mixing" in slot.parameters("default"):
            self.mixings.append(slot.mixing("default"))

    def change_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        self.steps.append(logits(pl_module))


@torch.no_grad()
def logits(module: LightningModule) -> Tensor:
    """What the module says to the toy data, in float64 of what it computes in float32."""
    found: Tensor = module(toy_data().tensors[0])
    return found.double()
