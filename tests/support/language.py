"""Tiny language models and token streams for tests."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_cl import TaskStreamDataModule
from lightning_cl.datamodules import Predefined
from lightning_cl.modules import CausalLM

VOCABULARY = 64
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LORA: dict[str, Any] = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}


class TokenRows(Dataset[dict[str, Tensor]]):
    """Rows that count up by ``step``, from anywhere, padded on the right to unlike lengths where ``padded``."""

    def __init__(self, step: int, rows: int = 12, length: int = 8, *, padded: bool = False, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, VOCABULARY, (rows, 1), generator=generator)
        lengths = torch.randint(3, length + 1, (rows, 1), generator=generator) if padded else torch.tensor([[length]])
        self.attention_mask = (torch.arange(length) < lengths).long().expand(rows, length).contiguous()
        self.input_ids = ((starts + step * torch.arange(length)) % VOCABULARY) * self.attention_mask

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[index], "attention_mask": self.attention_mask[index]}

    def batch(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        """Return some rows as a batch."""
        return {"input_ids": self.input_ids[rows], "attention_mask": self.attention_mask[rows]}


class LabelledRows(TokenRows):
    """Rows of two kinds for each task: label ``2 task`` has even tokens, label ``2 task + 1`` odd ones."""

    def __init__(self, task: int, rows: int = 16, *, seed: int = 0) -> None:
        kinds = [TokenRows(1, rows // 2, padded=True, seed=seed + task + 99 * odd) for odd in (0, 1)]
        self.attention_mask = torch.cat([kind.attention_mask for kind in kinds])
        self.input_ids = torch.cat([kind.input_ids // 2 * 2 + odd for odd, kind in enumerate(kinds)])
        self.input_ids *= self.attention_mask
        self.labels = torch.tensor([2 * task, 2 * task + 1]).repeat_interleave(rows // 2)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return super().__getitem__(index) | {"labels": self.labels[index]}

    def batch(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        """Return some rows as a batch."""
        return super().batch(rows) | {"labels": self.labels[rows]}


class ListData(Dataset[dict[str, Tensor]]):
    """Samples from a list."""

    def __init__(self, samples: list[dict[str, Tensor]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.samples[index]


class TokenData(LightningDataModule):
    """One domain without a stream, as a command line builds it."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TokenRows(1), batch_size=4)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TokenRows(1, seed=1), batch_size=4)


def token_stream(*, padded: bool = False, **settings: Any) -> TaskStreamDataModule:
    """Two domains, counting by 1 and by 3, of 12 and 8 rows: 3 and 2 steps an epoch in batches of 4."""
    train = [TokenRows(1, 12, padded=padded), TokenRows(3, 8, padded=padded)]
    val = [TokenRows(step, 7, padded=True, seed=1) for step in (1, 3)]
    defaults: dict[str, Any] = {"scenario": Predefined(["ones", "threes"]), "batch_size": 4, "epochs_per_task": 2}
    return TaskStreamDataModule(train, val, val, **(defaults | settings))


def llama(**settings: Any) -> CausalLM:
    """A causal language model with 30 thousand random weights, always the same ones."""
    return CausalLM(dict(LLAMA), **settings)


def built(module: Any) -> Any:
    """Return a module with its network, as Lightning makes it before training."""
    module.configure_model()
    return module
