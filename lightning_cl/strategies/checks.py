"""What FSDP2 would fail on later, or train wrongly without a word: refused when the strategy sets a module up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch.plugins.precision import HalfPrecision, Precision
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_cl.quantization import quantized_layers

__all__ = ["check_optimizers", "check_precision", "check_shardable", "check_sharded_whole"]


def check_shardable(module: nn.Module, blocks: Mapping[str, nn.Module]) -> None:
    """Refuse what units of sharding cannot hold.

    Raises:
        ValueError: For modules wrapped by FSDP1, for a parameter shared between units, and for trainable parameters of
            several dtypes in one unit.
    """
    for name, part in module.named_modules():
        if isinstance(part, FullyShardedDataParallel):
            raise ValueError(
                f"{name!r} is wrapped by `FullyShardedDataParallel` (FSDP1), which does not mix with FSDP2: leave the"
                " wrapping to `strategy='fsdp2'`."
            )
    owners: dict[int, tuple[str, str]] = {}
    dtypes: dict[str, dict[object, str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        unit = _innermost(name, blocks)
        first_name, first_unit = owners.setdefault(id(parameter), (name, unit))
        if unit != first_unit:
            raise ValueError(
                f"{first_name!r} and {name!r} are one shared parameter in different units of sharding"
                f" ({first_unit or 'the root'!r} and {unit or 'the root'!r}), which FSDP2 would split in two. Give"
                " `FSDP2Strategy(wrap=...)` a function that leaves these units out, or untie the parameter."
            )
        if parameter.requires_grad:
            dtypes.setdefault(unit, {}).setdefault(parameter.dtype, name)
    for unit, found in dtypes.items():
        if len(found) > 1:
            examples = ", ".join(f"{name!r} is {dtype}" for dtype, name in found.items())
            raise ValueError(
                f"The trainable parameters of {unit or 'the root'!r} have several dtypes ({examples}), and FSDP2"
                " reduces one for each unit. Cast them to one (`autocast_adapter_dtype=False` for PEFT's adapters)."
            )


def check_precision(module: nn.Module, plugin: Precision, policy: MixedPrecisionPolicy) -> None:
    """Refuse a precision that casts packed bytes.

    Raises:
        ValueError: For ``"bf16-true"`` and its like, and for a dtype of FSDP2's own, over quantized weights that are
            stored in another dtype.
    """
    casts: list[tuple[str, torch.dtype]] = []
    if isinstance(plugin, HalfPrecision):
        casts.append((f"`Trainer(precision={plugin.precision!r})`", plugin._desired_input_dtype))
    if policy.param_dtype is not None:
        casts.append(("`FSDP2Strategy(mixed_precision=...)`", policy.param_dtype))
    for setting, dtype in casts:
        for name, layer in quantized_layers(module):
            packed = layer.weight.dtype
            # `Module.to(dtype)` leaves integers alone, FSDP2 casts them too
            if packed != dtype and (packed.is_floating_point or not setting.startswith("`Trainer")):
                raise ValueError(
                    f"{setting} would cast '{name}.weight', whose {packed} values are packed 4-bit bytes, to {dtype}."
                    " Use `Trainer(precision='32-true')` or 'bf16-mixed' and no `mixed_precision`: the quantized module"
                    " has its compute dtype already."
                )


def check_sharded_whole(module: nn.Module) -> None:
    """Refuse trainable parameters that came after sharding.

    Raises:
        ValueError: If a trainable parameter of a sharded module is no shard.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            raise ValueError(
                f"{name!r} was added after the module was sharded: its gradient would never be reduced over ranks. The"
                " order is: load, quantize, add adapters, shard; build all of it before the fit, or in"
                " `configure_model`."
            )


def check_optimizers(module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers over tensors that are not the module's.

    Raises:
        ValueError: If an optimizer was built before the module was sharded.
    """
    known = {id(parameter) for parameter in module.parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(id(parameter) not in known for parameter in group["params"]):
                raise ValueError(
                    f"{type(optimizer).__name__} holds parameters as they were before sharding and would train none of"
                    " the module's. Build it in `configure_optimizers`, from `self.parameters()`."
                )


def _innermost(parameter: str, blocks: Mapping[str, nn.Module]) -> str:
    return max((name for name in blocks if parameter.startswith(f"{name}.")), key=len, default="")
