"""S-Prompts (Wang et al. 2022, arXiv:2207.12819)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import Self, override

from lightning_cl.adapters.prompt_backbone import Backbone
from lightning_cl.adapters.prompt_pool import Chosen, Prompts, Query
from lightning_cl.adapters.prompted import PromptTuning
from lightning_cl.adapters.router import PrototypeRouter, task_features
from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_count
from lightning_cl.functional.prototypes import Metric, prototype_distances

__all__ = ["SPrompts"]


class RoutedPrompts(Prompts):
    """A prompt for each task, and prototypes of the tasks' queries by which a sample finds its own."""

    by_task: ClassVar[tuple[str, ...]] = ("tokens",)
    prototype_bits: Tensor

    def __init__(self, backbone: Backbone, query: Query, num_tasks: int, length: int, k: int, metric: Metric) -> None:
        super().__init__(backbone, query, num_tasks)
        self.metric: Metric = metric
        self.output: Tensor | None = None
        self.tokens = nn.Parameter(torch.empty(num_tasks, length, backbone.width))
        # in the module, so that its checkpoint routes without the callback; as integers, which no cast of it rounds
        self.register_buffer("prototype_bits", torch.zeros(num_tasks, k, backbone.width, dtype=torch.int32))

    @property
    def prototypes(self) -> Tensor:
        """The centres of each task's queries, float32 [tasks, k, D]; what is written into it stays."""
        return self.prototype_bits.view(torch.float32)

    @property
    @override
    def asks(self) -> bool:
        return self.learning is None

    @override
    def choose(self, query: Tensor | None, batch_size: int) -> Chosen:
        if query is None:
            assert self.learning is not None
            own = self.tokens[self.learning]
            return Chosen(tokens=own.expand(batch_size, *own.shape))
        self.output = query
        distances = prototype_distances(query, self.prototypes.flatten(0, 1), self.metric)
        nearest = distances.unflatten(1, self.prototypes.shape[:2]).amin(2)
        tasks = torch.arange(self.num_tasks, device=query.device)
        # before the first task there is a first one to take
        unlearned = tasks >= self.learned.clamp(min=1)
        return Chosen(tokens=self.tokens[nearest.masked_fill(unlearned, torch.inf).argmin(1)])

    @override
    def start(self, generator: torch.Generator, backbone: Backbone) -> None:
        nn.init.uniform_(self.tokens, -backbone.token_range, backbone.token_range, generator=generator)


class SPrompts(PromptTuning):
    """Train a prompt for each task on its own, and give each sample that of the task whose features are nearest.

    At a task's start the queries of its samples, from the frozen network without prompts, are clustered by k-means; the
    centres are its prototypes. A training step uses the task's prompt. Otherwise each sample gets the prompt of the
    task with the nearest prototype, whatever else is in the batch. Prompts of other tasks are held to the bit.

    Args:
        length: Tokens of a task's prompt.
        k: Prototypes of a task.
        metric: Distance of a query from a prototype: ``"euclidean"``, ``"cosine"`` or ``"manhattan"``.
        n_samples: Samples of a task to cluster, over all ranks; all if ``None``.
        num_tasks: Tasks to make room for; a task stream says it itself.
        query: What a sample is recognised by: ``"cls"`` (the first token's last hidden state; of a causal language
            model the last token's) or ``"mean"`` over tokens.
        backbone: Name of the network of transformers in the module; found by itself where there is one.
        trainable: Patterns (as in :mod:`fnmatch`) of what trains beside the prompts; by default all that is outside the
            network, but for the output embeddings of a language model.
        seed: Seeds the first values and the starts of k-means.
        batch_adapter: Reads batches of an uncommon structure.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for a pattern that matches nothing, a module
            without such a network or with several, and an unknown number of tasks.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="s-prompts",
        family="prompts",
        paper="Wang et al. 2022, arXiv:2207.12819",
        needs="a pre-trained network of transformers",
        state="a prompt and k prototypes per task",
    )

    def __init__(
        self,
        length: int = 10,
        *,
        k: int = 5,
        metric: Metric = "euclidean",
        n_samples: int | None = None,
        num_tasks: int | None = None,
        query: Query = "cls",
        backbone: str | None = None,
        trainable: list[str] | None = None,
        seed: int = 0,
        batch_adapter: BatchAdapter | None = None,
    ) -> None:
        check_count("length", length)
        if n_samples is not None:
            check_count("n_samples", n_samples)
        super().__init__(num_tasks=num_tasks, query=query, backbone=backbone, trainable=trainable, seed=seed)
        # which checks its own settings
        PrototypeRouter(k, metric, seed=seed)
        self.length = length
        self.k = k
        self.metric: Metric = metric
        self.n_samples = n_samples
        self._adapter = batch_adapter or BatchAdapter()

    @override
    def build(self, backbone: Backbone, num_tasks: int) -> Prompts:
        return RoutedPrompts(backbone, self.query, num_tasks, self.length, self.k, self.metric)

    @override
    def start_task(self, trainer: Trainer, pl_module: LightningModule, prompts: Prompts) -> None:
        assert isinstance(prompts, RoutedPrompts)
        queries: Any = _Queries(prompts)
        features, _ = task_features(trainer, pl_module, self._adapter, queries, nullcontext(), self.n_samples)
        router = PrototypeRouter(self.k, self.metric, seed=self.seed)
        router.add(self._task, features)
        centres = router.prototypes[self._task]
        # fewer centres than k, of a task with few samples, stand there several times
        prompts.prototypes[self._task] = centres[torch.arange(self.k, device=centres.device) % len(centres)]


class _Queries:
    """What is recorded of a forward in the place of a layer's output: the queries that prompts were chosen by."""

    def __init__(self, prompts: RoutedPrompts) -> None:
        self._prompts = prompts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._prompts.output = None

    @property
    def output(self) -> Tensor:
        """The queries of the last forward [B, D]."""
        assert self._prompts.output is not None
        return self._prompts.output
