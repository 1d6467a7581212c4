"""CODA-Prompt (Smith et al. 2023, arXiv:2211.13218)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_cl.adapters.prompt_backbone import Backbone
from lightning_cl.adapters.prompt_pool import Chosen, Prompts, Query
from lightning_cl.adapters.prompted import PromptTuning, prompts_in
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_automatic_optimization, check_count, check_positive
from lightning_cl.core.state import fill, full_copy
from lightning_cl.functional.prompts import component_weights, orthonormalise_, prompt_orthogonality

__all__ = ["CODAPrompt"]


class WeightedComponents(Prompts):
    """Components of prefixes with a key and a feature attention each, summed with weights for each sample."""

    by_task: ClassVar[tuple[str, ...]] = ("keys", "attention", "components")

    def __init__(
        self, backbone: Backbone, query: Query, num_tasks: int, layers: list[int], per_task: int, length: int
    ) -> None:
        super().__init__(backbone, query, num_tasks)
        self.layers = layers
        self.per_task = per_task
        rows = num_tasks * per_task
        self.keys = nn.Parameter(torch.empty(rows, len(layers), backbone.width))
        self.attention = nn.Parameter(torch.empty(rows, len(layers), backbone.width))
        shape = (2, backbone.key_heads, length, backbone.head_width)
        self.components = nn.Parameter(torch.empty(rows, len(layers), *shape))

    @override
    def choose(self, query: Tensor | None, batch_size: int) -> Chosen:
        assert query is not None
        if (task := self.learning) is not None:
            keys, attention, components = (self.until(task, getattr(self, name)) for name in self.by_task)
            weights = component_weights(query, attention, keys)
        else:
            components = self.components
            weights = component_weights(query, self.attention, self.keys)
            rows = torch.arange(len(components), device=weights.device)
            # before the first task, as at its beginning
            weights = weights * (rows < self.learned.clamp(min=1) * self.per_task)[:, None]
        summed = torch.einsum("bml,mlchpd->lbchpd", weights, components.float())
        return Chosen(prefixes=dict(zip(self.layers, summed, strict=True)))

    def until(self, task: int, rows: Tensor) -> Tensor:
        """Return the rows up to a task's, those of earlier tasks without a gradient."""
        start = task * self.per_task
        return torch.cat([rows[:start].detach(), rows[start : start + self.per_task]])

    @override
    def start(self, generator: torch.Generator, backbone: Backbone) -> None:
        for rows in (self.keys, self.attention, self.components):
            nn.init.uniform_(rows, -1, 1, generator=generator)
            self.orthonormalise_(rows.data, 0)

    def orthonormalise_(self, rows: Tensor, task: int) -> None:
        """Make the rows of a task orthogonal to those before them and to each other, layer by layer."""
        start = task * self.per_task
        for layer in range(len(self.layers)):
            of_layer = rows[: start + self.per_task, layer].clone()
            orthonormalise_(of_layer, start)
            rows[start : start + self.per_task, layer] = of_layer[start:]


class CODAPrompt(PromptTuning):
    r"""Give each sample prefixes that are weighted sums of components, to which each task adds some.

    .. math:: \alpha_m = \cos(q(x) \odot A_m, K_m), \qquad P(x) = \sum_m \alpha_m P_m

    for every layer with its own attention A, keys K and components P; P(x) holds keys and values that stand in front of
    those of the layer. A task trains its own rows; those of earlier tasks take part and are held to the bit, those of
    later tasks take no part. All is learned by the task's loss, plus, where :math:`\lambda > 0`,

    .. math:: \lambda \sum_l \sum_{R \in \{P, K, A\}} \frac{1}{M^2} \| R_l R_l^\top - I \|_F^2

    over the M rows up to the task's, a sum over the layers l and a mean over entries. At its start a task's rows are
    made orthogonal to all before them (Gram-Schmidt).

    Args:
        per_task: Components that each task adds.
        length: Positions of a prefix. The paper counts keys and values together, twice as many.
        layers: Layers with prefixes, from 0; the first five if ``None``.
        orthogonality: :math:`\lambda`; 0 or above. The paper's norm is not squared; its code takes the mean of
            squares, as here.
        num_tasks: Tasks to make room for; a task stream says it itself.
        query: What a sample is recognised by: ``"cls"`` (the first token's last hidden state; of a causal language
            model the last token's) or ``"mean"`` over tokens.
        backbone: Name of the network of transformers in the module; found by itself where there is one.
        trainable: Patterns (as in :mod:`fnmatch`) of what trains beside the prompts; by default all that is outside the
            network, but for the output embeddings of a language model.
        seed: Seeds the first values.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for a pattern that matches nothing, a module
            without such a network or with several, layers that take no prefixes, an unknown number of tasks, and more
            components than can be orthogonal.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="coda-prompt",
        family="prompts",
        paper="Smith et al. 2023, arXiv:2211.13218",
        needs="a pre-trained network of transformers whose attention takes a cache (no ViT)",
        state="components, keys and attention per task",
    )

    def __init__(
        self,
        per_task: int = 10,
        *,
        length: int = 4,
        layers: list[int] | None = None,
        orthogonality: float = 0.0,
        num_tasks: int | None = None,
        query: Query = "cls",
        backbone: str | None = None,
        trainable: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        check_count("per_task", per_task)
        check_count("length", length)
        check_positive("orthogonality", orthogonality, zero_allowed=True)
        super().__init__(num_tasks=num_tasks, query=query, backbone=backbone, trainable=trainable, seed=seed)
        self.per_task = per_task
        self.length = length
        self.layers = [0, 1, 2, 3, 4] if layers is None else layers
        self.orthogonality = orthogonality

    @override
    def build(self, backbone: Backbone, num_tasks: int) -> Prompts:
        layers = backbone.check_layers("layers", self.layers)
        if num_tasks * self.per_task > backbone.width:
            raise ValueError(
                f"`per_task={self.per_task}` components of {num_tasks} tasks cannot all be orthogonal in"
                f" {backbone.width} dimensions: take at most {backbone.width // num_tasks}."
            )
        return WeightedComponents(backbone, self.query, num_tasks, layers, self.per_task, self.length)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.orthogonality:
            check_automatic_optimization(
                pl_module, self, f"orthogonality={self.orthogonality}", "Use `orthogonality=0`."
            )
        super().setup(trainer, pl_module, stage)

    @override
    @torch.no_grad()
    def start_task(self, trainer: Trainer, pl_module: LightningModule, prompts: Prompts) -> None:
        assert isinstance(prompts, WeightedComponents)
        if not self._task:
            return
        for name in prompts.by_task:
            parameter: Tensor = getattr(prompts, name)
            rows = full_copy(parameter)
            prompts.orthonormalise_(rows, self._task)
            fill(parameter, rows)

    @override
    def loss_term(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, outputs: Any
    ) -> Tensor | None:
        if not self.orthogonality:
            return None
        prompts: WeightedComponents = prompts_in(pl_module)
        rows = [prompts.until(self._task, getattr(prompts, name)) for name in prompts.by_task]
        distances = [prompt_orthogonality(of_layer) for each in rows for of_layer in each.unbind(1)]
        return self.orthogonality * torch.stack(distances).sum()
