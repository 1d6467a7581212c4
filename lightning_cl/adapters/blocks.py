"""Deeper networks that compute what they computed before: Wu et al. 2024, "LLaMA Pro", arXiv:2401.02415."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from lightning_cl.adapters.identity import first_tensor, identity_copy
from lightning_cl.core.adapters import has_adapters
from lightning_cl.core.checks import check_count

__all__ = ["insert_blocks", "inserted_blocks", "keep_blocks"]

_MARK = "_lightning_cl_inserted"


def insert_blocks(network: nn.Module, count: int, *, stack: str | None = None, example: Any = None) -> list[str]:
    r"""Insert copies of blocks that change nothing yet, spread evenly over the depth of a network.

    The network's N blocks form ``count`` groups, and behind each comes a copy of its last block, whose output
    projections are zero, with their biases: with :math:`x + f(x)` for the attention and for the feed-forward part,
    :math:`f = 0`. So outputs stay the same to the bit, and the copy's zero projections learn first. They are found by
    computing: from the last layer of the block to the first, what changes its output, until that is the input, and of
    these no more than it takes.

    Indices of layers (for caches of keys and values) and the config's number of layers follow, so that the network is
    generated with, saved and loaded like any other. New blocks are trainable, in the dtype of the others; those of a
    quantized network are not quantized. Call it before adapters are added and before the strategy shards.

    Args:
        network: A model of transformers with its weights, or any network with an ``example``.
        count: New blocks, from 1 to N.
        stack: Name of the list of blocks; the one whose members are of one class if ``None``.
        example: What to call the network with, a mapping of arguments or a single one; the ``dummy_inputs`` of a model
            of transformers if ``None``.

    Returns:
        The names of the new blocks.

    Raises:
        ValueError: If the blocks have no identity (norms behind the residual sum, as in BERT) or the network computes
            something else with them, which then stays as it was; for adapters, shards, weights on the meta device.

    Example:
        >>> class Residual(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return x + self.layer(x).tanh()
        >>> class Network(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = nn.ModuleList([Residual(), Residual()])
        ...     def forward(self, x):
        ...         for block in self.blocks:
        ...             x = block(x)
        ...         return x
        >>> network, x = Network(), torch.ones(1, 4)
        >>> before = network(x)
        >>> insert_blocks(network, 2, example=x)
        ['blocks.1', 'blocks.3']
        >>> torch.equal(network(x), before)
        True
    """
    check_count("count", count)
    _check_order(network)
    name, blocks = _find_stack(network, stack)
    size = len(blocks)
    if count > size:
        raise ValueError(f"`count={count}` inserts more blocks than the {size} that {name!r} has: insert in turns.")
    sources = [(group + 1) * size // count - 1 for group in range(count)]
    with _evaluating(network), torch.no_grad():
        call = _caller(network, example)
        before, arguments = _watched(call, [blocks[source] for source in sources])
        new = [
            identity_copy(blocks[source], seen, f"{name}.{source}")
            for source, seen in zip(sources, arguments, strict=True)
        ]
        order = list(enumerate(blocks))
        for source, block in reversed(list(zip(sources, new, strict=True))):
            order.insert(source + 1, (source, block))
        undo = _number(network, blocks, order)
        differs = None if torch.equal(first_tensor(call()), before) else "its output"
        if differs := differs or _lost_in_config(network, name):
            undo()
            raise ValueError(
                f"{type(network).__name__} depends on the number or the place of its blocks: {differs} would be another"
                f" with blocks inserted into {name!r}. Use another `count`, or a method that inserts none."
            )
    for block in new:
        block.requires_grad_(True)
        block.train(network.training)
        setattr(block, _MARK, True)
    return [f"{name}.{index}" for index, (_, block) in enumerate(order) if any(block is each for each in new)]


def inserted_blocks(network: nn.Module) -> list[str]:
    """Return the names of the blocks that :func:`insert_blocks` put into a network; a loaded one knows them no more."""
    return [name for name, module in network.named_modules() if getattr(module, _MARK, False)]


def keep_blocks(network: nn.Module, count: int) -> None:
    """Cut a network of transformers off behind its first ``count`` blocks, in place; its config follows.

    Raises:
        ValueError: If it has fewer blocks, or if the list of them cannot be found.
    """
    name, blocks = _find_stack(network, None)
    if count > len(blocks):
        raise ValueError(f"{name!r} of {type(network).__name__} has {len(blocks)} blocks, and {count} shall be kept.")
    _number(network, blocks, list(enumerate(blocks))[:count])


# ---------------------------------------------------------------------- what it is for


def _check_order(network: nn.Module) -> None:
    kind = type(network).__name__
    if has_adapters(network):
        raise ValueError(f"{kind} has adapters already. Insert the blocks first, then add adapters.")
    if any(isinstance(parameter, DTensor) for parameter in network.parameters()):
        raise ValueError(f"{kind} is sharded already. Insert the blocks before the strategy shards it.")
    if any(parameter.is_meta for parameter in network.parameters()):
        raise ValueError(
            f"The weights of {kind} stand on the meta device (`fsdp2` builds language models there): there is nothing"
            " to copy yet. Grow the checkpoint instead: `insert_blocks` on the loaded model, `save_pretrained`, and"
            " give the module that folder."
        )


def _find_stack(network: nn.Module, name: str | None) -> tuple[str, nn.ModuleList]:
    lists = {path: part for path, part in network.named_modules() if isinstance(part, nn.ModuleList) and len(part)}
    if name is not None:
        if name not in lists:
            raise ValueError(
                f"`stack={name!r}` names no list of blocks in {type(network).__name__}: {list(lists)[:5]}."
            )
        return name, lists[name]
    depths = {config.num_hidden_layers for config in _configs(network)}
    alike = {path: part for path, part in lists.items() if len({type(member) for member in part}) == 1}
    outer = [path for path in alike if not any(path.startswith(f"{other}.") for other in alike)]
    found = [path for path in outer if not depths or len(alike[path]) in depths]
    if len(found) != 1:
        raise ValueError(
            f"{type(network).__name__} has {len(found)} lists of blocks of one class ({found[:3]}): name the one to"
            " grow by `stack`."
        )
    return found[0], alike[found[0]]


def _configs(network: nn.Module) -> list[Any]:
    """Return the configs of transformers in a network that count its layers."""
    configs: dict[int, Any] = {}
    for part in network.modules():
        config: Any = getattr(part, "config", None)
        if hasattr(config, "get_text_config"):
            config = config.get_text_config()
            if isinstance(getattr(config, "num_hidden_layers", None), int):
                configs[id(config)] = config
    return list(configs.values())


# ---------------------------------------------------------------------- running the network


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    training = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def _caller(network: nn.Module, example: Any) -> Callable[[], Any]:
    if example is None:
        example = getattr(network, "dummy_inputs", None)
    if example is None:
        raise ValueError(f"{type(network).__name__} has no `dummy_inputs`: give `example`, what to call it with.")
    device = next(network.parameters()).device
    example = tree_map_only(Tensor, lambda tensor: tensor.to(device), example)
    return lambda: network(**example) if isinstance(example, Mapping) else network(example)


def _watched(call: Callable[[], Any], blocks: Sequence[nn.Module]) -> tuple[Tensor, list[tuple[Any, Any]]]:
    """Return what the network returns, and what each of some blocks is called with."""
    seen: dict[int, tuple[Any, Any]] = {}

    def record(block: nn.Module, args: Any, kwargs: Any) -> None:
        # a cache of keys and values goes on changing
        seen[id(block)] = copy.deepcopy((args, kwargs))

    handles = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    try:
        output = first_tensor(call())
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) < len(blocks):
        raise ValueError("A forward of the network does not call the blocks that were to be copied.")
    return output, [seen[id(block)] for block in blocks]


# ---------------------------------------------------------------------- numbers


def _number(network: nn.Module, blocks: nn.ModuleList, order: list[tuple[int, nn.Module]]) -> Callable[[], None]:
    """Put blocks into a list, each with the place of its source before; return what takes it back."""
    size, kept = len(blocks), list(blocks)
    changed: list[tuple[Any, str, Any]] = []

    def change(owner: Any, name: str, value: Any) -> None:
        changed.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo() -> None:
        _fill(blocks, kept)
        for owner, name, value in reversed(changed):
            setattr(owner, name, value)

    _fill(blocks, [block for _, block in order])
    for place, (source, block) in enumerate(order):
        for part in block.modules():
            if getattr(part, "layer_idx", None) == source:
                change(part, "layer_idx", place)
    for config in _configs(network):
        if config.num_hidden_layers != size:
            continue
        for name, value in list(vars(config).items()):
            # such as `layer_types`: what each layer is
            if "layer" in name and isinstance(value, list) and len(value) == size:
                change(config, name, [value[source] for source, _ in order])
        change(config, "num_hidden_layers", len(order))
    return undo


def _lost_in_config(network: nn.Module, stack: str) -> str | None:
    """Return the name of something in the blocks that the model would have another way if it were loaded again."""
    if not hasattr(network, "dummy_inputs") or not _configs(network):
        return None
    with torch.device("meta"):
        built = type(network)(copy.deepcopy(network.config))
    mine, theirs = (dict(each.get_submodule(stack).named_modules(prefix=stack)) for each in (network, built))
    if other := mine.keys() ^ theirs.keys():
        return str(min(other))
    for name, module in mine.items():
        for attribute, value in vars(theirs[name]).items():
            found = getattr(module, attribute, value)
            if isinstance(value, (int, float, str)) and attribute != "training" and found != value:
                return f"{name}.{attribute}"
    return None


def _fill(blocks: nn.ModuleList, members: Sequence[nn.Module]) -> None:
    del blocks[:]
    blocks.extend(members)
