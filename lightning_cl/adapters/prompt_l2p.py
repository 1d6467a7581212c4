"""Learning to Prompt (Wang et al. 2022, arXiv:2112.08654)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_cl.adapters.prompt_backbone import Backbone
from lightning_cl.adapters.prompt_pool import Chosen, Prompts, Query
from lightning_cl.adapters.prompted import KeyedPromptTuning, prompts_in
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_count
from lightning_cl.core.distributed import rank, sum_over_ranks_
from lightning_cl.core.shards import PerRank, of_all_ranks
from lightning_cl.core.task import Task
from lightning_cl.functional.prompts import key_distance, key_similarities, selection_penalty

__all__ = ["L2P"]


class PromptPool(Prompts):
    """A pool of prompts with a key each, of which a sample gets those with the nearest keys."""

    def __init__(self, backbone: Backbone, query: Query, pool: int, length: int, top_k: int) -> None:
        super().__init__(backbone, query)
        self.top_k = top_k
        self.keys = nn.Parameter(torch.empty(pool, backbone.width))
        self.tokens = nn.Parameter(torch.empty(pool, length, backbone.width))
        # factors on the distances in training, and how often each was chosen there since they were made
        self.penalty: Tensor | None = None
        self.counts = torch.zeros(pool, dtype=torch.int64)

    @override
    def choose(self, query: Tensor | None, batch_size: int) -> Chosen:
        assert query is not None
        similarities = key_similarities(query, self.keys)
        distances = 1 - similarities.detach()
        if self.learning is not None and self.penalty is not None:
            distances = distances * self.penalty.to(distances.device)
        nearest = distances.topk(self.top_k, dim=1, largest=False).indices
        if self.learning is not None:
            self.terms.append(key_distance(similarities, nearest))
            if self.penalty is not None:
                self.counts += nearest.flatten().bincount(minlength=len(self.keys)).cpu()
        return Chosen(tokens=self.tokens[nearest].flatten(1, 2))

    @override
    def start(self, generator: torch.Generator, backbone: Backbone) -> None:
        nn.init.normal_(self.keys, std=backbone.width**-0.5, generator=generator)
        nn.init.uniform_(self.tokens, -backbone.token_range, backbone.token_range, generator=generator)


class L2P(KeyedPromptTuning):
    r"""Give each sample the prompts of a shared pool whose keys are nearest to it; only pool, keys and head train.

    With the sample's query q(x) from the frozen network, the K prompts with the greatest :math:`\cos(q(x), k_m)` stand
    in front of the input, the nearest first, and a step minimises the task's loss plus

    .. math:: \frac{\lambda}{B} \sum_{x} \sum_{m \in K_x} \left(1 - \cos(q(x), k_m)\right),

    a mean over the samples and a sum over the chosen keys. Its gradient is all that keys get, so under Adam
    :math:`\lambda` hardly matters. The choice for a sample depends on no other sample, in training neither.

    Args:
        pool: Prompts in the pool, M.
        length: Tokens of a prompt.
        top_k: Prompts for each sample, K; at most ``pool``.
        strength: :math:`\lambda`; above 0.
        diversify: In training, multiply the distance of a key by how often earlier tasks chose it (the paper's equation
            4), so that a task takes prompts that are free.
        query: What a sample is recognised by: ``"cls"`` (the first token's last hidden state; of a causal language
            model the last token's) or ``"mean"`` over tokens.
        backbone: Name of the network of transformers in the module; found by itself where there is one.
        trainable: Patterns (as in :mod:`fnmatch`) of what trains beside the prompts; by default all that is outside the
            network, but for the output embeddings of a language model.
        seed: Seeds the first values.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for a pattern that matches nothing, and a module
            without such a network or with several.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="l2p",
        family="prompts",
        paper="Wang et al. 2022, arXiv:2112.08654",
        needs="a pre-trained network of transformers",
        state="a pool of prompts and keys",
    )

    def __init__(
        self,
        pool: int = 10,
        *,
        length: int = 5,
        top_k: int = 5,
        strength: float = 0.5,
        diversify: bool = False,
        query: Query = "cls",
        backbone: str | None = None,
        trainable: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("pool", pool), ("length", length), ("top_k", top_k)):
            check_count(name, value)
        if top_k > pool:
            raise ValueError(f"`top_k={top_k}` prompts are more than `pool={pool}` has.")
        super().__init__(strength, query=query, backbone=backbone, trainable=trainable, seed=seed)
        # a class attribute of the base: a pool that all tasks share needs no boundaries
        self.boundaries = "required" if diversify else "unused"  # type: ignore[misc]
        self.pool = pool
        self.length = length
        self.top_k = top_k
        self.diversify = diversify
        # over all ranks before the present task, and on this rank within it
        self._earlier = torch.zeros(pool, dtype=torch.int64)
        self._counts = torch.zeros(pool, dtype=torch.int64)

    @property
    @override
    def separate(self) -> bool:
        return False

    @override
    def build(self, backbone: Backbone, num_tasks: int) -> Prompts:
        return PromptPool(backbone, self.query, self.pool, self.length, self.top_k)

    # ------------------------------------------------------------------ how often each was chosen

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        prompts: PromptPool = prompts_in(pl_module)
        prompts.penalty = selection_penalty(self._earlier) if self.diversify else None
        prompts.counts = self._counts

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().on_task_end(trainer, pl_module, task)
        if self.diversify:
            device = trainer.strategy.root_device
            self._earlier += sum_over_ranks_(self._counts.to(device)).cpu()
            self._counts.zero_()
            prompts_in(pl_module).penalty = selection_penalty(self._earlier)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "earlier": self._earlier.clone(), "counts": PerRank(self._counts.clone())}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._earlier = torch.as_tensor(state_dict["earlier"]).clone()
        # only the sum over ranks counts
        counts = torch.stack([torch.as_tensor(value) for value in of_all_ranks(state_dict["counts"])]).sum(0)
        self._counts = counts if rank() == 0 else torch.zeros_like(counts)
