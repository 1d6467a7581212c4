"""The LoRA factors of a module that train, by the block of the network that they stand in."""

from __future__ import annotations

import re

from torch import nn
from torch.nn import Parameter

from lightning_cl.adapters.build import peft_models

__all__ = ["is_start_zero", "lora_blocks"]

_FACTOR = re.compile(r"^(?P<layer>.+)\.lora_(embedding_)?[AB]\.[^.]+(\.weight)?$")


def lora_blocks(module: nn.Module, user: str) -> dict[str, dict[str, Parameter]]:
    """Return the trainable LoRA factors by block and by name, in the order of the network.

    A block is what a layer's name says up to its first number, such as ``"model.layers.3"``; a layer without one is a
    block of its own.

    Args:
        module: A module with a PEFT model in it, sharded or not.
        user: What works on them, for errors.

    Raises:
        ValueError: If there is none, and for parameters of variants of LoRA, such as DoRA, that are no factors.
    """
    found: dict[str, dict[str, Parameter]] = {}
    for name, parameter in module.named_parameters():
        if ".lora_" not in name or not parameter.requires_grad:
            continue
        factor = _FACTOR.match(name)
        if factor is None:
            raise ValueError(
                f"`{user}` works on the factors A and B of plain LoRA, and {name!r} is neither. Leave DoRA, `lora_bias`"
                " and other variants out of the adapter's config."
            )
        block = re.match(r".*?\.\d+(?=\.|$)", layer := factor["layer"])
        found.setdefault(block[0] if block else layer, {})[name] = parameter
    if not found:
        raise ValueError(
            f"`{user}` works on LoRA adapters that train, and {type(module).__name__} has"
            f" {'none that do' if peft_models(module) else 'no adapters'}. Put them in where the network is built, by"
            " `lightning_cl.adapters.add_adapters` or `peft.get_peft_model`."
        )
    return found


def is_start_zero(name: str) -> bool:
    """Return whether a factor is the one of its pair that PEFT starts with zeros: B, and A of an embedding."""
    return ".lora_B." in name or ".lora_embedding_A." in name
