"""Switching adapters off for a forward of the base model, whatever library put them in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["adapters_disabled", "has_adapters", "trained_beside_adapters"]

# PEFT's layers, its trained copies of whole modules and our prompts look at it in their forward
_FLAG = "_disable_adapters"
# in PEFT's layers, what computes when they are off
_BASES = ("base_layer.", "original_module.")


@contextmanager
def adapters_disabled(module: nn.Module) -> Iterator[None]:
    """Let ``module`` compute as its base model; what trains and what is active stays as it is.

    PEFT's own ``disable_adapter()`` makes every active adapter trainable when it ends, also what was frozen by hand.
    A graph from inside the block gives no gradient to adapters, so a student's forward comes outside of it.

    Args:
        module: A module with adapters of PEFT, or with prompts, in any depth; one without them is left as it is.

    Raises:
        ValueError: If adapters are merged into the base weights, which then are no base weights; for prompts of PEFT,
            which have no such switch (:class:`~lightning_cl.adapters.L2P` and our other prompts have).

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> adapted = get_peft_model(model, LoraConfig(r=1, target_modules=["0"], init_lora_weights=False))
        >>> with adapters_disabled(adapted):
        ...     adapted.base_model.model[0].disable_adapters
        True
        >>> adapted.base_model.model[0].disable_adapters
        False
    """
    if (kind := _unswitchable(module)) is not None:
        raise ValueError(
            f"PEFT's {kind} acts outside of its layers and has no switch there, so it cannot be left out of a forward."
            " Use LoRA or prompts of `lightning_cl` (`L2P`, `ProgressivePrompts`, ...); or, with a teacher,"
            " `teacher='pretrained'`, which keeps a copy."
        )
    found = _switchable(module)
    if any(getattr(part, "merged", False) for part in found):
        raise ValueError(
            "Adapters are merged into the base weights, so there is no base model to compute with. Unmerge them"
            " (`unmerge_adapter`) first."
        )
    before = [getattr(part, _FLAG) for part in found]
    try:
        for part in found:
            setattr(part, _FLAG, True)
        yield
    finally:
        for part, flag in zip(found, before, strict=True):
            setattr(part, _FLAG, flag)


def has_adapters(module: nn.Module) -> bool:
    """Return whether there are adapters in ``module``, also such as :func:`adapters_disabled` refuses."""
    return bool(_switchable(module)) or _unswitchable(module) is not None


def trained_beside_adapters(module: nn.Module) -> list[str]:
    """Return the names of trainable parameters that :func:`adapters_disabled` leaves in use, such as a head's."""
    switched = {
        id(parameter)
        for part in _switchable(module)
        for name, parameter in part.named_parameters()
        if not name.startswith(_BASES)
    }
    return [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in switched]


def _unswitchable(module: nn.Module) -> str | None:
    """Return the kind of adapters in ``module`` that no layer has a switch for."""
    for part in module.modules():
        configs = getattr(part, "peft_config", None)
        for config in configs.values() if isinstance(configs, Mapping) else ():
            if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
                return str(getattr(config.peft_type, "value", config.peft_type))
    return None


def _switchable(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if isinstance(getattr(part, _FLAG, None), bool)]
