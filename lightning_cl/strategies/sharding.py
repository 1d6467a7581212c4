"""Which submodules of a module become units of FSDP2.

The units are what ranks gather and free together: the repeated blocks of a network, then the LightningModule itself
with all that no block holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from torch import nn
from torch.distributed.tensor import DTensor

__all__ = ["WrapPolicy", "find_blocks", "is_sharded"]

WrapPolicy = Literal["auto"] | Sequence[str] | Callable[[str, nn.Module], bool]


def is_sharded(module: nn.Module) -> bool:
    """Return whether a parameter of ``module`` is sharded already."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def find_blocks(module: nn.Module, wrap: WrapPolicy = "auto") -> dict[str, nn.Module]:
    """Return the blocks of ``module`` by name, inner blocks before the outer ones that hold them.

    Args:
        module: The LightningModule.
        wrap: ``"auto"``: the classes that a Hugging Face model names in ``_no_split_modules``, else the members of
            every ``ModuleList`` whose members are of one class; or a list of class names; or a function of a
            submodule's name and the submodule.

    Raises:
        ValueError: If ``wrap`` names a class that the module has not, or selects a module without a forward.
    """
    if wrap == "auto":
        blocks = _of_classes(module, _no_split_classes(module)) or _members_of_lists(module)
    elif callable(wrap):
        blocks = {name: block for name, block in module.named_modules() if name and wrap(name, block)}
    else:
        blocks = _of_classes(module, _checked_names(module, wrap))
    for name, block in blocks.items():
        if isinstance(block, (nn.ModuleList, nn.ModuleDict)):
            raise ValueError(
                f"`wrap` selects {name!r}, a {type(block).__name__}, which has no forward: select its members."
            )
    holding = {name: block for name, block in blocks.items() if any(True for _ in block.parameters())}
    return dict(reversed(holding.items()))


def _no_split_classes(module: nn.Module) -> set[str]:
    return {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}


def _of_classes(module: nn.Module, classes: set[str]) -> dict[str, nn.Module]:
    return {name: block for name, block in module.named_modules() if name and type(block).__name__ in classes}


def _members_of_lists(module: nn.Module) -> dict[str, nn.Module]:
    """Return the members of the outermost lists of several modules of one class."""
    blocks: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        alike = isinstance(part, nn.ModuleList) and len(part) > 1 and len({type(member) for member in part}) == 1
        if alike and not any(name.startswith(f"{block}.") for block in blocks):
            blocks.update({f"{name}.{index}": member for index, member in part.named_children()})
    return blocks


def _checked_names(module: nn.Module, wrap: Sequence[str]) -> set[str]:
    if isinstance(wrap, str):
        raise ValueError(f"`wrap` must be 'auto', a list of class names such as {[wrap]}, or a function, got {wrap!r}.")
    known = Counter(type(part).__name__ for part in module.modules())
    if unknown := [name for name in wrap if name not in known]:
        raise ValueError(
            f"`wrap` names {unknown[0]!r}, but {type(module).__name__} has no submodule of that class; its most"
            f" frequent ones are {[name for name, _ in known.most_common(5)]}."
        )
    return set(wrap)
