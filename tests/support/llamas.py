"""Tiny language models from a config, as checkpoints of Hugging Face, whole and in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()

TOKENS = torch.arange(24).view(2, 12) * 7 % 96
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def tiny_config(**changes: Any) -> LlamaConfig:
    """Return the config of a Llama of two blocks."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**{**sizes, **heads, **changes})


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """Return a Llama of two blocks, the same at every call."""
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(**changes))


def save_llama(folder: Path, *, shard_size: str = "60KB", **changes: Any) -> Path:
    """Write the checkpoint of a Llama of two blocks, in several files."""
    tiny_llama(**changes).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    """Return what the model says, in the mode in which transformers and bitsandbytes compute as in training."""
    training = model.training
    model.train()
    with torch.no_grad():
        output = model(input_ids=tokens).logits
    model.train(training)
    return output


def perturb(model: Any, seed: int = 1) -> None:
    """Give the trainable parameters other values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.05)


def shard(model: Any, llama: Any) -> None:
    """Shard the blocks, then the rest, over all ranks."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for block in llama.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
