"""Fully sharded data parallelism (FSDP2) for any LightningModule."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.distributed._composable.checkpoint_activation import checkpoint
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_cl.core.checks import check_choice
from lightning_cl.core.lazy import LazyWeights
from lightning_cl.core.state import reshard
from lightning_cl.quantization import check_can_shard
from lightning_cl.strategies.checkpoint import PendingWrite, read_rest, read_tensors, write_file, write_folder
from lightning_cl.strategies.checks import check_optimizers, check_precision, check_shardable, check_sharded_whole
from lightning_cl.strategies.frozen import BASE, FrozenBase, check_base
from lightning_cl.strategies.root import RootForward
from lightning_cl.strategies.sharding import WrapPolicy, find_blocks, is_sharded
from lightning_cl.strategies.state import (
    check_number_of_optimizers,
    full_model_state,
    load_full_model_state,
    load_full_optimizer_state,
    load_optimizer_state,
    model_state,
    numbered_optimizer_state,
    optimizer_state,
    optimizer_template,
    stateless_parameters,
)
from lightning_cl.strategies.waiting import explain_lost_rank, limit_waiting

__all__ = ["FSDP2Strategy"]

# in a checkpoint: of each optimizer, the parameters that it had no state of
_STATELESS = "lightning_cl_stateless"


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
            with full tensors, which any strategy can load.
        async_checkpoint: Copy the shards to the CPU and write them while training goes on.
        save_frozen: Keep weights that are frozen from the start in checkpoints. Otherwise their fingerprint takes their
            place, and a resume over others is refused. ``None`` leaves them out where they are the greater part.
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
        async_checkpoint: bool = False,
        save_frozen: bool | None = None,
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
        if async_checkpoint and not save_distributed_checkpoint:
            raise ValueError(
                "`async_checkpoint=True` writes shards, and `save_distributed_checkpoint=False` one file: give only one"
                " of them."
            )
        self.wrap: WrapPolicy = wrap
        self.reshard_after_forward = reshard_after_forward
        self.mixed_precision = mixed_precision
        self.activation_checkpointing = activation_checkpointing
        self.cpu_offload = cpu_offload
        self.hybrid = hybrid
        self.tensor_parallel_size = tensor_parallel_size
        self.async_checkpoint = async_checkpoint
        self.save_frozen = save_frozen
        self._base: FrozenBase | None = None
        self._shard_mesh: DeviceMesh | None = None
        self._left_out: dict[str, int] = {}
        self._root = RootForward()

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
        if self._shard_mesh is None:
            self._shard_mesh = self.device_mesh["data_parallel"]
            if self.hybrid:
                shape, names = (self.num_nodes, self.num_processes), ("data_replicate", "data_shard")
                self._shard_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)
        return self._shard_mesh

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.model is not None and self.accelerator is not None
        self.accelerator.setup(trainer)
        check_precision(self.model, self.precision_plugin, self._precision_policy())
        self.model = self.precision_plugin.convert_module(self.model)
        if is_sharded(self.model):
            check_sharded_whole(self.model)
        else:
            self._shard()
        limit_waiting(self._timeout or default_pg_timeout)
        self.model_to_device()
        self._base = FrozenBase.of(self.model, self.save_frozen)
        self.barrier()
        if trainer.state.fn == "fit":
            self.setup_optimizers(trainer)
            check_optimizers(self.model, self.optimizers)
            if isinstance(self.model, FSDPModule) and any(_is_forward_only(o) for o in self.optimizers):
                # it waits for a backward otherwise
                self.model.set_reshard_after_forward(True, recurse=False)
        self.setup_precision_plugin()

    def _shard(self) -> None:
        assert self.model is not None
        if self.tensor_parallel_size != 1:
            raise ValueError(
                f"`tensor_parallel_size={self.tensor_parallel_size}` is for a module that splits its layers in its own"
                f" `configure_model`, and {type(self.model).__name__} does not."
            )
        check_can_shard(self.model)
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

    # ------------------------------------------------------------------ steps

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        if self.tensor_parallel_size != 1:
            return super().distributed_sampler_kwargs
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def run_in_forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function of the module's weights inside the root's forward, which gathers what no block holds.

        Backward passes may start at any output of the module inside it, also several of them.
        """
        assert self.model is not None
        return self._root.run(self.model, function, args, kwargs, once=False)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None and self.model is not None
        with self.precision_plugin.train_step_context():
            # by hand, backward passes come inside of the step
            once = self.lightning_module.automatic_optimization
            return self._root.run(self.model, self.lightning_module.training_step, args, kwargs, once=once)

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        assert self.model is not None
        if not _is_forward_only(optimizer):
            self._root.check_reduced(self.model)
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        root = self.model

        def evaluate() -> Any:
            self._root.gather_again(root)
            value = closure()
            # hooks on the step look for shards
            reshard(root)
            return value

        output = super().optimizer_step(optimizer, evaluate, model, **kwargs)
        self._root.gather_again(root)
        return output

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

    # ------------------------------------------------------------------ checkpoints

    @property
    def saves_shards(self) -> bool:
        """Whether DTensors and ``PerRank`` values of callbacks are written as they are."""
        return self._save_distributed_checkpoint

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.model is not None and self._base is not None
        self._left_out = self._base.unchanged(self.model)
        state = {name: value for name, value in model_state(self.model).items() if name not in self._left_out}
        return state if self.saves_shards else full_model_state(state, keep=self.is_global_zero)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        assert self.model is not None
        plain = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return (optimizer_state if self.saves_shards else numbered_optimizer_state)(self.model, plain)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        if storage_options is not None:
            raise ValueError(
                f"`storage_options={storage_options!r}` is for a `CheckpointIO`, which `fsdp2` does not use."
            )
        path = self.broadcast(filepath)
        checkpoint[BASE] = self._left_out
        states = checkpoint.get("optimizer_states", ())
        # other ranks than the first have none for a file
        checkpoint[_STATELESS] = [stateless_parameters(state) for state in states if state]
        if not self.saves_shards:
            write_file(path, checkpoint)
            return
        tensors = {"state_dict": checkpoint.pop("state_dict")}
        checkpoint.pop("optimizer_states", None)
        for index, state in enumerate(states):
            tensors[f"optimizer_{index}"] = state
        write_folder(path, tensors, checkpoint, asynchronous=self.async_checkpoint)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.model is not None and self.lightning_module is not None
        path = Path(self.broadcast(checkpoint_path))
        PendingWrite.settle()
        if path.is_file():
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        else:
            checkpoint = read_rest(path, self.shard_mesh, weights_only=weights_only)
        left_out = check_base(checkpoint, self.model, f"The checkpoint {str(path)!r}")
        strict = self.lightning_module.strict_loading
        # a checkpoint of weights alone is refused by Lightning, or by the task events
        optimizers = self.optimizers if "lr_schedulers" in checkpoint else []
        if path.is_file():
            load_full_model_state(self.model, checkpoint.pop("state_dict"), strict=strict, left_out=set(left_out))
            # an evaluation has no optimizers
            states = checkpoint.get("optimizer_states", ())
            check_number_of_optimizers(optimizers, states)
            without = checkpoint.pop(_STATELESS, [None] * len(states))
            for optimizer, saved, lacks in zip(optimizers, states, without, strict=False):
                load_full_optimizer_state(self.model, optimizer, saved, lacks)
            return checkpoint
        weights = {name: value for name, value in model_state(self.model).items() if name not in left_out}
        into: dict[str, Any] = {"state_dict": weights}
        # what an older release wrote has state of all
        stateless = checkpoint.pop(_STATELESS, [()] * len(optimizers))
        check_number_of_optimizers(optimizers, stateless)
        for index, optimizer in enumerate(optimizers):
            into[f"optimizer_{index}"] = optimizer_template(self.model, optimizer, stateless[index])
        read_tensors(path, into)
        self.model.load_state_dict(weights, strict=False)
        for index, optimizer in enumerate(optimizers):
            load_optimizer_state(self.model, optimizer, into[f"optimizer_{index}"])
        return checkpoint

    @override
    def remove_checkpoint(self, filepath: _PATH) -> None:
        # an older checkpoint counts until the newer one is on the disk
        PendingWrite.settle()
        super().remove_checkpoint(filepath)

    @override
    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        explain_lost_rank(exception, self.global_rank, self._timeout or default_pg_timeout)

    @override
    def teardown(self) -> None:
        PendingWrite.settle()
        super().teardown()


def _is_forward_only(optimizer: Optimizer) -> bool:
    """Return whether an optimizer evaluates its closure at several weights, and needs no backward of any."""
    return getattr(optimizer, "forward_only", False)
