"""The parts of a network that methods freeze or train as one: repeated blocks, layers, normalisations."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn
from torch.distributed.fsdp import FSDPModule

__all__ = ["find_blocks", "is_norm", "plain_class"]

_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)


def plain_class(module: nn.Module) -> type:
    """Return the class of a module, its own and not the one that ``fully_shard`` gave it."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a normalisation: torch's own, or a class that is named so (``LlamaRMSNorm``)."""
    return isinstance(module, _NORMS) or plain_class(module).__name__.endswith("Norm")


def find_blocks(network: nn.Module, patterns: list[str] | None) -> dict[str, dict[str, nn.Module]]:
    """Return the blocks of a network in its order: of each its layers, the modules with parameters of their own.

    Args:
        network: The network.
        patterns: Patterns (as in :mod:`fnmatch`) of the blocks' names. ``None``: the classes that a Hugging Face model
            names in ``_no_split_modules``; else the members of every list or sequence of several modules of one class;
            else every layer by itself.

    Returns:
        Layers by name, by the name of their block.

    Raises:
        ValueError: If a pattern matches no module with parameters, or what matches lies inside of each other.
    """
    if patterns is None:
        blocks = _repeated(network)
        if not blocks:
            return {name: {name: layer} for name, layer in _layers("", network).items()}
    else:
        blocks = _matching(network, patterns)
    return {name: _layers(name, block) for name, block in blocks.items()}


def _layers(name: str, block: nn.Module) -> dict[str, nn.Module]:
    return {
        path: layer
        for path, layer in block.named_modules(prefix=name)
        if any(True for _ in layer.parameters(recurse=False))
    }


def _repeated(network: nn.Module) -> dict[str, nn.Module]:
    whole = {name for part in network.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    blocks: dict[str, nn.Module] = {}
    for name, part in network.named_modules():
        if any(name.startswith(f"{block}.") for block in blocks):
            continue
        if plain_class(part).__name__ in whole:
            blocks[name] = part
        elif not whole and isinstance(part, (nn.ModuleList, nn.Sequential)):
            alike = len(part) > 1 and len({plain_class(member) for member in part}) == 1
            if alike and any(True for _ in part.parameters()):
                blocks.update({f"{name}.{index}" if name else index: member for index, member in part.named_children()})
    return blocks


def _matching(network: nn.Module, patterns: list[str]) -> dict[str, nn.Module]:
    if isinstance(patterns, str):
        raise ValueError(f"`blocks` must be a list of patterns, such as {[patterns]}, got {patterns!r}.")
    holding = {name: part for name, part in network.named_modules() if name and any(True for _ in part.parameters())}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in holding):
            raise ValueError(
                f"`blocks` pattern {pattern!r} matches no module with parameters in {plain_class(network).__name__}."
                f" Its names look like {list(holding)[:3]}."
            )
    blocks = {name: part for name, part in holding.items() if any(fnmatchcase(name, p) for p in patterns)}
    for name in blocks:
        if inside := [other for other in blocks if other.startswith(f"{name}.")]:
            raise ValueError(f"`blocks={patterns}` selects {name!r} and, inside of it, {inside[0]!r}: select one.")
    return blocks
