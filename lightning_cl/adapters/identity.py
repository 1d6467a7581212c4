"""A copy of a block of a network that returns its input, found by computing."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_cl.quantization import dequantize, quantized_layers

__all__ = ["first_tensor", "identity_copy"]


def first_tensor(value: Any) -> Tensor:
    """Return the first floating-point tensor in what a network takes or returns."""
    leaves = tree_leaves(dict(value) if isinstance(value, Mapping) else value)
    return next(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())


def identity_copy(source: nn.Module, arguments: tuple[Any, Any], name: str) -> nn.Module:
    """Return a copy of a block that returns its input, by the fewest zero projections.

    Args:
        source: The block.
        arguments: What it is called with: positional and keyword arguments, the first tensor of which goes through it.
        name: Of the block, for errors.

    Raises:
        ValueError: If no zero weights make it return its input, or those that do would stay zero.
    """
    block = _plain_copy(source)
    hidden = first_tensor(arguments)

    def computed() -> Tensor:
        args, kwargs = copy.deepcopy(arguments)
        return first_tensor(block(*args, **kwargs))

    zeroed: list[list[tuple[Tensor, Tensor]]] = []
    output = computed()
    for tensors in _projections(block, arguments):
        if torch.equal(output, hidden):
            break
        kept = [(tensor, tensor.detach().clone()) for tensor in tensors]
        for tensor in tensors:
            tensor.zero_()
        if torch.equal(new := computed(), output):
            # behind zeros already
            _restore(kept)
        else:
            zeroed.append(kept)
            output = new
    if not torch.equal(output, hidden):
        raise ValueError(
            f"The block {name!r} ({type(source).__name__}) cannot be the identity: no zero weights make it return its"
            " input, as with norms behind the residual sum (BERT). Only blocks that add to their input can be inserted."
        )
    needed: list[list[Tensor]] = []
    for kept in zeroed:
        _restore(kept)
        if not torch.equal(computed(), hidden):
            needed.append([tensor.zero_() for tensor, _ in kept])
    if not _can_learn(block, arguments, needed):
        raise ValueError(f"The block {name!r} ({type(source).__name__}) could not learn from the zeros that it needs.")
    return block


def _restore(kept: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, value in kept:
        tensor.copy_(value)


def _plain_copy(source: nn.Module) -> nn.Module:
    """Return a copy with plain weights where the source has quantized ones."""
    block = copy.deepcopy(source)
    for name, layer in list(quantized_layers(block)):
        weight: Any = dequantize(layer)
        bias: Any = layer.bias
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype)
        plain.weight.copy_(weight)
        if bias is not None:
            plain.bias.copy_(bias)
        block.set_submodule(name, plain)
    return block


def _projections(block: nn.Module, arguments: tuple[Any, Any]) -> list[list[Tensor]]:
    """Return the matrices of a block, each with its bias, from the one that is used last to the first."""
    holders = [part for part in block.modules() if any(p.ndim > 1 for p in part.parameters(recurse=False))]
    calls: list[nn.Module] = []
    handles = [part.register_forward_hook(lambda module, args, output: calls.append(module)) for part in holders]
    args, kwargs = copy.deepcopy(arguments)
    block(*args, **kwargs)
    for handle in handles:
        handle.remove()
    last = {id(part): place for place, part in enumerate(calls)}
    paths = {id(part): path for path, part in block.named_modules()}
    # experts of one list are one: tokens may reach only some of them
    found: dict[Any, list[Tensor]] = {}
    for part in sorted(holders, key=lambda part: last.get(id(part), -1)):
        own = dict(part.named_parameters(recurse=False))
        for name, matrix in own.items():
            if matrix.ndim > 1 and matrix.is_floating_point():
                key = (_without_places(block, paths[id(part)]), name, matrix.shape)
                biases = [own[other] for other in (name.replace("weight", "bias"), f"{name}_bias") if other in own]
                found[key] = [*found.pop(key, []), matrix, *(bias for bias in biases if bias is not matrix)]
    return list(found.values())[::-1]


def _without_places(block: nn.Module, path: str) -> str:
    """Return the path of a module with a star for each place in a list."""
    parts = path.split(".")
    for index in range(1, len(parts)):
        if isinstance(block.get_submodule(".".join(path.split(".")[:index])), nn.ModuleList):
            parts[index] = "*"
    return ".".join(parts)


def _can_learn(block: nn.Module, arguments: tuple[Any, Any], zeroed: list[list[Tensor]]) -> bool:
    """Return whether something of each projection at zero has a gradient: not so behind other zeros."""
    args, kwargs = copy.deepcopy(arguments)
    block.requires_grad_(True)
    with torch.enable_grad():
        output = first_tensor(block(*args, **kwargs))
        # weighed, because a norm before it would make a plain sum constant
        (output * output.detach().cos()).sum().backward()
    found = [any(t.grad is not None and bool(t.grad.any()) for t in tensors) for tensors in zeroed]
    block.zero_grad(set_to_none=True)
    return all(found)
