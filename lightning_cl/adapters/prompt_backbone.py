"""What prompts need to know of a network of transformers: where it is, how wide it is, where its attention is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

__all__ = ["Backbone", "LayerPrefix", "arguments", "attention_modules", "bind", "find_backbone", "visible_prefix"]


@dataclass(frozen=True)
class Backbone:
    """A network of transformers that prompts are put into.

    Args:
        name: Its name in the LightningModule.
        module: The network without its head, such as a ``BertModel``.
        width: Entries of an embedding.
        key_heads: Heads of keys and values.
        head_width: Entries of a head.
        causal: Whether a position sees only those before it.
        embeddings: What makes the first hidden states of tokens, positions and all, ``None`` if no module does.
        layers: How many of its layers take key and value prefixes.
        token_range: First values of tokens are drawn up to here on either side.
    """

    name: str
    module: Any
    width: int
    key_heads: int
    head_width: int
    causal: bool
    embeddings: nn.Module | None
    layers: int
    token_range: float

    def check_layers(self, setting: str, layers: Sequence[int]) -> list[int]:
        """Return layers that a setting names; each must take prefixes."""
        kind = type(self.module).__name__
        if not self.layers:
            raise ValueError(
                f"Key and value prefixes go into attention by its cache, and that of `{kind}` takes none. Use a method"
                " with prompts at the input: `L2P`, `ProgressivePrompts` or `SPrompts`."
            )
        implementation = self.module.config._attn_implementation
        if implementation not in ("eager", "sdpa"):
            raise ValueError(
                f"Key and value prefixes need `attn_implementation='sdpa'` or `'eager'`, `{kind}` has"
                f" {implementation!r}."
            )
        if not layers or len(set(layers)) < len(layers) or any(not 0 <= layer < self.layers for layer in layers):
            raise ValueError(
                f"`{setting}` must name layers of `{kind}` from 0 to {self.layers - 1}, each once, got {list(layers)}."
            )
        return list(layers)


def find_backbone(pl_module: LightningModule, name: str | None) -> Backbone:
    """Return the network that prompts go into.

    Args:
        pl_module: The user's module.
        name: Its name in the module; the only base model of transformers in it if ``None``.

    Raises:
        ValueError: If there is none or there are several, if it is an encoder with a decoder, if it reads neither
            tokens nor images as a sequence, or if it is sharded.
    """
    found: dict[str, Any] = {
        path: part
        for path, part in pl_module.named_modules()
        # by what makes it one, so that transformers need not be imported
        if hasattr(part, "base_model_prefix") and getattr(part, "base_model", None) is part
    }
    kind = type(pl_module).__name__
    if name is None:
        found = {path: part for path, part in found.items() if not any(path.startswith(f"{o}.") for o in found)}
        if len(found) != 1:
            raise ValueError(
                f"Prompts go into one base model of transformers, and {kind} has {sorted(found) or 'none'}."
                + (" Name it by `backbone`." if found else "")
            )
        name = next(iter(found))
    elif name not in found:
        raise ValueError(f"`backbone={name!r}` is no base model of transformers in {kind}; it has {sorted(found)}.")
    module = found[name]
    if module.config.is_encoder_decoder:
        raise ValueError(f"`{type(module).__name__}` is an encoder with a decoder, which prompts do not serve.")
    if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        raise ValueError(
            f"{kind} shards its network in `configure_model`, and prompts must be there before: call the callback's"
            " `attach(self)` there, between building and sharding, or leave sharding to `strategy='fsdp2'`."
        )
    return _described(name, module)


def _described(name: str, module: Any) -> Backbone:
    config = module.config.get_text_config()
    heads: Any = getattr(config, "num_attention_heads", None)
    embeddings = getattr(module, "embeddings", None)
    if module.main_input_name == "input_ids":
        tokens: nn.Module = module.get_input_embeddings()
        inside = [] if embeddings is None or embeddings is tokens else list(embeddings.modules())
        if all(part is not tokens for part in inside):
            embeddings = None
    elif module.main_input_name != "pixel_values" or embeddings is None or not isinstance(heads, int):
        # of Swin and its kin width and heads change from layer to layer
        raise ValueError(
            "Prompts go into a network that reads tokens, or one that reads images as a sequence of one width behind an"
            f" embedding stage, such as `ViTModel`; `{type(module).__name__}` is neither."
        )
    attention = attention_modules(module)
    return Backbone(
        name=name,
        module=module,
        width=config.hidden_size,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
        causal=any(getattr(part, "is_causal", False) for part in module.modules()),
        embeddings=embeddings,
        layers=len(attention),
        # normalised states have a variance near 1; embeddings of tokens are as small as they were drawn
        token_range=1.0 if embeddings is not None else getattr(config, "initializer_range", 0.02) * 3**0.5,
    )


def attention_modules(module: nn.Module) -> list[nn.Module]:
    """Return the attention of each layer in order; none unless every layer has one that takes keys from a cache."""
    found: dict[int, nn.Module] = {}
    for part in module.modules():
        layer: Any = getattr(part, "layer_idx", None)
        taken = arguments(type(part).forward)
        takes_cache = isinstance(layer, int) and "past_key_values" in taken and "attention_mask" in taken
        # blocks may know their number too
        if takes_cache and not any(hasattr(inner, "layer_idx") for inner in list(part.modules())[1:]):
            if layer in found:
                return []
            found[layer] = part
    return [found[layer] for layer in sorted(found)] if sorted(found) == list(range(len(found))) else []


@cache
def arguments(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the arguments of a class's forward, without ``self``."""
    return tuple(inspect.signature(forward).parameters)[1:]


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name."""
    return {**dict(zip(arguments(type(module).forward), args, strict=False)), **kwargs}


class LayerPrefix:
    """Stands where attention expects a cache, and puts a prefix before its keys and values.

    Args:
        prefix: Keys and values [B, 2, H, P, D].
    """

    def __init__(self, prefix: Tensor) -> None:
        self.prefix = prefix

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, H, P + T, D] of those [B, H, T, D] that a layer made."""
        before = self.prefix.to(keys.dtype)
        return _joined(before[:, 0], keys), _joined(before[:, 1], values)


def _joined(before: Tensor, states: Tensor) -> Tensor:
    return torch.cat([before, states], dim=2)


def visible_prefix(mask: Tensor | None, hidden: Tensor, length: int, *, causal: bool) -> Tensor | None:
    """Return the mask of a layer's attention with ``length`` more positions in front, which all others see.

    Args:
        mask: What transformers made: [B, 1, T, T], true or 0 where a position is seen, or ``None``.
        hidden: The layer's input [B, T, D].
        length: Positions of the prefix.
        causal: Whether a position sees only those before it.
    """
    if mask is None:
        # torch would align the causal triangle with the prefix
        tokens = hidden.shape[1]
        seen = torch.ones(tokens, tokens, dtype=torch.bool, device=hidden.device).tril()
        return pad(seen[None, None], (length, 0), value=True) if causal else None
    return pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)
