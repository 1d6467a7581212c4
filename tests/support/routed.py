"""What tests of routed adapters share: a toy that learns, and what its adapters say one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.data import DataLoader, Dataset

from toys import LoraToy, toy_data, toy_stream, trainer

INPUTS, LABELS = toy_data(40, seed=3).tensors


class Gentle(LoraToy):
    """At a rate that learns, with a validation that keeps the class scores."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(learning_rate=0.02, **settings)
        self.seen: list[Tensor] = []

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.seen.append(self(batch[0]).detach())


class Rows(Dataset[Tensor]):
    """Inputs alone."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Tensor:
        return self.inputs[index]


def learned(root: Path, method: Any, module: Any = None, **stream: Any) -> tuple[Any, Trainer]:
    """Fit the toy stream; return the module and its Trainer."""
    module = module or Gentle()
    fit = trainer(root, [method])
    fit.fit(module, datamodule=toy_stream(**{"epochs_per_task": 4} | stream))
    return module, fit


def predicted(fit: Trainer, module: Any, inputs: Tensor, batch_size: int = 8) -> Tensor:
    """Class scores of prediction."""
    return torch.cat(fit.predict(module, DataLoader(Rows(inputs), batch_size=batch_size)))  # type: ignore[arg-type]


def base_features(module: Any, inputs: Tensor) -> Tensor:
    """What the last layer gets without adapters."""
    layer = module.model.base_model.model[0].base_layer
    return linear(inputs, layer.weight, layer.bias).relu().detach()


def adapted(module: Any, inputs: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Hidden values and class scores with these rows of the past slot alone."""
    hidden: Tensor = inputs
    outputs = []
    for layer in (module.model.base_model.model[0], module.model.base_model.model[3]):
        down, up = layer.lora_A["past"].weight[rows], layer.lora_B["past"].weight[:, rows]
        hidden = linear(hidden, layer.base_layer.weight + 2.0 * up @ down, layer.base_layer.bias)
        outputs.append(hidden.detach())
        hidden = hidden.relu()
    return outputs[0].relu(), outputs[1]


def chosen_by_hand(features: Tensor, prototypes: dict[int, Tensor]) -> Tensor:
    """The task of the nearest prototype."""
    distances = [(features[:, None] - prototypes[t][None]).norm(dim=-1).amin(1) for t in sorted(prototypes)]
    return torch.stack(distances, 1).argmin(1)
