"""The frozen part of a module: left out of checkpoints, recognised by its fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_cl.core.state import local
from lightning_cl.quantization.layers import quantized_layers, state_tensors
from lightning_cl.strategies.fingerprint import check_fingerprint, fingerprint

__all__ = ["BASE", "FrozenBase", "check_base", "leave_out_base", "put_back_base"]

BASE = "lightning_cl_base"
_ATTRIBUTE = "_lightning_cl_base"


class FrozenBase:
    """What was frozen when a module was first set up, and whether it is still the same.

    A weight of the base that trains or changes later is an ordinary one from then on: checkpoints hold it.

    Args:
        module: The LightningModule, sharded.
        save: Keep frozen weights in checkpoints; ``None`` does so unless they are the greater part of the module.
    """

    def __init__(self, module: nn.Module, save: bool | None) -> None:
        frozen = _frozen(module)
        if save is None:
            trained = {name: p for name, p in module.named_parameters() if name not in frozen}
            save = _bytes(frozen) <= _bytes(trained)
        self.fingerprint: dict[str, int] = {} if save else fingerprint(_with_scales(module, set(frozen)))

    @classmethod
    def of(cls, module: nn.Module, save: bool | None) -> FrozenBase:
        """Return the base of a module as it was at its first fit, before any callback changed a frozen weight."""
        if _ATTRIBUTE not in module.__dict__:
            module.__dict__[_ATTRIBUTE] = cls(module, save)
        base = module.__dict__[_ATTRIBUTE]
        assert isinstance(base, cls)
        return base

    def unchanged(self, module: nn.Module) -> dict[str, int]:
        """Return the fingerprint of what a checkpoint may leave out now; all ranks must call it."""
        frozen = _frozen(module).keys() & self.fingerprint.keys()
        now = fingerprint(_with_scales(module, frozen))
        changed = {name for name, checksum in now.items() if self.fingerprint[name] != checksum}
        # a quantized weight stays with its scales
        changed |= {name for name in now if any(other.startswith(f"{name}.") for other in changed)}
        return {name: checksum for name, checksum in now.items() if name not in changed}


def check_base(checkpoint: Mapping[str, Any], module: nn.Module, source: str) -> dict[str, int]:
    """Return the fingerprint of what a checkpoint leaves out, after a look at the module's; all ranks must call it.

    Args:
        checkpoint: What was loaded.
        module: The module that it is for.
        source: The checkpoint's name, for errors.

    Raises:
        ValueError: If a weight that the checkpoint leaves out differs from the module's.
    """
    saved: dict[str, int] = checkpoint.get(BASE, {})
    known = {name: value for name, value in _all_tensors(module).items() if name in saved}
    check_fingerprint(saved, fingerprint(known), source)
    return saved


def leave_out_base(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Replace the frozen weights in a full checkpoint by their fingerprint; all ranks must call it."""
    left_out = FrozenBase.of(module, None).unchanged(module)
    state = checkpoint["state_dict"]
    for name in list(state):
        # the scales of a quantized weight stand under names below its own
        if name in left_out or any(name.startswith(f"{weight}.") for weight in left_out):
            del state[name]
    checkpoint[BASE] = left_out


def put_back_base(checkpoint: dict[str, Any], module: nn.Module, source: str) -> None:
    """Put the module's own frozen weights where a full checkpoint leaves them out, for strict loading.

    Raises:
        ValueError: If they are not those that the checkpoint was trained on.
    """
    left_out = check_base(checkpoint, module, source)
    state = checkpoint["state_dict"]
    state.update({name: value for name, value in module.named_parameters() if name in left_out})


def _frozen(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in module.named_parameters() if not parameter.requires_grad}


def _with_scales(module: nn.Module, names: set[str]) -> dict[str, Tensor]:
    """Return the named parameters, with the scales of those that are quantized."""
    return {
        name: tensor
        for name, tensor in _all_tensors(module).items()
        if name in names or name.rpartition(".")[0] in names
    }


def _all_tensors(module: nn.Module) -> dict[str, Tensor]:
    scales = {
        f"{name}.weight.{index}": tensor
        for name, layer in quantized_layers(module)
        for index, tensor in enumerate(state_tensors(layer))
    }
    return {**dict(module.named_parameters()), **scales}


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(local(tensor).nbytes for tensor in tensors.values())
