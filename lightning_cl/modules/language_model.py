"""What the modules around Hugging Face networks share: building, loading and optimizing them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_cl.core.checks import check_positive
from lightning_cl.core.schedules import Schedule, task_scheduler
from lightning_cl.modules.optimizers import OptimizerFactory, decay_groups
from lightning_cl.modules.pretrained import NetworkBuilder, Quantization
from lightning_cl.strategies import FSDP2Strategy
from lightning_cl.strategies.frozen import FrozenBase, leave_out_base, put_back_base

__all__ = ["LanguageModel"]


class LanguageModel(LightningModule):
    """Base of the modules around a Hugging Face network.

    The network is built in ``configure_model``, which Lightning calls before training and testing; call it yourself to
    use the module without a Trainer. The order is: build or load, quantize, add adapters; the strategy shards.

    Args:
        model: Folder or hub name of a model; or a config, whose weights are random: a dict such as
            ``{"model_type": "llama", "hidden_size": 64}``, or a ``PretrainedConfig``.
        kind: The auto class of transformers that builds the network.
        adapter: Config of any PEFT method, as a dict such as ``{"peft_type": "LORA", "r": 8}`` or as an object. All
            else is then frozen.
        quantization: How to quantize the frozen base, as :class:`Quantization` or a dict of its settings; needs
            ``adapter``.
        dtype: Dtype of the weights, and of the computation in a quantized base: ``"float32"``, ``"bfloat16"`` or
            ``"float16"``.
        learning_rate: Peak learning rate; above 0.
        weight_decay: Weight decay of matrices; biases, norms and embeddings have none.
        betas: Decay rates of AdamW's moments.
        optimizer: Makes another optimizer of parameter groups, such as ``functools.partial(SPAM, reset_interval=200)``,
            in a config its ``class_path`` and ``init_args``. Learning rate and weight decay stay those given here.
        schedule: Decay after the warm-up: ``"cosine"``, ``"linear"``, or ``"constant"`` for none.
        warmup: Steps of warm-up, or as a ``float`` below 1 their fraction of a task.
        floor: Learning rate at the end of a task, as a fraction of the peak.
        rewarm: Warm up and decay in every task anew; otherwise once over the stream.
        seed: Seed of random weights, such as those of adapters and heads.
        overrides: Further settings of the network's config.

    Raises:
        ValueError: For a setting out of range, a quantized base without an adapter, and in ``configure_model`` for a
            model that is not there.
    """

    def __init__(
        self,
        model: Any,
        *,
        kind: str,
        adapter: Any = None,
        quantization: Quantization | dict[str, Any] | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        learning_rate: float = 3e-4,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        optimizer: OptimizerFactory | None = None,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        warmup: int | float = 0.01,
        floor: float = 0.1,
        rewarm: bool = True,
        seed: int = 0,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_positive("learning_rate", learning_rate)
        check_positive("weight_decay", weight_decay, zero_allowed=True)
        if isinstance(quantization, Mapping):
            quantization = Quantization(**quantization)
        if quantization is not None and adapter is None:
            raise ValueError(
                "`quantization` freezes the base model, and there is no `adapter` to train: add one, such as"
                " `adapter={'peft_type': 'LORA', 'target_modules': 'all-linear'}`."
            )
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = (betas[0], betas[1])
        self.optimizer = optimizer
        self.schedule = Schedule(schedule, warmup, floor, rewarm)
        self.builder = NetworkBuilder(model, kind, adapter, quantization, dtype, seed, overrides or {})
        self.network: Any = None
        # plain values, for checkpoints that load everywhere and for the files of loggers
        self.save_hyperparameters(
            {
                "model": self.builder.plain_model(),
                "adapter": self.builder.plain_adapter(),
                "quantization": None if quantization is None else asdict(quantization),
                "dtype": dtype,
                "learning_rate": learning_rate,
                "weight_decay": weight_decay,
                "betas": list(betas),
                "schedule": schedule,
                "warmup": warmup,
                "floor": floor,
                "rewarm": rewarm,
                "seed": seed,
            }
        )

    @override
    def configure_model(self) -> None:
        if self.network is None:
            strategy = None if self._trainer is None else self.trainer.strategy
            device = torch.device("cpu") if strategy is None else strategy.root_device
            lazy = isinstance(strategy, FSDP2Strategy)
            self.network = self.builder.build(lazy=lazy, device=device)
            if not lazy:
                # the base as a fresh module has it, before a checkpoint or a callback changes it
                FrozenBase.of(self, None)

    def fill_weights(self, name: str, block: nn.Module, device: torch.device) -> None:
        """Give values to a block that stands on the meta device; a sharding strategy calls it."""
        if block is self:
            name, block = "", self.network
        self.builder.fill(name.removeprefix("network").removeprefix("."), block, device)

    @abstractmethod
    def _evaluate(self, batch: Mapping[str, Any], stage: str) -> None:
        """Log what is measured on a batch of ``"val"`` or ``"test"``."""

    @override
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    @override
    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # as `fsdp2` does it for any module
        if not isinstance(self.trainer.strategy, FSDP2Strategy):
            leave_out_base(checkpoint, self)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "state_dict" in checkpoint:
            put_back_base(checkpoint, self, "The checkpoint")

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        trainable = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        plugin, clips = self.trainer.precision_plugin, bool(self.trainer.gradient_clip_val)
        half = [name for name, parameter in trainable.items() if parameter.dtype == torch.float16]
        if half and getattr(plugin, "scaler", None) is not None:
            raise ValueError(
                f"`precision='16-mixed'` scales gradients, which torch does for weights in float32, and {half[:3]}"
                " train in float16. Use `dtype='bfloat16'` or 'float32' for the module, or `precision='bf16-mixed'`."
            )
        # a fused step unscales float16 gradients itself, after callbacks have added to them; and under autocast of any
        # dtype Lightning refuses to clip for it
        fused = not isinstance(plugin, MixedPrecision) or (plugin.scaler is None and not clips)
        groups = decay_groups(self, trainable, self.weight_decay)
        if self.optimizer is None:
            optimizer: Optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas, fused=fused)
        else:
            optimizer = self.optimizer([{**group, "lr": self.learning_rate} for group in groups])
        scheduler = task_scheduler(optimizer, self.schedule, self)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
