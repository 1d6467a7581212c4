"""Tensors without values, and a process group without other ranks: what stands in for a run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import debug
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_cl.core.lazy import LazyWeights
from lightning_cl.quantization.layers import quantized_layers
from lightning_cl.quantization.simulated import fill_with_fakes
from lightning_cl.strategies import FSDP2Strategy

__all__ = ["AllDistinct", "build_module", "fake_ranks", "faked", "give_fakes", "values_of_masks"]


@contextmanager
def fake_ranks(world_size: int) -> Iterator[None]:
    """Let this process be rank 0 of so many, the others of which do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        # torch keeps the layout of what operations returned, and with it a mesh on which this process is rank 0: a real
        # rank that is forked from it later would write that rank's shards
        debug._clear_sharding_prop_cache()


def build_module(trainer: Trainer, module: LightningModule) -> None:
    """Call ``configure_model``, so that a module whose weights may come later stands on the meta device."""
    real = trainer.strategy
    if isinstance(module, LazyWeights) and not isinstance(real, FSDP2Strategy):
        sharding: Any = FSDP2Strategy()
        sharding.accelerator, sharding.parallel_devices = real.accelerator, [torch.device("cpu")]
        trainer._accelerator_connector.strategy = sharding
    try:
        with trainer.precision_plugin.module_init_context():
            module.configure_model()
    finally:
        trainer._accelerator_connector.strategy = real


def give_fakes(module: nn.Module, mode: FakeTensorMode) -> None:
    """Put tensors without values in the place of all parameters and buffers, on the CPU; what is shared stays so."""
    fill_with_fakes(module, mode)
    packed = {id(layer.weight) for _, layer in quantized_layers(module)}
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is None or id(tensor) in packed:
                    continue
                if id(tensor) not in made:
                    with mode:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                        is_parameter = isinstance(tensor, Parameter)
                        made[id(tensor)] = Parameter(fake, tensor.requires_grad) if is_parameter else fake
                table[name] = made[id(tensor)]  # type: ignore[assignment]


class AllDistinct(TorchDispatchMode):
    """Lets all values of a tensor without values be different, which takes the most memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._unique2.default:
            values = args[0]
            return values.new_empty(values.numel()), torch.empty_like(values), values.new_empty(values.numel())
        return func(*args, **(kwargs or {}))


@contextmanager
def values_of_masks(module: nn.Module, batch: Any) -> Iterator[None]:
    """Let models of transformers know what they would read from the values of a batch.

    If nothing is padded and no texts are packed into a row, they need no mask of [B, 1, T, T], and repeat no keys and
    values; without values they are careful.
    """
    masking: Any = sys.modules.get("transformers.masking_utils")
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    plain = isinstance(batch, Mapping) and "position_ids" not in batch and (mask is None or bool(mask.all()))
    if not plain or not hasattr(masking, "find_packed_sequence_indices"):
        yield
        return

    def without_mask(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, kwargs | ({"attention_mask": None} if "attention_mask" in kwargs else {})

    for part in module.modules():
        if hasattr(part, "_init_weights") and hasattr(part, "config"):
            part.register_forward_pre_hook(without_mask, with_kwargs=True)
    find_packed = masking.find_packed_sequence_indices
    masking.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking.find_packed_sequence_indices = find_packed


def faked(mode: FakeTensorMode) -> Callable[[Any], Any]:
    """Return a function that takes the values from a tensor, and leaves all else as it is."""
    return lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf
