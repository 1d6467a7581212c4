"""Fully sharded data parallelism (FSDP2) for any LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import HalfPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.distributed._composable.checkpoint_activation import checkpoint
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_cl.core.checks import check_choice
from lightning_cl.core.lazy import LazyWeights
from lightning_cl.core.state import reshard
from lightning_cl.strategies.sharding import WrapPolicy, check_shardable, find_blocks, is_sharded

__all__ = ["FSDP2Strategy"]


class FSDP2Strategy(ModelParallelStrategy):
    """Shard weights, gradients and optimizer state of any LightningModule over all ranks, on GPUs or on CPUs.

    The module needs no ``configure_model``. Its repeated blocks become units that are gathered for their own forward
    and backward only; the LightningModule itself is the last unit and holds the rest. All steps run through it, so
    parameters that belong to no block may be used anywhere in a step. A module that shards itself in its
    ``configure_model``, with tensor parallelism or without, is left as it is.

    The order is: build or load, quantize, add adapters, shard; the strategy comes last.

    Args:
        wrap: What becomes a unit: ``"auto"`` (the classes that a Hugging Face model must not split, else the members
            of a ``ModuleList`` of one class), a list of class names, or a function of name and submodule.
        reshard_after_forward: Free gathered parameters after a block's forward, and gather them again for its
            backward: less memory, half as much communication again. An integer reshards to groups of that many ranks.
        mixed_precision: ``"bfloat16"`` computes in bfloat16 and reduces gradients in float32 on float32 weights; or a
            policy of torch's own. Instead of it, ``Trainer(precision="bf16-mixed")`` works as everywhere.
        activation_checkpointing: Keep only the inputs of each unit for the backward and compute the rest again.
        cpu_offload: Keep shards and optimizer state in CPU memory; for GPUs only.
        hybrid: Shard inside a node and replicate across nodes: no parameter crosses the network, only gradients do.
        tensor_parallel_size: Ranks of the mesh dimension ``"tensor_parallel"`` for a module that shards itself.
        save_distributed_checkpoint: A checkpoint is a folder to which every rank writes its shards; otherwise one file
            with full tensors.
        process_group_backend: ``"nccl"``, ``"gloo"``; by device if ``None``.
        timeout: How long a collective waits for a rank that does not answer before it raises.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for a module that cannot be sharded.
    """

    strategy_name = "fsdp2"

    def __init__(
        self,
        *,
        wrap: Literal["auto"] | list[str] | Callable[[str, nn.Module], bool] = "auto",
        reshard_after_forward: bool | int = True,
        mixed_precision: Literal["bfloat16"] | MixedPrecisionPolicy | None = None,
        activation_checkpointing: bool = False,
        cpu_offload: bool = False,
        hybrid: bool = False,
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        if isinstance(mixed_precision, str):
            check_choice("mixed_precision", mixed_precision, ("bfloat16",))
        if hybrid and tensor_parallel_size != 1:
            raise ValueError(
                f"`hybrid=True` shards inside a node, where `tensor_parallel_size={tensor_parallel_size}` would split"
                " layers: give only one of them."
            )
        self.wrap: WrapPolicy = wrap
        self.reshard_after_forward = reshard_after_forward
        self.mixed_precision = mixed_precision
        self.activation_checkpointing = activation_checkpointing
        self.cpu_offload = cpu_offload
        self.hybrid = hybrid
        self.tensor_parallel_size = tensor_parallel_size
        self._in_forward = False

    # ------------------------------------------------------------------ set-up

    @override
    def setup_environment(self) -> None:
        ranks = self.num_nodes * self.num_processes
        if ranks % self.tensor_parallel_size:
            raise ValueError(f"`tensor_parallel_size={self.tensor_parallel_size}` does not divide the {ranks} ranks.")
        if self.cpu_offload and self.root_device.type == "cpu":
            raise ValueError(
                "`cpu_offload=True` moves shards from a GPU, but the accelerator is the CPU: leave it out."
            )
        self._data_parallel_size = ranks // self.tensor_parallel_size
        super().setup_environment()

    @property
    def shard_mesh(self) -> DeviceMesh:
        """The ranks to shard over: one dimension, or (replicate, shard) if ``hybrid``."""
        if self.hybrid:
            names = ("data_replicate", "data_shard")
            return init_device_mesh(self.root_device.type, (self.num_nodes, self.num_processes), mesh_dim_names=names)
        return self.device_mesh["data_parallel"]

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.model is not None and self.accelerator is not None
        self.accelerator.setup(trainer)
        self._check_precision()
        self.model = self.precision_plugin.convert_module(self.model)
        if is_sharded(self.model):
            self._check_sharded_whole()
        else:
            self._shard()
        self.model_to_device()
        self.barrier()
        if trainer.state.fn == "fit":
            self.setup_optimizers(trainer)
            self._check_optimizers()
        self.setup_precision_plugin()

    def _shard(self) -> None:
        assert self.model is not None
        if self.tensor_parallel_size != 1:
            raise ValueError(
                f"`tensor_parallel_size={self.tensor_parallel_size}` is for a module that splits its layers in its own"
                f" `configure_model`, and {type(self.model).__name__} does not."
            )
        blocks = find_blocks(self.model, self.wrap)
        check_shardable(self.model, blocks)
        if not blocks:
            rank_zero_info(
                f"{type(self.model).__name__} has no repeated blocks: it is sharded as one unit, whose parameters are"
                " gathered all at once. Name its blocks by `FSDP2Strategy(wrap=[...])` to save memory."
            )
        mesh = self.shard_mesh
        for name, block in (*blocks.items(), ("", self.model)):
            self._fill(name, block)
            if self.activation_checkpointing and name:
                checkpoint(block)
            fully_shard(
                block,
                mesh=mesh,
                # what the root holds is needed first in the backward
                reshard_after_forward=self.reshard_after_forward if name else False,
                mp_policy=self._precision_policy(),
                offload_policy=CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy(),
            )

    def _fill(self, name: str, block: nn.Module) -> None:
        """Bring a unit to its device, with the same values on all ranks, as DDP does."""
        lazy = any(tensor.is_meta for tensor in (*block.parameters(), *block.buffers()))
        if lazy:
            if not isinstance(self.model, LazyWeights):
                raise ValueError(
                    f"Parameters of {type(self.model).__name__} are on the meta device. Give it a method"
                    " `fill_weights(name, block, device)`, or build it with its weights."
                )
            self.model.fill_weights(name, block, self.root_device)
        for tensor in (*block.parameters(), *block.buffers()):
            if isinstance(tensor, DTensor):
                continue
            tensor.data = tensor.data.to(self.root_device)
            # what was read from one file is the same on all ranks
            if self.world_size > 1 and (not lazy or tensor.requires_grad):
                dist.broadcast(tensor.data, src=0)

    def _precision_policy(self) -> MixedPrecisionPolicy:
        if isinstance(self.mixed_precision, MixedPrecisionPolicy):
            return self.mixed_precision
        if self.mixed_precision is None:
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def _check_precision(self) -> None:
        assert self.model is not None
        plugin = self.precision_plugin
        if not isinstance(plugin, HalfPrecision):
            return
        for name, parameter in self.model.named_parameters():
            # the packed bytes of quantized weights may lie in tensors of a floating-point dtype
            packed = hasattr(parameter, "quant_state") and parameter.is_floating_point()
            if packed and parameter.dtype != plugin._desired_input_dtype:
                raise ValueError(
                    f"`Trainer(precision={plugin.precision!r})` would cast {name!r}, whose {parameter.dtype} values are"
                    " packed 4-bit bytes. Use `precision='32-true'` or 'bf16-mixed': the quantized module has its"
                    " compute dtype already."
                )

    def _check_sharded_whole(self) -> None:
        assert self.model is not None
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                raise ValueError(
                    f"{name!r} was added after the module was sharded: its gradient would never be reduced over ranks."
                    " The order is: load, quantize, add adapters, shard; build all of it before the fit, or in"
                    " `configure_model`."
                )

    def _check_optimizers(self) -> None:
        assert self.model is not None
        known = {id(parameter) for parameter in self.model.parameters()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if any(id(parameter) not in known for parameter in group["params"]):
                    raise ValueError(
                        f"{type(optimizer).__name__} holds parameters as they were before sharding and would train"
                        " none of the module's. Build it in `configure_optimizers`, from `self.parameters()`."
                    )

    # ------------------------------------------------------------------ steps

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        if self.tensor_parallel_size != 1:
            return super().distributed_sampler_kwargs
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def run_in_forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function of the module's weights inside the root's forward, which gathers what no block holds."""
        module = self.model
        assert module is not None
        if not isinstance(module, FSDPModule) or self._in_forward:
            return function(*args, **kwargs)
        own = module.__dict__.get("forward")

        def once(*given: Any, **named: Any) -> Any:
            # the function may call the real forward
            _set_forward(module, own)
            return function(*given, **named)

        _set_forward(module, once)
        self._in_forward = True
        try:
            return module(*args, **kwargs)
        finally:
            self._in_forward = False
            _set_forward(module, own)
            if not torch.is_grad_enabled():
                # no backward follows, after which units are freed and show their shards again
                reshard(module)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        with self.precision_plugin.train_step_context():
            return self.run_in_forward(self.lightning_module.training_step, *args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        with self.precision_plugin.val_step_context():
            return self.run_in_forward(self.lightning_module.validation_step, *args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        with self.precision_plugin.test_step_context():
            return self.run_in_forward(self.lightning_module.test_step, *args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        with self.precision_plugin.predict_step_context():
            return self.run_in_forward(self.lightning_module.predict_step, *args, **kwargs)


def _set_forward(module: nn.Module, forward: Any) -> None:
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward
