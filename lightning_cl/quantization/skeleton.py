"""Hugging Face models without weights, and whole quantized models for one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_cl.core.imports import require
from lightning_cl.quantization.base import DEFAULT_SKIP, Mode, quantize_base
from lightning_cl.quantization.loading import fill_block
from lightning_cl.quantization.reader import CheckpointReader

__all__ = ["build_skeleton", "load_quantized"]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules put their parameters on the meta device; buffers, which the constructor computes, stay real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_skeleton(
    config: Any, *, auto_class: str = "AutoModelForCausalLM", dtype: torch.dtype | None = None, **settings: Any
) -> Any:
    """Return a Hugging Face model with its parameters on the meta device, and with real buffers.

    Buffers that no checkpoint holds, such as the frequencies of rotary embeddings, are computed as usual.

    Args:
        config: A model's config, or the folder or hub name to read it from.
        auto_class: The class of ``transformers`` that builds the model.
        dtype: Of the parameters; that of the config if ``None``.
        settings: Changes of a config that is read, such as ``num_labels=3``.
    """
    transformers = require("transformers", extra="llm")
    if isinstance(config, str | Path):
        config = transformers.AutoConfig.from_pretrained(config, **settings)
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of a checkpoint that is quantized; `quantize_base` writes its own
    with _parameters_on_meta():
        return getattr(transformers, auto_class).from_config(config, **({} if dtype is None else {"dtype": dtype}))


def load_quantized(
    path: str | Path,
    *,
    auto_class: str = "AutoModelForCausalLM",
    device: torch.device | str = "cpu",
    mode: Mode = "nf4",
    double_quant: bool = True,
    compute_dtype: torch.dtype = torch.bfloat16,
    storage_dtype: torch.dtype | None = None,
    skip: Sequence[str] = DEFAULT_SKIP,
) -> Any:
    """Return a quantized Hugging Face model, for one process, that never stood in memory in full precision.

    Args:
        path: A folder with config and safetensors, or a name on the hub; a checkpoint that is quantized already must
            have been written with the same settings.
        auto_class: The class of ``transformers`` that builds the model.
        device: Where the weights go.
        mode: As for :func:`~lightning_cl.quantization.quantize_base`, like all that follow.
        double_quant: Whether the scales are quantized as well.
        compute_dtype: What weights are unpacked to, and the dtype of all other parameters.
        storage_dtype: The dtype that packed bytes pass for.
        skip: Patterns of layers to leave alone.

    Returns:
        The model in evaluation mode, frozen.
    """
    model = build_skeleton(path, auto_class=auto_class)
    quantize_base(
        model,
        mode=mode,
        double_quant=double_quant,
        compute_dtype=compute_dtype,
        storage_dtype=storage_dtype,
        skip=skip,
    )
    fill_block(model, "", CheckpointReader(path), device)
    for buffers in (module._buffers for module in model.modules()):
        buffers.update({name: buffer.to(device) for name, buffer in buffers.items() if buffer is not None})
    return model.eval()
