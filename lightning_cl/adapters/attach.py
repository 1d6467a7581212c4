"""Adapters put into a base model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_cl.core.imports import require
from lightning_cl.quantization.layers import is_int8, quantized_layers
from lightning_cl.quantization.names import places

__all__ = ["add_adapters"]

# starts of PEFT 0.21.2 that take something from the base weight as if it was unpacked
_READ_WEIGHTS = ("pissa", "olora", "corda", "loftq", "mica", "lora_ga", "orthogonal")


def add_adapters(model: nn.Module, config: Any) -> Any:
    """Put adapters of PEFT into ``model``; all other weights are frozen.

    The adapters have the compute dtype of the model, because FSDP2 wants one dtype for what trains in a block; PEFT's
    own default is float32. In a float16 model adapters of layers are float32: steps vanish in float16, and a gradient
    scaler (``precision="16-mixed"``) refuses it; prompts and trained copies of whole modules (``modules_to_save``) stay
    float16, as nothing casts what goes into and out of them. On a skeleton they stand on the meta device until
    :func:`~lightning_cl.quantization.fill_block` starts them. What will ever train must be there before the model is
    sharded: neither DDP nor FSDP2 synchronises adapters that come later.

    Args:
        model: A model with weights, or a skeleton (LoRA with its usual start only).
        config: A config of PEFT, or a dict, as from YAML: ``{"peft_type": "LORA", "r": 8, "target_modules":
            "all-linear"}``.

    Returns:
        The ``peft.PeftModel`` around ``model``.

    Raises:
        ValueError: If the config is none of PEFT; if the model is sharded or has adapters already; for adapters that
            cannot start on the meta device; for an ``init_lora_weights`` that PEFT cannot compute on packed weights, or
            that would be plain LoRA under another name, because what it is computed from is not there.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> adapted = add_adapters(model, {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]})
        >>> [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]  # doctest: +ELLIPSIS
        ['...q_proj.lora_A.default.weight', '...q_proj.lora_B.default.weight']
    """
    peft = require("peft", extra="llm")
    config = _config(peft, config)
    order = "The order is: `quantize_base`, then `add_adapters`, then shard (strategy `fsdp2` does it at its set-up)."
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(f"`add_adapters` got a sharded module: new adapters would train unsynchronised. {order}")
    if any(type(layer).__module__.startswith("peft.") for layer in model.modules()):
        raise ValueError("`add_adapters` got a module with adapters; `PeftModel.add_adapter` adds one more.")
    meta = any(parameter.is_meta for parameter in model.parameters())
    if meta and not _starts_on_meta(config):
        raise ValueError(
            f"{config.peft_type.value} with these settings reads the base weights, or needs a start of its own, and the"
            " model is on the meta device. Load it first (`load_quantized`), then add the adapters, then shard; or use"
            " LoRA with `init_lora_weights=True` and without DoRA."
        )
    if config.peft_type == "LORA":
        _check_start(model, str(config.init_lora_weights).lower())
    _tell_bits(model)
    dtype = _compute_dtype(model)
    tuner = require("peft.tuners.tuners_utils", extra="llm").BaseTunerLayer
    with warnings.catch_warnings():
        # PEFT 0.21 asks for it by the name that transformers 5.23 deprecates
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=False, low_cpu_mem_usage=meta)
    layers = {id(p) for layer in adapted.modules() if isinstance(layer, tuner) for p in layer.parameters()}
    for place in places(adapted):
        if place.adapter and not place.buffer and place.tensor.is_floating_point():
            wide = dtype == torch.float16 and id(place.tensor) in layers
            place.tensor.data = place.tensor.data.to(torch.float32 if wide else dtype)
    return adapted


def _config(peft: Any, config: Any) -> Any:
    if isinstance(config, peft.PeftConfig):
        return config
    if not isinstance(config, Mapping) or "peft_type" not in config:
        raise ValueError(
            f"The config of adapters must be one of PEFT, or a dict with `peft_type`, such as 'LORA'; got {config!r}."
        )
    kinds = peft.PEFT_TYPE_TO_CONFIG_MAPPING
    kind = kinds.get(str(config["peft_type"]).upper())
    if kind is None:
        raise ValueError(f"`peft_type` must be one of {sorted(k.value for k in kinds)}, got {config['peft_type']!r}.")
    try:
        return kind(**{name: value for name, value in config.items() if name != "peft_type"})
    except TypeError as error:
        raise ValueError(f"The config of adapters does not fit {kind.__name__}: {error}") from error


def _starts_on_meta(config: Any) -> bool:
    return config.peft_type == "LORA" and config.init_lora_weights is True and not config.use_dora


def _check_start(model: nn.Module, start: str) -> None:
    """Refuse names of PEFT that fail on packed weights or give another start than they say."""
    given = f"`init_lora_weights={start!r}`"
    packed: Any = next((layer for _, layer in quantized_layers(model)), None)
    # of orthogonal ones, PEFT gives the factors the dtype of the packed weight
    unpacked = packed is None or (start == "orthogonal" and packed.weight.is_floating_point())
    if not unpacked and start.startswith(_READ_WEIGHTS):
        raise ValueError(
            f"{given} takes the base weights for unpacked ones, and the model is quantized: PEFT would fail, or pack"
            " other weights anew. Use `init_lora_weights=True`; after it, `AdapterStart('orthogonal')`, `('eva')` or"
            " `('corda')` beside `AdapterSlots` chooses a start, and `peft.replace_lora_weights_loftq` makes up for the"
            " error of 4 bits."
        )
    if start == "eva":
        raise ValueError(
            f"{given} starts as plain LoRA until `peft.initialize_lora_eva_weights` has read the data, which allows one"
            " adapter and changes ranks. Use `init_lora_weights=True` with `AdapterStart('eva')` beside `AdapterSlots`,"
            " which reads each task's own data; or call both functions of PEFT yourself, in place of `add_adapters`."
        )
    if start == "corda" and not any(hasattr(layer, "eigens") for layer in model.modules()):
        raise ValueError(
            f"{given} needs the result of `peft.tuners.lora.corda.preprocess_corda` on this model. Call that before; or"
            " use `init_lora_weights=True` with `AdapterStart('corda')` beside `AdapterSlots`, which keeps the base."
        )
    if start == "lora_ga" and not any(hasattr(layer, "_peft_loraga_grad") for layer in model.modules()):
        raise ValueError(
            f"{given} is plain LoRA without the gradients that `peft.tuners.lora.preprocess_loraga` collects. Call that"
            " before, or use `init_lora_weights=True`."
        )
    if start == "loftq" and not (torch.cuda.is_available() or torch.xpu.is_available()):
        raise ValueError(
            f"{given} quantizes on a GPU, and PEFT finds none here. Use `init_lora_weights=True`, or prepare the model"
            " on a machine with one."
        )


def _tell_bits(model: Any) -> None:
    """Mark a model of any class as quantized: else PEFT takes its layers for unpacked weights."""
    for _, layer in quantized_layers(model):
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = not is_int8(layer), is_int8(layer)
        return


def _compute_dtype(model: nn.Module) -> torch.dtype:
    for _, layer in quantized_layers(model):
        dtype: torch.dtype = layer.compute_dtype  # type: ignore[assignment]
        return dtype
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
