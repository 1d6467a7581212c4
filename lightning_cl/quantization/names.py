"""Names that a module's tensors have in a checkpoint, whatever adapters and wrappers were put around them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

__all__ = ["Place", "checkpoint_name", "places"]

# what wrappers put into a name: PEFT around a layer, activation checkpointing, torch.compile
_WRAPPERS = ("base_layer", "original_module", "_checkpoint_wrapped_module", "_orig_mod")


class Place(NamedTuple):
    """Where a tensor stands.

    Args:
        module: The module that holds it.
        attribute: Its name there.
        tensor: The parameter or buffer.
        name: Its name in a checkpoint of the base model; ``None`` for what only an adapter has.
        adapter: Whether it belongs to an adapter.
        buffer: Whether it is a buffer.
        persistent: Whether a checkpoint holds it.
    """

    module: nn.Module
    attribute: str
    tensor: Tensor
    name: str | None
    adapter: bool
    buffer: bool
    persistent: bool


def checkpoint_name(name: str) -> str:
    """Return a name without what PEFT and other wrappers put into it.

    Example:
        >>> checkpoint_name("base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight")
        'model.layers.0.self_attn.q_proj.weight'
    """
    parts = name.removeprefix("base_model.model.").split(".")
    return ".".join(part for part in parts if part not in _WRAPPERS)


def _is_peft(module: nn.Module) -> bool:
    # through the base classes: FSDP2 gives a sharded module a class of its own
    return any(cls.__module__.startswith("peft.") for cls in type(module).__mro__)


def _children(module: nn.Module, name: str | None, adapter: bool) -> Iterator[tuple[nn.Module, str | None, bool]]:
    """Yield the children of ``module`` with their checkpoint names, and whether they belong to an adapter."""

    def joined(part: str) -> str | None:
        return None if name is None else f"{name}.{part}".lstrip(".")

    for part, child in module.named_children():
        if part in ("_checkpoint_wrapped_module", "_orig_mod"):
            yield child, name, adapter
        elif not _is_peft(module) or adapter:
            yield child, joined(part), adapter
        elif part in ("base_model", "model", "base_layer", "original_module"):
            yield child, name, adapter
        elif part == "modules_to_save":  # trained copies of whole modules, one for each adapter
            for copy in child.children():
                yield copy, name, True
        else:
            yield child, None, True


def places(module: nn.Module, name: str | None = "", adapter: bool = False) -> Iterator[Place]:
    """Yield where the parameters and buffers of ``module`` stand; a shared parameter once for each place.

    Args:
        module: The module.
        name: Its name in the checkpoint.
        adapter: Whether all of it belongs to an adapter.
    """
    own_name = None if _is_peft(module) and not adapter else name
    own_adapter = adapter or _is_peft(module)
    for attribute, parameter in module._parameters.items():
        if parameter is not None:
            yield Place(module, attribute, parameter, _join(own_name, attribute), own_adapter, False, True)
    for attribute, buffer in module._buffers.items():
        if buffer is not None:
            persistent = attribute not in module._non_persistent_buffers_set
            yield Place(module, attribute, buffer, _join(own_name, attribute), own_adapter, True, persistent)
    for child, child_name, child_adapter in _children(module, name, adapter):
        yield from places(child, child_name, child_adapter)


def _join(name: str | None, attribute: str) -> str | None:
    return None if name is None else f"{name}.{attribute}".lstrip(".")
