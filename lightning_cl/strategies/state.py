"""Weights and optimizer state of a sharded module, on their way into a checkpoint and out of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_cl.core.state import local, shard

__all__ = [
    "check_number_of_optimizers",
    "full_model_state",
    "load_full_model_state",
    "load_full_optimizer_state",
    "load_optimizer_state",
    "model_state",
    "numbered_optimizer_state",
    "optimizer_state",
    "optimizer_template",
    "stateless_parameters",
]


def model_state(module: nn.Module) -> dict[str, Any]:
    """Return the state dict of a module with the tensors themselves, under the names that an uncompiled module has."""
    return {name.replace("_orig_mod.", ""): value for name, value in module.state_dict().items()}


def full_model_state(state: Mapping[str, Any], *, keep: bool) -> dict[str, Any]:
    """Gather a state dict on the CPU, one tensor after the other, on the ranks that ``keep`` it."""
    gathered: dict[str, Any] = {}
    for name, value in state.items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            gathered[name] = whole.cpu() if isinstance(whole, Tensor) else whole
    return gathered


def load_full_model_state(module: nn.Module, saved: Mapping[str, Any], *, strict: bool, left_out: set[str]) -> None:
    """Copy full tensors into the shards of a module.

    Args:
        module: The module, sharded.
        saved: A state dict with full tensors.
        strict: Refuse a state dict with other names than the module's.
        left_out: Names that the state dict may lack.

    Raises:
        ValueError: If names or shapes do not fit.
    """
    own = model_state(module)
    missing = sorted(own.keys() - saved.keys() - left_out)
    unknown = sorted(saved.keys() - own.keys())
    if strict and (missing or unknown):
        raise ValueError(
            f"The checkpoint does not fit {type(module).__name__}: it lacks {missing[:3]}, and has {unknown[:3]} that"
            " the module has not. Build the module of the run that wrote it, or set `strict_loading = False` on it."
        )
    with torch.no_grad():
        for name, target in own.items():
            if name not in saved or not isinstance(target, Tensor):
                continue
            value = saved[name]
            if target.shape != value.shape:
                raise ValueError(
                    f"The checkpoint has {name!r} of shape {tuple(value.shape)}, the module of {tuple(target.shape)}."
                )
            local(target).copy_(shard(value, target))


def optimizer_state(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the state dict of an optimizer by parameter names, as shards."""
    with _stepless(optimizer):
        return dict(get_optimizer_state_dict(module, optimizer))


@contextmanager
def _stepless(optimizer: Optimizer) -> Iterator[None]:
    """Keep torch from stepping an optimizer without state, as it has none after a task's end: the step would count.

    Torch takes one whose parameters have gradients for one that keeps no state.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if optimizer.state or not parameters or any(parameter.grad is not None for parameter in parameters):
        yield
        return
    parameters[0].grad = torch.zeros_like(parameters[0])
    try:
        yield
    finally:
        parameters[0].grad = None


def optimizer_template(module: nn.Module, optimizer: Optimizer, stateless: Collection[str]) -> dict[str, Any]:
    """Return a state dict of an optimizer that is new to read a saved one into.

    Args:
        module: The module, sharded.
        optimizer: Torch makes it take a step, if it has no state, and that state shows how values are sharded.
        stateless: The parameters that the saved one has no state of.
    """
    found: dict[str, Any] = dict(get_optimizer_state_dict(module, optimizer))
    return {**found, "state": {name: values for name, values in found["state"].items() if name not in stateless}}


def stateless_parameters(state: Mapping[str, Any]) -> list[Any]:
    """Return the names, or numbers, of the parameters that a state dict has no state of, as where it was reset."""
    return [name for name in _names(state["param_groups"]) if name not in state["state"]]


def load_optimizer_state(module: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load what :func:`optimizer_state` returned."""
    # where a task's end has reset them, parameters have no state; what is really missing is known before
    options = StateDictOptions(strict=False)
    set_optimizer_state_dict(module, optimizer, optim_state_dict=state, options=options)


def numbered_optimizer_state(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the full state dict of an optimizer by numbers, as ``optimizer.state_dict()`` without sharding is.

    It is empty on other ranks than 0; all ranks must call it.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    with _stepless(optimizer):
        state: dict[str, Any] = dict(get_optimizer_state_dict(module, optimizer, options=options))
    if not state:
        return {}
    numbers = {name: number for number, name in enumerate(_names(state["param_groups"]))}
    return {
        "state": {numbers[name]: values for name, values in state["state"].items()},
        "param_groups": [
            {**group, "params": [numbers[name] for name in group["params"]]} for group in state["param_groups"]
        ],
    }


def load_full_optimizer_state(
    module: nn.Module, optimizer: Optimizer, saved: dict[str, Any], stateless: Collection[int] | None = None
) -> None:
    """Load what :func:`numbered_optimizer_state` returned, or the state dict of a run without sharding.

    Args:
        module: The module, sharded.
        optimizer: Its optimizer.
        saved: The state dict.
        stateless: Numbers of the parameters that the run had no state of; ``None`` where it does not tell.

    Raises:
        ValueError: If the optimizer has other groups of parameters, or others have no state.
    """
    own = optimizer_template(module, optimizer, ())
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != [len(group["params"]) for group in own["param_groups"]]:
        raise ValueError(
            f"The checkpoint's {type(optimizer).__name__} has groups of {sizes} parameters, the module's of"
            f" {[len(group['params']) for group in own['param_groups']]}: build the optimizer of the run before."
        )
    names = _names(own["param_groups"])
    missing = [] if stateless is None else sorted(set(stateless_parameters(saved)) - set(stateless))
    if missing:
        raise ValueError(
            f"The checkpoint lacks the state of {type(optimizer).__name__} for {[names[n] for n in missing[:3]]}, which"
            " the run had: it is not whole. Go on from another one."
        )
    state = {
        names[number]: {key: _placed(value, own["state"][names[number]].get(key)) for key, value in values.items()}
        for number, values in saved["state"].items()
    }
    groups = [
        {**group, "params": mine["params"]}
        for group, mine in zip(saved["param_groups"], own["param_groups"], strict=True)
    ]
    load_optimizer_state(module, optimizer, {"state": state, "param_groups": groups})


def check_number_of_optimizers(optimizers: Sequence[Optimizer], states: Sequence[Any]) -> None:
    """Refuse the states of another number of optimizers; an evaluation has no optimizers."""
    if optimizers and len(optimizers) != len(states):
        raise ValueError(
            f"The checkpoint is of {len(states)} optimizers, and the module has {len(optimizers)}. Return those of the"
            " run that wrote it from `configure_optimizers`."
        )


def _names(groups: list[dict[str, Any]]) -> list[str]:
    return [name for group in groups for name in group["params"]]


def _placed(value: Any, like: Any) -> Any:
    if isinstance(like, DTensor):
        return DTensor.from_local(
            shard(value, like), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )
    return value
