"""Building a Hugging Face network: from a config, a folder or the hub, quantized, with adapters."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any, Literal

import torch
from torch import nn

from lightning_cl.adapters import add_adapters
from lightning_cl.core.checks import check_choice
from lightning_cl.core.imports import require
from lightning_cl.core.lazy import StartsItself
from lightning_cl.core.rng import derived_seed, isolated_rng
from lightning_cl.modules.random_weights import RandomWeights
from lightning_cl.quantization import CheckpointReader, build_skeleton, check_can_shard, fill_block, quantize_base
from lightning_cl.quantization.names import checkpoint_name

__all__ = ["DTYPES", "NetworkBuilder", "Quantization", "unwrapped"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Quantization:
    """How the frozen linear layers of a base model are quantized, see :func:`~lightning_cl.quantization.quantize_base`.

    Args:
        mode: ``"nf4"``, ``"fp4"`` or ``"int8"``.
        double_quant: Quantize the scales too.
        storage_dtype: The dtype that holds the packed bytes; the compute dtype if ``None``.
        skip: Names of layers that stay as they are; a classifier's head always does.
    """

    mode: Literal["nf4", "fp4", "int8"] = "nf4"
    double_quant: bool = True
    storage_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    skip: list[str] = field(default_factory=lambda: ["lm_head"])


@dataclass(frozen=True)
class NetworkBuilder:
    """Makes the network of a module; the same arguments make the same weights, on every rank and under every strategy.

    Args:
        model: Folder or hub name of a model, a config as a dict with ``model_type``, or a ``PretrainedConfig``; from a
            config, the weights are random.
        kind: The auto class of transformers, such as ``"AutoModelForCausalLM"``.
        adapter: A config of PEFT, as a dict or an object.
        quantization: How the base is quantized.
        dtype: Dtype of what is not quantized.
        seed: Seed of random weights.
        overrides: Further settings of the config, such as ``num_labels``.
    """

    model: Any
    kind: str
    adapter: Any
    quantization: Quantization | None
    dtype: str
    seed: int
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the settings."""
        check_choice("dtype", self.dtype, tuple(DTYPES))
        if isinstance(self.model, Mapping) and "model_type" not in self.model:
            raise ValueError(
                f"`model` as a config needs a `model_type`, such as {{'model_type': 'llama', ...}}; got"
                f" {sorted(self.model)}."
            )
        if not isinstance(self.model, (str, Mapping)) and not hasattr(self.model, "model_type"):
            raise ValueError(
                "`model` must be a folder, a hub name, a dict with `model_type` or a `PretrainedConfig`, got"
                f" {self.model!r}."
            )

    def plain_model(self) -> Any:
        """Return ``model`` as text or as a dict of plain values."""
        if isinstance(self.model, (str, Mapping)):
            return self.model if isinstance(self.model, str) else dict(self.model)
        return self.model.to_diff_dict()

    def plain_adapter(self) -> Any:
        """Return ``adapter`` as a dict of plain values."""
        if self.adapter is None or isinstance(self.adapter, Mapping):
            return self.adapter and dict(self.adapter)
        # PEFT names methods by enums, and keeps the names of layers in sets
        return {name: _plain(value) for name, value in self.adapter.to_dict().items()}

    def config(self) -> Any:
        """Return the config of the network.

        Raises:
            ValueError: If ``model`` names no model.
        """
        configs = require("transformers", extra="llm").AutoConfig
        if isinstance(self.model, str):
            try:
                config = configs.from_pretrained(self.model)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"`model={self.model!r}` is neither a folder with a `config.json` nor a model on a hub within"
                    f" reach: {error}"
                ) from error
        else:
            settings = self.model if isinstance(self.model, Mapping) else self.model.to_dict()
            config = configs.for_model(**settings)
        for name, value in self.overrides.items():
            setattr(config, name, value)
        # the cache serves generation only, and checkpointing of activations refuses it
        config.use_cache = False
        return config

    def build(self, *, lazy: bool, device: torch.device) -> nn.Module:
        """Return the network: built or loaded, quantized, with adapters, in this order, in training mode.

        Args:
            lazy: Leave the weights on the meta device, for :meth:`fill`.
            device: Where the weights of a quantized network go; others stand on the CPU.
        """
        config, dtype = self.config(), DTYPES[self.dtype]
        whole = isinstance(self.model, str) and self.quantization is None and not lazy
        # strategies open contexts of their own device
        with isolated_rng(self.seed), torch.device("cpu"):
            network: Any
            if whole:
                auto: Any = getattr(require("transformers", extra="llm"), self.kind)
                network, found = auto.from_pretrained(self.model, config=config, dtype=dtype, output_loading_info=True)
                self._start_heads(network, found["missing_keys"])
            else:
                network = build_skeleton(config, auto_class=self.kind, dtype=dtype)
            heads = _heads(network)
            if self.quantization is not None:
                _quantize(network, self.quantization, dtype, list(heads))
            if lazy:
                check_can_shard(network)
            elif not whole:
                self.fill("", network, device if self.quantization is not None else torch.device("cpu"))
            if self.adapter is not None:
                network = add_adapters(network, self._adapter_beside(heads))
                self._start_adapters("", dict(_adapted_layers(network)))
            for head in heads.values():
                head.requires_grad_(True)
            network.train()
        return network  # type: ignore[no-any-return]

    def fill(self, name: str, block: nn.Module, device: torch.device) -> None:
        """Give values to what a block of the network has on the meta device.

        Args:
            name: Name of the block in the network, ``""`` for the network.
            block: The block.
            device: Where the values go.
        """
        fresh = [] if name else [f"{head}.*" for head in _heads(unwrapped(block))]
        # of what was filled, and sharded, before, nothing is drawn again
        adapted = {inner: layer for inner, layer in _adapted_layers(block) if _is_meta(layer)}
        with isolated_rng(derived_seed("fill", self.seed, name)):
            fill_block(block, name, self._weights, device, fresh=fresh)
        if not name:
            network = unwrapped(block)
            self._start_heads(network, {each for each, _ in network.named_parameters() if each not in self._weights})
        self._start_adapters(name, adapted)

    def _adapter_beside(self, heads: Mapping[str, nn.Module]) -> Any:
        """Return the config of the adapter, which must leave the heads of a classifier to the module."""
        if not heads:
            return self.adapter
        settings = self.plain_adapter()
        if taken := [name for name in settings.get("modules_to_save") or () if name in heads]:
            raise ValueError(
                f"`modules_to_save` of the adapter names the head {taken[0]!r}, which is trained anyway, without a copy"
                " for every adapter: leave it out."
            )
        # for this type PEFT takes the head too
        return {**settings, "task_type": None}

    @cached_property
    def _weights(self) -> Any:
        """What weights are read from."""
        if isinstance(self.model, str):
            # a classifier has no use for the head of a language model
            return CheckpointReader(self.model, ignore=["lm_head.*"] if self.overrides else [])
        with torch.device("cpu"):
            return RandomWeights(
                build_skeleton(self.config(), auto_class=self.kind, dtype=DTYPES[self.dtype]), self.seed
            )

    def _start_heads(self, network: Any, missing: Container[str]) -> None:
        """Draw what a checkpoint lacks of a classifier's head from a seed of its name."""
        for head, part in _heads(network).items():
            for inner, layer in part.named_modules():
                name = f"{head}.{inner}".strip(".")
                if any(f"{name}.{attribute}" in missing for attribute, _ in layer.named_parameters(recurse=False)):
                    with isolated_rng(derived_seed("weights", self.seed, name)), torch.no_grad():
                        network._init_weights(layer)

    def _start_adapters(self, name: str, layers: Mapping[str, Any]) -> None:
        """Draw the factors of LoRA from a seed of their layer, the same whatever is filled with it."""
        given = self.adapter if isinstance(self.adapter, Mapping) else vars(self.adapter or object)
        if given.get("init_lora_weights", True) is not True:
            return  # what depends on the base weights is drawn with them
        for inner, layer in layers.items():
            full = checkpoint_name(f"{name}.{inner}".strip("."))
            for adapter in () if _is_meta(layer) else layer.r:
                with isolated_rng(derived_seed("adapter", self.seed, full, adapter)):
                    layer.reset_lora_parameters(adapter, True)
            for part in () if _is_meta(layer) else layer.modules():
                if isinstance(part, StartsItself):
                    part.start()


def unwrapped(network: Any) -> Any:
    """Return the network of transformers inside one with adapters."""
    return network.get_base_model() if hasattr(network, "get_base_model") else network


def _heads(network: Any) -> dict[str, nn.Module]:
    """Return the parts of a classifier that are not its base model, by name; none of a language model."""
    if "SequenceClassification" not in type(network).__name__:
        return {}
    return {name: part for name, part in network.named_children() if name != network.base_model_prefix}


def _quantize(network: nn.Module, settings: Quantization, dtype: torch.dtype, heads: list[str]) -> None:
    quantize_base(
        network,
        mode=settings.mode,
        double_quant=settings.double_quant,
        compute_dtype=dtype,
        storage_dtype=None if settings.storage_dtype is None else DTYPES[settings.storage_dtype],
        skip=[*settings.skip, *heads],
    )


def _adapted_layers(block: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, layer) for name, layer in block.named_modules() if hasattr(layer, "reset_lora_parameters"))


def _is_meta(layer: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in layer.parameters())


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value.value if isinstance(value, Enum) else value
