"""DualPrompt (Wang et al. 2022, arXiv:2204.04799)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_cl.adapters.prompt_backbone import Backbone
from lightning_cl.adapters.prompt_pool import Chosen, Prompts, Query
from lightning_cl.adapters.prompted import KeyedPromptTuning
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_count
from lightning_cl.functional.prompts import key_similarities

__all__ = ["DualPrompt"]


class GeneralAndExpert(Prompts):
    """Prefixes that all tasks share, and prefixes of each task with a key."""

    by_task: ClassVar[tuple[str, ...]] = ("keys", "expert")

    def __init__(
        self,
        backbone: Backbone,
        query: Query,
        num_tasks: int,
        general: tuple[list[int], int],
        expert: tuple[list[int], int],
    ) -> None:
        super().__init__(backbone, query, num_tasks)
        (self.general_layers, general_length), (self.expert_layers, expert_length) = general, expert
        heads, width = backbone.key_heads, backbone.head_width
        self.keys = nn.Parameter(torch.empty(num_tasks, backbone.width))
        # keys and values apart, so that none can take the other's place
        self.general = nn.Parameter(torch.empty(len(self.general_layers), 2, heads, general_length, width))
        self.expert = nn.Parameter(torch.empty(num_tasks, len(self.expert_layers), 2, heads, expert_length, width))

    @override
    def choose(self, query: Tensor | None, batch_size: int) -> Chosen:
        assert query is not None
        similarities = key_similarities(query, self.keys)
        if self.learning is not None:
            self.terms.append(1 - similarities[:, self.learning])
            expert = self.expert[self.learning].expand(batch_size, *self.expert.shape[1:])
        else:
            tasks = torch.arange(self.num_tasks, device=similarities.device)
            # before the first task there is a first one to take
            unlearned = tasks >= self.learned.clamp(min=1)
            expert = self.expert[similarities.masked_fill(unlearned, -torch.inf).argmax(1)]
        prefixes = {layer: expert[:, place] for place, layer in enumerate(self.expert_layers)}
        for place, layer in enumerate(self.general_layers):
            prefixes[layer] = self.general[place].expand(batch_size, *self.general.shape[1:])
        return Chosen(prefixes=prefixes)

    @override
    def start(self, generator: torch.Generator, backbone: Backbone) -> None:
        nn.init.normal_(self.keys, std=backbone.width**-0.5, generator=generator)
        for prefix in (self.general, self.expert):
            nn.init.uniform_(prefix, -1, 1, generator=generator)


class DualPrompt(KeyedPromptTuning):
    r"""Give some layers prefixes that all tasks share, and others a prefix of the sample's task, found by its key.

    Prefixes are keys and values in front of those of a layer. A step of task t uses the prefixes of t and minimises the
    task's loss plus

    .. math:: \frac{\lambda}{B} \sum_{x} \left(1 - \cos(q(x), k_t)\right).

    Otherwise each sample gets those of the task with the greatest :math:`\cos(q(x), k_t)` among the tasks that have
    begun. Prefixes and keys of other tasks are held to the bit.

    Args:
        general_layers: Layers with shared prefixes, from 0; the first two if ``None``.
        expert_layers: Layers with prefixes by task; the next three if ``None``.
        general_length: Positions of a shared prefix. The paper counts keys and values together, twice as many.
        expert_length: Positions of a prefix by task.
        strength: :math:`\lambda`; above 0.
        num_tasks: Tasks to make room for; a task stream says it itself.
        query: What a sample is recognised by: ``"cls"`` (the first token's last hidden state; of a causal language
            model the last token's) or ``"mean"`` over tokens.
        backbone: Name of the network of transformers in the module; found by itself where there is one.
        trainable: Patterns (as in :mod:`fnmatch`) of what trains beside the prompts; by default all that is outside the
            network, but for the output embeddings of a language model.
        seed: Seeds the first values.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for a pattern that matches nothing, a module
            without such a network or with several, layers that take no prefixes, and an unknown number of tasks.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="dual-prompt",
        family="prompts",
        paper="Wang et al. 2022, arXiv:2204.04799",
        needs="a pre-trained network of transformers whose attention takes a cache (no ViT)",
        state="a prefix and a key per task",
    )

    def __init__(
        self,
        general_layers: list[int] | None = None,
        expert_layers: list[int] | None = None,
        *,
        general_length: int = 5,
        expert_length: int = 20,
        strength: float = 1.0,
        num_tasks: int | None = None,
        query: Query = "cls",
        backbone: str | None = None,
        trainable: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        check_count("general_length", general_length)
        check_count("expert_length", expert_length)
        super().__init__(strength, num_tasks=num_tasks, query=query, backbone=backbone, trainable=trainable, seed=seed)
        self.general_layers = [0, 1] if general_layers is None else general_layers
        self.expert_layers = [2, 3, 4] if expert_layers is None else expert_layers
        if both := set(self.general_layers) & set(self.expert_layers):
            raise ValueError(
                f"Layer {min(both)} is in `general_layers` and in `expert_layers`: a layer has one prefix."
            )
        self.general_length = general_length
        self.expert_length = expert_length

    @override
    def build(self, backbone: Backbone, num_tasks: int) -> Prompts:
        general = backbone.check_layers("general_layers", self.general_layers)
        expert = backbone.check_layers("expert_layers", self.expert_layers)
        return GeneralAndExpert(
            backbone, self.query, num_tasks, (general, self.general_length), (expert, self.expert_length)
        )
