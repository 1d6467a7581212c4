"""Putting the second slot into a user's PEFT model."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_cl.adapters.slot import PAST, Slot, SlotFactor
from lightning_cl.core.imports import require
from lightning_cl.core.rng import isolated_rng

__all__ = ["add_slots", "peft_models"]


def peft_models(module: nn.Module) -> list[Any]:
    """Return the PEFT models in a module."""
    kind = require("peft", extra="llm").PeftModel
    return [part for part in module.modules() if isinstance(part, kind)]


def add_slots(
    pl_module: LightningModule, past_rank: Callable[[int], int], user: str, extend: Callable[[Slot], None]
) -> dict[str, Slot]:
    """Return the slots of every layer with LoRA, by the layer's name; those that are not there yet are added.

    Args:
        pl_module: The user's module, its PEFT models with one active LoRA adapter each.
        past_rank: Returns the rank of the slot for finished tasks, given that of the present one.
        user: The callback, for errors.
        extend: Called for every slot that is new.

    Raises:
        ValueError: Without a PEFT model; for adapters other than plain LoRA on linear layers, for a sharded module, or
            for slots of another capacity.
    """
    models = peft_models(pl_module)
    if not models:
        raise ValueError(
            f"`{user}` works on the LoRA adapters of {type(pl_module).__name__}, which has none. Put them in where the"
            " network is built, by `lightning_cl.adapters.add_adapters` or `peft.get_peft_model`, such as"
            " `adapter={'peft_type': 'LORA', 'r': 8, 'target_modules': 'all-linear'}` of our modules."
        )
    found: dict[str, Slot] = {}
    layers = dict(pl_module.named_modules())
    for model in models:
        current = _current(model, user)
        inside = {id(layer) for layer in model.modules()}
        slots = [
            Slot(name, layer, current)
            for name, layer in layers.items()
            if id(layer) in inside and hasattr(layer, "lora_A") and current in layer.r
        ]
        _check(slots, model.peft_config[current], user)
        capacity = past_rank(max(slot.rank(current) for slot in slots))
        if PAST not in model.peft_config:
            _add(model, current, capacity, slots)
            for slot in slots:
                slot.slot_factor(PAST).owner = user
                extend(slot)
        for slot in slots:
            _check_past(slot, capacity, user)
        found |= {slot.name: slot for slot in slots}
    return found


def _current(model: Any, user: str) -> str:
    """Return the adapter that trains."""
    active = [name for name in model.active_adapters if name != PAST]
    if len(active) != 1 or model.peft_config[active[0]].peft_type != "LORA":
        kinds = {name: str(getattr(config.peft_type, "value", "")) for name, config in model.peft_config.items()}
        raise ValueError(
            f"`{user}` needs one active LoRA adapter to train, and the PEFT model has {kinds}, active: {active}. Choose"
            " one by `set_adapter`, and delete adapters that nothing uses."
        )
    return str(active[0])


def _check(slots: list[Slot], config: Any, user: str) -> None:
    for slot in slots:
        layer, current = slot.layer, slot.current
        down: Any = dict(layer.lora_A.items()).get(current)
        base = layer.get_base_layer()
        # a quantized layer is an `nn.Linear` too; PEFT computes attention as a whole from merged weights
        plain = isinstance(down, nn.Linear) and (isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D")
        if not plain or current in layer.lora_variant or layer.lora_bias.get(current):
            raise ValueError(
                f"`{user}` folds plain LoRA on linear layers, and {slot.name!r} is a {type(layer).__name__} with other"
                " settings. Leave it out of `target_modules`, and DoRA, `lora_bias` and other variants out of the"
                " config."
            )
        if isinstance(down.weight, DTensor) and PAST not in layer.lora_A:
            raise ValueError(
                f"`{user}` adds its slots before the module is sharded, and {slot.name!r} is sharded already: shard by"
                " the strategy (`fsdp2`), or add the callback before."
            )
        if layer.merged:
            raise ValueError(f"The adapters of {slot.name!r} are merged. Unmerge them (`unmerge_adapter`) first.")
    if config.target_parameters:
        raise ValueError(
            f"`{user}` folds LoRA on layers, and `target_parameters={config.target_parameters}` adapts parameters by"
            " themselves: leave it out, and name linear layers in `target_modules`."
        )
    start = config.init_lora_weights
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise ValueError(
            f"`init_lora_weights={start!r}` changes the base weight for one adapter, and `{user}` starts a new one for"
            " every task on the same base. Use `init_lora_weights=True`."
        )


def _check_past(slot: Slot, capacity: int, user: str) -> None:
    """Refuse a slot that an adapter of the user, another method or other settings made."""
    down = dict(slot.layer.lora_A.items()).get(PAST)
    if not isinstance(down, SlotFactor):
        raise ValueError(
            f"The PEFT model has an adapter of the name {PAST!r} of its own at {slot.name!r}, which is the name of the"
            f" slot for finished tasks of `{user}`. Give it another name, or delete it (`delete_adapter`)."
        )
    if (rank := down.out_features) != capacity or down.owner != user:
        raise ValueError(
            f"`{user}` wants slots of rank {capacity} for finished tasks, but the module has some of rank {rank} from"
            f" before, made by `{down.owner}`: go on with the method and settings of that fit, or with a module without"
            " slots."
        )


def _add(model: Any, current: str, capacity: int, slots: list[Slot]) -> None:
    peft = require("peft", extra="llm")
    like = model.peft_config[current]
    names = {id(layer): name for name, layer in model.base_model.model.named_modules()}
    config = peft.LoraConfig(
        r=capacity,
        # the scaling of the present slot, so that factors go over as they are, also where PEFT loads them
        alpha_pattern={f"^{re.escape(names[id(slot.layer)])}": slot.scaling * capacity for slot in slots},
        target_modules=like.target_modules,
        exclude_modules=like.exclude_modules,
        layers_to_transform=like.layers_to_transform,
        layers_pattern=like.layers_pattern,
        fan_in_fan_out=like.fan_in_fan_out,
    )
    flags = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    meta = any(slot.down(current).weight.is_meta for slot in slots)
    with isolated_rng(0), warnings.catch_warnings():
        # PEFT 0.21 asks for it by the name that transformers 5.23 deprecates
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        # not the method of a subclass for classifiers, which would give the slot a head of its own
        peft.PeftModel.add_adapter(model, PAST, config, low_cpu_mem_usage=meta, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        parameter.requires_grad_(flags.get(id(parameter), False))
    for slot in slots:
        factor = slot.slot_factor(PAST)
        factor.zeros = True
        like_weight = slot.down(current).weight
        with torch.no_grad():
            for part in (factor, slot.up(PAST)):
                part.to(like_weight.device, like_weight.dtype)
            if not meta:
                factor.start()
