"""The rows of the contract of forget losses, one file in ``unlearning_rows`` for each method, and their plain loop.

A stream of three tasks of 16 samples with a request after the second one: learn, learn, forget, learn. The plain loop
is torch without Lightning and without our losses, of a classifier or of a model of tokens, on any number of ranks:
ranks are simulated, as the mean of their losses.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset, Subset

import unlearning_rows
from lightning_cl import TaskStreamDataModule
from lightning_cl.core.requests import ForgetRequest
from lightning_cl.core.rng import derived_seed
from lightning_cl.datamodules import Predefined
from lightning_cl.datamodules.samplers import RequestSampler, TaskSampler
from lightning_cl.unlearning import ForgetLoss
from toys import ToyModule, toy_data, weights

EPOCHS, EPOCHS_OF_REQUEST = 2, 3
TASKS = [np.arange(16), np.arange(16, 32), np.arange(32, 48)]
# two kinds of samples of both tasks; the last one belongs to the task that comes after the request
REQUESTED = [1, 2, 5, 6, 9, 13, 17, 18, 21, 22, 25, 29, 33]
FORGOTTEN = np.array(REQUESTED[:-1])
RETAINED = np.setdiff1d(np.arange(32), FORGOTTEN)
LAST = np.setdiff1d(TASKS[2], REQUESTED)
VOCABULARY, LENGTH = 8, 6


@dataclass
class Batch:
    """A batch of either kind: classes [B] of features [B, 6], or tokens [B, 6] with labels, unshifted."""

    inputs: Tensor
    labels: Tensor
    mask: Tensor | None = None
    alternate: Batch | None = None
    ids: Tensor = field(default_factory=lambda: torch.empty(0))


class PlainLoss:
    """A forget loss as a plain loop has it; a row overrides what its method does otherwise.

    ``model`` and ``reference`` are the networks, called with the inputs of a batch; the reference is frozen.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def start(self, seed: int) -> None:
        """Begin the request."""

    def forget(self, model: nn.Module, reference: nn.Module, batch: Batch) -> Tensor:
        """The forget term of one batch."""
        raise NotImplementedError

    def retain(self, model: nn.Module, reference: nn.Module, batch: Batch) -> Tensor:
        """The retain term of one batch: the loss of the module's own step."""
        return own_loss(model, batch)

    def weigh(self, weight: float, term: Tensor) -> Tensor:
        """What the retain term adds."""
        return weight * term

    def after_step(self, retain_loss: float) -> None:
        """See the mean of the retain terms over micro-batches and ranks."""


@dataclass(frozen=True)
class LossRow:
    """A forget loss, and what stands for it in the plain loop.

    Args:
        method: The class.
        settings: Its arguments, and the plain loss's.
        plain: Makes the plain loss.
        retain: The retain term.
        tokens: Whether it needs tokens; otherwise it runs on classes as well.
        unused_parameters: Whether a step of the request leaves parameters without a gradient, which DDP must be told.
        tolerance: Largest difference of a weight.
    """

    method: type[ForgetLoss]
    settings: dict[str, Any]
    plain: Callable[..., PlainLoss]
    retain: str | None = "nll"
    tokens: bool = False
    unused_parameters: bool = False
    tolerance: float = 1e-6

    def make(self) -> ForgetLoss:
        return self.method(**self.settings)


def all_rows() -> dict[str, LossRow]:
    """Return the rows of all methods, those of each file in its ``ROWS``."""
    found: dict[str, LossRow] = {}
    for module in iter_modules(unlearning_rows.__path__):
        found |= import_module(f"unlearning_rows.{module.name}").ROWS
    return found


def nlls(model: nn.Module, batch: Batch) -> list[Tensor]:
    """The negative log-likelihoods of each row's supervised tokens, row by row."""
    log_p = model(batch.inputs).log_softmax(-1)
    if batch.labels.ndim == 1:
        return [-log_p[row, label][None] for row, label in enumerate(batch.labels)]
    found = []
    for row, labels in enumerate(batch.labels):
        terms = [-log_p[row, t, labels[t + 1]] for t in range(len(labels) - 1) if labels[t + 1] != -100]
        found.append(torch.stack(terms))
    return found


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of the toys' own steps: a mean over rows, or over supervised tokens."""
    scores, labels = model(batch.inputs), batch.labels
    if labels.ndim == 1:
        return cross_entropy(scores, labels)
    return cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class PositionWise(nn.Linear):
    """A linear layer of every position that returns no view, which torch warns of where it is sharded."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight.t() + self.bias


class TokenToy(ToyModule):
    """A model of tokens as users write them: each is predicted from the one before."""

    def __init__(self, dropout: float = 0.0, learning_rate: float = 0.1, seed: int = 7, optimizer: Any = None) -> None:
        super().__init__(dropout, learning_rate, seed, optimizer)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = nn.Sequential(
                nn.Embedding(VOCABULARY, 8),
                PositionWise(8, 8),
                nn.ReLU(),
                nn.Dropout(dropout),
                PositionWise(8, VOCABULARY),
            )

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(input_ids)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        scores = self(batch["input_ids"], batch["attention_mask"])
        return cross_entropy(scores[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), batch_size=len(batch["labels"]), sync_dist=True)


class LabelledRows(Subset[Any]):
    """The toy data as a command line builds it."""

    def __init__(self) -> None:
        super().__init__(toy_data(), range(48))


class TokenRows(Dataset[dict[str, Tensor]]):
    """Rows that count up from anywhere, padded on the right, with a prompt of two tokens and another answer."""

    def __init__(self, rows: int = 48) -> None:
        generator = torch.Generator().manual_seed(0)
        starts = torch.randint(0, VOCABULARY, (rows, 1), generator=generator)
        mask = torch.arange(LENGTH) < torch.randint(4, LENGTH + 1, (rows, 1), generator=generator)
        tokens = ((starts + torch.arange(LENGTH)) % VOCABULARY) * mask
        # the same prompt, and from there on down by two
        down = (starts + 1 - 2 * (torch.arange(LENGTH) - 1)) % VOCABULARY
        other = torch.where(torch.arange(LENGTH) < 2, tokens, down) * mask
        answered = mask & (torch.arange(LENGTH) >= 2)
        self.columns = {
            "input_ids": tokens,
            "attention_mask": mask.long(),
            "labels": tokens.masked_fill(~answered, -100),
            "alternate_input_ids": other,
            "alternate_attention_mask": mask.long(),
            "alternate_labels": other.masked_fill(~answered, -100),
        }

    def __len__(self) -> int:
        return len(self.columns["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def read(rows: np.ndarray, tokens: bool) -> Batch:
    """Return rows of the training data as a batch."""
    ids = torch.from_numpy(rows)
    if not tokens:
        inputs, labels = toy_data().tensors
        return Batch(inputs[ids], labels[ids], ids=ids)
    columns = {name: column[ids] for name, column in TokenRows().columns.items()}
    first, second = (
        (columns[f"{prefix}input_ids"], columns[f"{prefix}labels"], columns[f"{prefix}attention_mask"].bool())
        for prefix in ("", "alternate_")
    )
    return Batch(*first, alternate=Batch(*second, ids=ids), ids=ids)


def request_stream(*, tokens: bool = False, batch_size: int = 8) -> TaskStreamDataModule:
    """Learn, learn, forget, learn."""
    data: Any = TokenRows() if tokens else toy_data()
    parts = [Subset(data, rows.tolist()) for rows in TASKS]
    return TaskStreamDataModule(
        parts,
        parts,
        scenario=Predefined(),
        batch_size=batch_size,
        epochs_per_task=EPOCHS,
        requests=[ForgetRequest("some", rows=REQUESTED, after=2)],
        epochs_per_request=EPOCHS_OF_REQUEST,
    )


def _batches(
    rows: np.ndarray, task: int, epochs: int, batch_size: int, world_size: int
) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Yield for each step what each rank forgets, or learns, and what it retains."""
    kind = RequestSampler if task == 2 else TaskSampler
    fixed: dict[str, Any] = {"task": task, "batch_size": batch_size, "seed": 0, "world_size": world_size}
    samplers = [
        kind(rows, **({"retained": RETAINED} if task == 2 else {}), **fixed, rank=rank) for rank in range(world_size)
    ]
    for epoch in range(epochs):
        for sampler in samplers:
            sampler.set_position(epoch=epoch)
        for parts in zip(*samplers, strict=True):
            yield [(p.forget.rows, p.retain.rows) if task == 2 else (p.rows, p.rows) for p in parts]


def plain_loop(
    row: LossRow | None,
    *,
    tokens: bool = False,
    batch_size: int = 8,
    world_size: int = 1,
    accumulate: int = 1,
    forget_weight: float = 1.0,
    retain_weight: float = 1.0,
) -> Tensor:
    """Return the final weights of learn, learn, forget, learn; without a row the request changes nothing."""
    module = (TokenToy if tokens else ToyModule)()
    model: nn.Module = module.model
    optimizer = module.configure_optimizers()
    for task, rows in enumerate([TASKS[0], TASKS[1], FORGOTTEN, LAST]):
        requested = task == 2
        if requested and row is None:
            continue
        if requested or (task == 3 and row is not None):
            # what the optimizer remembers of forgotten samples is dropped
            optimizer = module.configure_optimizers()
        if requested:
            assert row is not None
            loss, reference = row.plain(**row.settings), copy.deepcopy(model).requires_grad_(False)
            loss.start(derived_seed(0, "request", "some"))
        waiting: list[float] = []
        # Lightning steps at an epoch's end whether or not the accumulation is complete
        for number, parts in enumerate(
            steps := list(_batches(rows, task, EPOCHS_OF_REQUEST if requested else EPOCHS, batch_size, world_size))
        ):
            total = torch.zeros(())
            for first, second in parts:
                if not requested:
                    total = total + own_loss(model, read(first, tokens))
                    continue
                term = forget_weight * loss.forget(model, reference, read(first, tokens))
                if row is not None and row.retain is not None:
                    retained = loss.retain(model, reference, read(second, tokens))
                    waiting.append(retained.item())
                    term = term + loss.weigh(retain_weight, retained)
                total = total + term
            (total / len(parts) / accumulate).backward()
            per_epoch = len(steps) // (EPOCHS_OF_REQUEST if requested else EPOCHS)
            if (number % per_epoch + 1) % accumulate and (number + 1) % per_epoch:
                continue
            optimizer.step()
            optimizer.zero_grad()
            if requested:
                loss.after_step(sum(waiting) / max(len(waiting), 1))
                waiting = []
    return weights(module)
