"""A tiny encoder for prompts, a stream of two tasks of token rows, and each prompt method as a plain loop.

The loops compute the encoder by hand, attention and all, so that nothing of how prompts enter it is shared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy, gelu, normalize
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification

from language import LabelledRows
from lightning_cl import TaskStreamDataModule
from lightning_cl.datamodules import ClassIncremental, TaskIncremental
from lightning_cl.datamodules.samplers import TaskSampler

WIDTH, HEADS, LAYERS = 16, 2, 3
TASKS = [np.arange(16), np.arange(16, 32)]
EPOCHS = 2


def tiny_bert(dropout: float = 0.0, **changes: Any) -> BertForSequenceClassification:
    """Return an encoder of three blocks with weights large enough for prompts to matter."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = BertConfig(vocab_size=64, num_labels=4, initializer_range=0.3, **{**sizes, **drops, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return BertForSequenceClassification(config)


class PromptToy(LightningModule):
    """A module as users write them around an encoder of transformers."""

    def __init__(self, dropout: float = 0.0, learning_rate: float = 0.1, **changes: Any) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.model = tiny_bert(dropout, **changes)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9, weight_decay=0.01)


class TwoTasks(Dataset[dict[str, Tensor]]):
    """Rows of four kinds, two for each task, padded on the right to unlike lengths."""

    def __init__(self, seed: int = 0) -> None:
        parts = [LabelledRows(task, seed=seed) for task in (0, 1)]
        self.columns = {
            name: torch.cat([getattr(part, name) for part in parts])
            for name in ("input_ids", "attention_mask", "labels")
        }
        self.labels = self.columns["labels"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def batch(self, rows: Any = slice(None)) -> dict[str, Tensor]:
        """Return some rows as a batch."""
        return {name: column[rows] for name, column in self.columns.items()}


def prompt_stream(batch_size: int = 8, *, tells_task: bool = False, **settings: Any) -> TaskStreamDataModule:
    """Two tasks of 16 rows: two steps an epoch, two epochs each."""
    scenario = (TaskIncremental if tells_task else ClassIncremental)(n_tasks=2)
    defaults: dict[str, Any] = {"scenario": scenario, "batch_size": batch_size, "epochs_per_task": EPOCHS}
    return TaskStreamDataModule(TwoTasks(), TwoTasks(1), TwoTasks(1), **(defaults | settings))


def trained(module: LightningModule) -> Tensor:
    """Return prompts and head as one vector."""
    model: Any = module.model
    parameters = [*model.bert.prompts.parameters(), *model.classifier.parameters()]
    return flat([p.full_tensor() if isinstance(p, DTensor) else p for p in parameters])


def flat(parameters: list[Tensor]) -> Tensor:
    """Return tensors as one vector."""
    return torch.cat([p.detach().flatten() for p in parameters])


# ---------------------------------------------------------------------- the encoder by hand


def heads(states: Tensor) -> Tensor:
    """Return [B, H, T, d] of [B, T, H d]."""
    return states.unflatten(2, (HEADS, -1)).transpose(1, 2)


def block(layer: Any, hidden: Tensor, seen: Tensor, prefix: Tensor | None = None) -> Tensor:
    """Return a block's output; ``prefix`` [B, 2, H, P, d] stands before its keys and values."""
    attention = layer.attention.self
    query, keys, values = (heads(part(hidden)) for part in (attention.query, attention.key, attention.value))
    if prefix is not None:
        keys, values = torch.cat([prefix[:, 0], keys], 2), torch.cat([prefix[:, 1], values], 2)
        seen = torch.cat([seen.new_ones(len(seen), prefix.shape[3]), seen], 1)
    scores = query @ keys.transpose(2, 3) / keys.shape[3] ** 0.5
    weights = scores.masked_fill(~seen[:, None, None, :], -torch.inf).softmax(-1)
    joined = (weights @ values).transpose(1, 2).flatten(2)
    output = layer.attention.output
    hidden = output.LayerNorm(output.dense(joined) + hidden)
    return layer.output.LayerNorm(layer.output.dense(gelu(layer.intermediate.dense(hidden))) + hidden)


def encode(
    model: Any, batch: dict[str, Tensor], tokens: Tensor | None = None, prefixes: dict[int, Tensor] | None = None
) -> Tensor:
    """Return the last hidden states of the text."""
    hidden, seen = model.bert.embeddings(batch["input_ids"]), batch["attention_mask"].bool()
    length = 0
    if tokens is not None:
        length = tokens.shape[1]
        hidden = torch.cat([tokens, hidden], 1)
        seen = torch.cat([seen.new_ones(len(seen), length), seen], 1)
    for number, layer in enumerate(model.bert.encoder.layer):
        hidden = block(layer, hidden, seen, (prefixes or {}).get(number))
    return hidden[:, length:]


def loss_of(model: Any, batch: dict[str, Tensor], **prompts: Any) -> Tensor:
    """Return the mean cross-entropy of the class scores."""
    pooled = torch.tanh(model.bert.pooler.dense(encode(model, batch, **prompts)[:, 0]))
    return cross_entropy(model.classifier(pooled), batch["labels"])


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Return the cosine of each row with each row."""
    return normalize(first, dim=1) @ normalize(second, dim=1).T


# ---------------------------------------------------------------------- loops


def batches(task: int, batch_size: int, world_size: int) -> Iterator[list[dict[str, Tensor]]]:
    """Yield each step's batches, one for each rank."""
    data = TwoTasks()
    sampler = TaskSampler(TASKS[task], task=task, batch_size=batch_size, seed=0, world_size=world_size)
    for epoch in range(EPOCHS):
        sampler.set_position(epoch=epoch)
        for step in range(len(sampler)):
            yield [data.batch(rows) for rows in sampler.global_rows(step)]


class Loop:
    """A training loop over both tasks; a method says its prompts, its loss and what it does between tasks."""

    def __init__(self, method: Any) -> None:
        module = PromptToy()
        # only the values that prompts start from are the callback's
        start = method.attach(module, 2)
        self.values = {name: p.detach().clone().requires_grad_() for name, p in start.named_parameters()}
        self.model = tiny_bert().requires_grad_(False)
        self.model.classifier.requires_grad_(True)
        self.task = 0

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        raise NotImplementedError

    def rows(self) -> dict[str, slice]:
        """Return the rows that the present task may move, by parameter; all of the others."""
        return {}

    def begin(self) -> None:
        """What a task starts with."""

    def end(self) -> None:
        """What a task ends with."""

    def anew(self) -> list[Tensor]:
        """Return the parameters whose momentum a task does not inherit."""
        return [self.values[name] for name in self.rows()]

    def query(self, batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return encode(self.model, batch)[:, 0]

    def run(self, batch_size: int = 8, world_size: int = 1) -> Tensor:
        head = list(self.model.classifier.parameters())
        optimizer = torch.optim.SGD([*self.values.values(), *head], lr=0.1, momentum=0.9, weight_decay=0.01)
        for self.task in (0, 1):
            self.begin()
            for parameter in self.anew():
                optimizer.state.pop(parameter, None)
            for ranks in batches(self.task, batch_size, world_size):
                optimizer.zero_grad()
                before = {name: value.detach().clone() for name, value in self.values.items()}
                (sum(self.loss(batch) for batch in ranks) / len(ranks)).backward()
                optimizer.step()
                with torch.no_grad():
                    for name, rows in self.rows().items():
                        kept = self.values[name][rows].clone()
                        self.values[name].copy_(before[name])
                        self.values[name][rows] = kept
            self.end()
        return flat([*self.values.values(), *head])


class L2PLoop(Loop):
    """Learning to Prompt, two of four prompts."""

    strength, top_k = 0.5, 2

    def begin(self) -> None:
        self.earlier = self.counts.clone() if self.task else torch.zeros(4)
        self.counts = self.earlier.clone()

    diversify = False

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        similar = cosines(self.query(batch), self.values["keys"])
        tokens, pull = [], torch.zeros(())
        for sample in similar:
            distance = 1 - sample.detach()
            if self.diversify:
                distance = distance * (self.earlier + 1)
            chosen = distance.argsort()[: self.top_k]
            self.counts[chosen] += 1
            tokens.append(self.values["tokens"][chosen].flatten(0, 1))
            pull = pull + (1 - sample[chosen]).sum() / len(similar)
        return loss_of(self.model, batch, tokens=torch.stack(tokens)) + self.strength * pull


class DiversifiedLoop(L2PLoop):
    """The same with the penalty on what the first task chose."""

    diversify = True


class DualLoop(Loop):
    """DualPrompt: shared prefixes in layer 0, a task's in layers 1 and 2."""

    strength = 1.0

    def rows(self) -> dict[str, slice]:
        own = slice(self.task, self.task + 1)
        return {"keys": own, "expert": own}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        size = len(batch["labels"])
        pull = (1 - cosines(self.query(batch), self.values["keys"])[:, self.task]).mean()
        expert = torch.stack([self.values["expert"][self.task]] * size)
        prefixes = {0: torch.stack([self.values["general"][0]] * size), 1: expert[:, 0], 2: expert[:, 1]}
        return loss_of(self.model, batch, prefixes=prefixes) + self.strength * pull


class CodaLoop(Loop):
    """CODA-Prompt: three components for each task in layers 0 and 2."""

    orthogonality, per_task, layers = 0.1, 3, (0, 2)

    def rows(self) -> dict[str, slice]:
        own = slice(self.task * self.per_task, (self.task + 1) * self.per_task)
        return dict.fromkeys(("keys", "attention", "components"), own)

    def begin(self) -> None:
        if not self.task:
            return
        with torch.no_grad():
            for value in self.values.values():
                for layer in range(len(self.layers)):
                    for row in range(self.per_task, len(value)):
                        before = value[:row, layer].flatten(1).double()
                        new = value[row, layer].flatten().double()
                        # the least-squares fit of the row by those before is its part in their span
                        new = new - before.T @ torch.linalg.lstsq(before.T, new[:, None]).solution[:, 0]
                        value[row, layer] = (new / new.norm()).float().view_as(value[row, layer])

    def seen(self, name: str) -> Tensor:
        first, last = self.task * self.per_task, (self.task + 1) * self.per_task
        return torch.cat([self.values[name][:first].detach(), self.values[name][first:last]])

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        query, prefixes, distance = self.query(batch), {}, torch.zeros(())
        keys, attention, components = (self.seen(name) for name in ("keys", "attention", "components"))
        for place, layer in enumerate(self.layers):
            looked = query[:, None, :] * attention[None, :, place]
            alpha = torch.nn.functional.cosine_similarity(looked, keys[None, :, place], dim=2)
            prefixes[layer] = sum(
                alpha[:, m, None, None, None, None] * components[m, place] for m in range(len(components))
            )
            for rows in (keys, attention, components):
                flat_rows = rows[:, place].flatten(1)
                distance = distance + (flat_rows @ flat_rows.T - torch.eye(len(rows))).square().mean()
        return loss_of(self.model, batch, prefixes=prefixes) + self.orthogonality * distance


class ProgressiveLoop(Loop):
    """Progressive Prompts of three tokens."""

    def rows(self) -> dict[str, slice]:
        return {"tokens": slice(self.task, self.task + 1)}

    def prompt(self) -> Tensor:
        return self.values["tokens"][self.task]

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        older = [self.values["tokens"][task].detach() for task in reversed(range(self.task))]
        tokens = torch.cat([self.prompt(), *older])
        return loss_of(self.model, batch, tokens=torch.stack([tokens] * len(batch["labels"])))


class ResidualLoop(ProgressiveLoop):
    """The same through a residual network."""

    def __init__(self, method: Any, restarted: list[Tensor]) -> None:
        super().__init__(method)
        self.restarted = restarted

    def anew(self) -> list[Tensor]:
        return list(self.values.values())

    def prompt(self) -> Tensor:
        tokens = self.values["tokens"][self.task]
        first, bias, second, last = (
            self.values[f"residual.{name}"] for name in ("0.weight", "0.bias", "2.weight", "2.bias")
        )
        return tokens + torch.relu(tokens @ first.T + bias) @ second.T + last

    def end(self) -> None:
        with torch.no_grad():
            self.values["tokens"][self.task] = self.prompt()
            names = [name for name in self.values if name.startswith("residual")]
            first = self.restarted[self.task]
            for name in names:
                self.values[name].zero_()
            self.values["residual.0.weight"].copy_(first)


class SPromptsLoop(Loop):
    """S-Prompts of three tokens; how samples find them plays no part in training."""

    def rows(self) -> dict[str, slice]:
        return {"tokens": slice(self.task, self.task + 1)}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        tokens = torch.stack([self.values["tokens"][self.task]] * len(batch["labels"]))
        return loss_of(self.model, batch, tokens=tokens)
