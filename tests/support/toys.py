"""Small modules, data and fits that tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_cl.datamodules import ClassIncremental, TaskStreamDataModule

NUM_FEATURES, NUM_CLASSES = 6, 4


def toy_data(samples: int = 48, seed: int = 0, classes: int = NUM_CLASSES) -> TensorDataset:
    """Gaussian blobs: inputs [n, 6], labels [n], as many of each class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % classes
    centres = torch.randn(classes, NUM_FEATURES, generator=torch.Generator().manual_seed(99)) * 2
    return TensorDataset(centres[labels] + torch.randn(samples, NUM_FEATURES, generator=generator), labels)


def toy_stream(**settings: Any) -> TaskStreamDataModule:
    """Two tasks of two classes, 24 samples each, batches of 8: three steps an epoch."""
    defaults: dict[str, Any] = {"scenario": ClassIncremental(n_tasks=2), "batch_size": 8, "epochs_per_task": 2}
    return TaskStreamDataModule(toy_data(), toy_data(16, seed=1), toy_data(16, seed=2), **(defaults | settings))


def toy_loaders(batch_size: int = 8) -> list[DataLoader[Any]]:
    """The two tasks as plain loaders, for one fit each."""
    inputs, labels = toy_data().tensors
    tasks = [(labels < 2), (labels >= 2)]
    return [DataLoader(TensorDataset(inputs[rows], labels[rows]), batch_size=batch_size) for rows in tasks]


class ToyModule(LightningModule):
    """A module as users write them: no base class of ours, dropout included."""

    def __init__(
        self,
        dropout: float = 0.0,
        learning_rate: float = 0.1,
        seed: int = 7,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    ) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.optimizer = optimizer
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = nn.Sequential(
                nn.Linear(NUM_FEATURES, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, NUM_CLASSES)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        loss = cross_entropy(self(inputs), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        inputs, labels = batch
        self.log("val_acc", (self(inputs).argmax(-1) == labels).float().mean(), batch_size=len(labels), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer is not None:
            return self.optimizer(self.parameters(), lr=self.learning_rate)
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


class SelfSharded(ToyModule):
    """The toy module as users of Lightning's own strategy write it."""

    def configure_model(self) -> None:
        shard_layers(self, self.model)


class LoraToy(ToyModule):
    """The toy module on LoRA adapters: what is under them is random and frozen."""

    def __init__(self, dropout: float = 0.0, learning_rate: float = 0.1, seed: int = 7, optimizer: Any = None) -> None:
        super().__init__(dropout, learning_rate, seed, optimizer)
        with torch.random.fork_rng():
            torch.manual_seed(seed + 1)
            config = LoraConfig(r=2, lora_alpha=4, target_modules=["0", "3"])
            self.model = get_peft_model(self.model, config)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.optimizer is not None:
            return self.optimizer(trained, lr=self.learning_rate)
        return torch.optim.SGD(trained, lr=self.learning_rate, momentum=0.9)


class SelfShardedLora(LoraToy):
    """The same as users of Lightning's own strategy write it."""

    def configure_model(self) -> None:
        shard_layers(self, self.model.base_model.model)


def shard_layers(module: LightningModule, network: nn.Sequential) -> None:
    """Shard the layers of a toy network over all ranks, unless they are."""
    mesh = module.device_mesh["data_parallel"]
    if not any(isinstance(parameter, DTensor) for parameter in network.parameters()):
        for layer in (network[0], network[3], network):
            fully_shard(layer, mesh=mesh)


def trainer(root: Path | str, callbacks: Sequence[Callback] = (), **settings: Any) -> Trainer:
    """A quiet Trainer on one CPU."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "default_root_dir": root,
        "logger": False,
        "enable_checkpointing": any("Checkpoint" in type(callback).__name__ for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), **(defaults | settings))


def trainer_yaml(root: Path) -> str:
    """The first lines of a config: the same quiet Trainer, whose further settings are indented by two."""
    return f"""trainer:
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {root}"""


def weights(module: nn.Module) -> Tensor:
    """All parameters of a module as one vector, gathered; of the toy with LoRA the weights that it computes with."""
    adapted = module.named_modules() if isinstance(module, LoraToy) else ()
    lora = [(name, layer) for name, layer in adapted if isinstance(layer, LoraLayer)]
    plain = [p for name, p in module.named_parameters() if not any(name.startswith(f"{layer}.") for layer, _ in lora)]
    parts = [_whole(parameter) for parameter in plain]
    for _, layer in lora:
        weight = _whole(layer.base_layer.weight)
        for adapter in layer.active_adapters:
            down, up = _whole(layer.lora_A[adapter].weight), _whole(layer.lora_B[adapter].weight)
            if (mixing := getattr(layer.lora_A[adapter], "mixing", None)) is not None:
                mixing = layer.lora_A[adapter].gates(_whole(mixing))
                down = (mixing.diag() if mixing.ndim == 1 else mixing) @ down
            weight = weight + layer.scaling[adapter] * up @ down
        parts += [weight, _whole(layer.base_layer.bias)]
    return torch.cat([part.flatten() for part in parts])


def _whole(parameter: Tensor) -> Tensor:
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.clone()


def fit_stream(
    root: Path | str,
    callbacks: Sequence[Callback] = (),
    *,
    module: LightningModule | None = None,
    stream: TaskStreamDataModule | None = None,
    ckpt_path: Path | str | None = None,
    **settings: Any,
) -> Tensor:
    """Fit a toy stream and return the final weights."""
    module = module or ToyModule()
    trainer(root, callbacks, **settings).fit(module, datamodule=stream or toy_stream(), ckpt_path=ckpt_path)
    return weights(module)
