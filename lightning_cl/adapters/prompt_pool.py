"""Prompts as a submodule of a frozen network, which they enter by hooks: the user's code stays as it is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_cl.adapters.prompt_backbone import (
    Backbone,
    LayerPrefix,
    arguments,
    attention_modules,
    bind,
    visible_prefix,
)

__all__ = ["Chosen", "Prompts", "Query"]

Query = Literal["cls", "mean"]
# a call's way to hand prefixes to its attention, so that a block that is computed again gets those of its own call
_ARGUMENT = "prompt_prefixes"
# what a network may be given, the first of them that there is
_INPUTS = ("input_ids", "inputs_embeds", "pixel_values")


@dataclass
class Chosen:
    """What each sample of a batch gets.

    Args:
        tokens: Prompts in front of the input [B, P, D].
        prefixes: Keys and values in front of those of a layer [B, 2, H, P, D], by the layer's number.
    """

    tokens: Tensor | None = None
    prefixes: dict[int, Tensor] = field(default_factory=dict)


class Prompts(nn.Module):
    """What all prompt methods share: the query, and how prompts enter and leave the network.

    The first hidden states get the tokens in front, behind the model's own embedding stage where it has one (BERT, ViT
    and their kin: no positions are taken, nothing is normalised), else as embeddings with positions (causal language
    models: text moves on by as many). Outputs lose these places again, so pooling and labels stay aligned. Prefixes go
    into the attention of their layer only, without positions.

    Args:
        backbone: The network.
        query: What a sample is recognised by, from the network without prompts, in evaluation mode: the first token's
            last hidden state (``"cls"``; of a causal network the last token's), or the mean over tokens (``"mean"``).
        num_tasks: Tasks that there is room for.

    Attributes:
        learned: Tasks whose prompts may be chosen so far.
        task: In a training step the number of its task's rows, ``None`` otherwise.
        modes: Whether the forwards in a training step were in training mode.
        terms: Values of each sample for the loss, of each forward in a training step.
        by_task: Names of the parameters of which each task trains rows of its own, the same number for each.
    """

    by_task: ClassVar[tuple[str, ...]] = ()
    learned: Tensor

    def __init__(self, backbone: Backbone, query: Query = "cls", num_tasks: int = 1) -> None:
        super().__init__()
        self.query = query
        self.num_tasks = num_tasks
        self.causal = backbone.causal
        self.embeds = backbone.embeddings is None
        self.task: int | None = None
        self.terms: list[Tensor] = []
        self.modes: set[bool] = set()
        # core.adapters switches prompts off by it
        self._disable_adapters = False
        self._asking = False
        self._chosen: Chosen | None = None
        self._reached: set[int] = set()
        self.register_buffer("learned", torch.zeros((), dtype=torch.int64))

    @property
    def learning(self) -> int | None:
        """The task whose rows a forward trains; ``None`` in evaluation mode, as of a teacher inside a step."""
        return self.task if self.training else None

    @property
    def asks(self) -> bool:
        """Whether the choice needs a query."""
        return True

    def starting_anew(self) -> list[nn.Parameter]:
        """Return the parameters whose optimizer state is dropped when a task starts."""
        return [getattr(self, name) for name in self.by_task]

    @abstractmethod
    def choose(self, query: Tensor | None, batch_size: int) -> Chosen:
        """Return the prompts of each sample.

        Args:
            query: [B, D] in float32; ``None`` where :attr:`asks` is false.
            batch_size: B.
        """

    @abstractmethod
    def start(self, generator: torch.Generator, backbone: Backbone) -> None:
        """Draw all values."""

    # ------------------------------------------------------------------ hooks

    def attach(self, backbone: Backbone) -> None:
        """Become a submodule of the network and act on its forwards from now on."""
        module = backbone.module
        module.add_module("prompts", self)
        module.register_forward_pre_hook(self.enter, with_kwargs=True)
        module.register_forward_hook(self.leave)
        if backbone.embeddings is not None:
            backbone.embeddings.register_forward_hook(self.join)
        for layer in attention_modules(module):
            layer.register_forward_pre_hook(self.extend, with_kwargs=True)

    def enter(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """Choose prompts for the inputs of a forward, and put in what enters there."""
        self._chosen = None
        if self._disable_adapters or self._asking:
            return None
        inputs = bind(module, args, kwargs)
        mask = inputs.get("attention_mask")
        if inputs.get("past_key_values") is not None:
            raise ValueError(
                "Prompts do not know tokens that are in a cache (`past_key_values`): generate with `use_cache=False`."
            )
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"Prompts need `attention_mask` as [batch, tokens], got {list(mask.shape)}.")
        counts = inputs.get("position_ids") is None and "position_ids" in arguments(type(module).forward)
        if self.causal and mask is not None and counts:
            # prompts stand beside the text, however much padding is on its left
            inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
        given = next(inputs[name] for name in _INPUTS if inputs.get(name) is not None)
        self.modes.add(self.training)
        query = self._query(module, inputs, mask) if self.asks else None
        self._chosen, self._reached = self.choose(query, len(given)), set()
        if self._chosen.prefixes:
            inputs[_ARGUMENT] = self._chosen.prefixes
        if self._chosen.tokens is not None:
            self._make_room(module, inputs, self._chosen.tokens, mask)
        return (), inputs

    def leave(self, module: Any, args: Any, output: Any) -> Any:
        """Take the places of prompts out of the output."""
        chosen, self._chosen = self._chosen, None
        if chosen is None:
            return None
        if lost := chosen.prefixes.keys() - self._reached:
            raise ValueError(
                f"`{type(module).__name__}` does not hand further arguments on to the attention of its layers"
                f" {sorted(lost)}, so prefixes do not reach it. Use a method with prompts at the input, such as `L2P`."
            )
        if chosen.tokens is None:
            return None
        length = chosen.tokens.shape[1]
        if getattr(output, "last_hidden_state", None) is None:
            raise ValueError(f"Prompts need an output of `{type(module).__name__}` with `last_hidden_state`.")
        output["last_hidden_state"] = output.last_hidden_state[:, length:]
        if getattr(output, "hidden_states", None) is not None:
            output["hidden_states"] = tuple(states[:, length:] for states in output.hidden_states)
        if getattr(output, "pooler_output", None) is not None:
            output["pooler_output"] = module.pooler(output.last_hidden_state)
        return output

    def join(self, module: Any, args: Any, output: Tensor) -> Tensor | None:
        """Put tokens behind the embedding stage."""
        if self._chosen is None or self._chosen.tokens is None:
            return None
        if not isinstance(output, Tensor):
            raise ValueError(
                f"Prompts go behind an embedding stage that returns hidden states alone, and `{type(module).__name__}`"
                " returns more, such as the sizes of an image. Use another network, such as `ViTModel`."
            )
        return torch.cat([self._chosen.tokens.to(output.dtype), output], dim=1)

    def extend(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """Put a layer's prefix where its attention looks for a cache."""
        if _ARGUMENT not in kwargs:
            return None
        inputs = bind(module, args, kwargs)
        prefix: Tensor | None = inputs.pop(_ARGUMENT).get(module.layer_idx)
        if prefix is not None:
            hidden: Tensor = inputs["hidden_states"]
            mask = inputs.get("attention_mask")
            inputs["attention_mask"] = visible_prefix(mask, hidden, prefix.shape[3], causal=self.causal)
            inputs["past_key_values"] = LayerPrefix(prefix)
            self._reached.add(module.layer_idx)
        return (), inputs

    # ------------------------------------------------------------------ parts of a forward

    @torch.no_grad()
    def _query(self, module: Any, inputs: Mapping[str, Any], mask: Tensor | None) -> Tensor:
        """Return what each sample is recognised by, float32 [B, D]."""
        training = [part for part in module.modules() if part.training]
        self._asking = True
        module.eval()
        try:
            hidden: Tensor = module(**inputs).last_hidden_state.float()
        finally:
            self._asking = False
            for part in training:
                part.training = True
        if mask is None:
            mask = torch.ones(hidden.shape[:2], device=hidden.device, dtype=torch.int64)
        if self.query == "mean":
            weights = mask[:, :, None].to(hidden.dtype)
            return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
        if not self.causal:
            return hidden[:, 0]
        last = (torch.arange(mask.shape[1], device=mask.device) * mask).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]

    def _make_room(self, module: Any, inputs: dict[str, Any], tokens: Tensor, mask: Tensor | None) -> None:
        """Change the inputs of a forward so that the tokens have places in it."""
        batch, places = tokens.shape[:2]
        if mask is not None:
            mask = torch.cat([mask.new_ones(batch, places), mask], dim=1)
            inputs["attention_mask"] = mask
        if not self.embeds:
            return
        embedded = inputs.get("inputs_embeds")
        if embedded is None:
            embedded = module.get_input_embeddings()(inputs["input_ids"])
        length, limit = embedded.shape[1], getattr(module.config, "max_position_embeddings", None)
        if limit is not None and places + length > limit:
            raise ValueError(
                f"{places} prompt tokens and {length} tokens of text exceed the {limit} positions of"
                f" `{type(module).__name__}`: shorten the texts or the prompts."
            )
        inputs |= {"input_ids": None, "inputs_embeds": torch.cat([tokens.to(embedded.dtype), embedded], dim=1)}
        if (positions := inputs.get("position_ids")) is not None:
            before = torch.arange(places, device=positions.device).expand(len(positions), -1)
            inputs["position_ids"] = torch.cat([before, positions + places], dim=1)
        if inputs.get("token_type_ids") is not None:
            kinds = inputs["token_type_ids"]
            inputs["token_type_ids"] = torch.cat([kinds.new_zeros(batch, places), kinds], dim=1)

    @override
    def extra_repr(self) -> str:
        return ", ".join(f"{name}={list(parameter.shape)}" for name, parameter in self.named_parameters(recurse=False))
