"""Meta-experience replay (Riemer et al. 2019, arXiv:1810.11910)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import Unpack, override

from lightning_cl.callbacks.gradients_aside import (
    average_over_ranks_,
    backward_aside,
    check_gradients_aside,
    gradients_aside,
)
from lightning_cl.callbacks.memory import ReplayMemory
from lightning_cl.callbacks.memory_settings import MemorySettings
from lightning_cl.core.batches import own_mapping
from lightning_cl.core.callback import ContinualCallback
from lightning_cl.core.capture import metrics_kept
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_count, check_positive
from lightning_cl.core.distributed import max_over_ranks_, sum_over_ranks_, world_size
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.hooks import overriding
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.state import local
from lightning_cl.core.update import OptimizerStep
from lightning_cl.functional.interference import virtual_step_
from lightning_cl.functional.reptile import meta_gradient, reptile_

__all__ = ["MER"]


class MER(ReplayMemory):
    r"""Step so that gradients of old and new samples come to agree: Reptile over samples, then over batches.

    Algorithm 1 of the paper. In each optimizer step, from the weights :math:`\theta_0`, for each of ``batches`` inner
    batches (the samples of the incoming batch, then a draw of its own from the memory):

    .. math:: \theta_{j+1} = \theta_j - \alpha \nabla \ell_j(\theta_j) \ \text{for each sample } j, \qquad
        \theta \leftarrow \theta^W + \beta \, (\theta_{end} - \theta^W),

    with the weights :math:`\theta^W` before the inner batch; and after the last of them
    :math:`\theta \leftarrow \theta_0 + \gamma (\theta - \theta_0)`. The optimizer gets :math:`(\theta_0 - \theta) /
    \alpha` as its gradient, after which Lightning clips; under plain SGD with the learning rate :math:`\alpha` this is
    the paper's update.

    :math:`\ell_j` is the module's own ``training_step`` on a batch of one sample, in training mode, in the precision of
    the run, in silence and with random numbers of its own. The inner weights are float32 or above. On several ranks an
    inner step takes the mean of the gradients of the ranks' j-th samples, over the ranks that have one. The module's
    step on the whole batch runs as ever and is what it logs; its gradient is not used.

    Args:
        capacity: Samples in memory, over all ranks together; or bytes, such as ``"512MiB"``.
        batches: Inner batches in a step, from 1; the paper's s.
        beta: :math:`\beta`, the Reptile rate within a batch, above 0 and at most 1.
        gamma: :math:`\gamma`, the Reptile rate across batches, above 0 and at most 1.
        learning_rate: :math:`\alpha` of the inner steps; the optimizer's own at that step, for each parameter group, if
            ``None``. Where that is 0, as at the start of a warm-up, the gradient stays as it is.
        **memory: Settings of the memory, see :class:`StoredSamples`; ``batch_size`` is that of a draw.

    Raises:
        ValueError: For a setting out of range, and for ``beta`` and ``gamma`` that are both 1; at the start of a fit
            for manual optimization, for fp16 with a gradient scaler, for batch normalisation in training mode, and for
            callbacks that change the batch, the loss, or (before this one in the list) the gradient.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="mer",
        family="replay",
        paper="Riemer et al. 2019, arXiv:1810.11910",
        needs="automatic optimization; no batch normalisation",
        state="capacity samples over all ranks; 3 copies of the weights in a step",
    )

    def __init__(
        self,
        capacity: int | str,
        *,
        batches: int = 5,
        beta: float = 0.1,
        gamma: float = 1.0,
        learning_rate: float | None = None,
        **memory: Unpack[MemorySettings],
    ) -> None:
        super().__init__(capacity, **memory)
        check_count("batches", batches)
        for name, rate in (("beta", beta), ("gamma", gamma)):
            if not 0 < rate <= 1:
                raise ValueError(f"`{name}` must be above 0 and at most 1, got {rate!r}.")
        if beta == gamma == 1:
            raise ValueError(
                "`beta=1` and `gamma=1` go the whole way back and forth: nothing is left of Reptile, and this is replay"
                " by one step for each sample. Lower one of them, or use `ExperienceReplay`."
            )
        if learning_rate is not None:
            check_positive("learning_rate", learning_rate)
        if self.buffer.recall.needs_hits:
            raise ValueError(
                f"`recall={self.recall!r}` goes by what the model gets right of drawn samples, which `MER` sees one by"
                " one while it moves. Use another schedule."
            )
        self.batches = batches
        self.beta = beta
        self.gamma = gamma
        self.learning_rate = learning_rate
        # incoming batches that the next optimizer step is for
        self._waiting: list[Any] = []

    # ------------------------------------------------------------------ set-up

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_gradients_aside(trainer, pl_module, self)
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._waiting = []
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        # what serves requests does not act in the steps of this one
        others = [c for c in callbacks if isinstance(c, ContinualCallback) and c is not self and "learn" in c.acts_on]
        for hook in ("transform_batch", "replace_loss", "loss_term"):
            for other in overriding(others, hook):
                raise ValueError(
                    f"`MER` steps on one sample at a time by the module's own loss, of which `{type(other).__name__}`"
                    " would change nothing: use one of them."
                )
        for other in overriding(others, "change_gradients"):
            if callbacks.index(other) < callbacks.index(self):
                raise ValueError(
                    f"`MER` puts its own gradient in the place of the step's, and `{type(other).__name__}` before it"
                    " in the list of callbacks would be lost: put `MER` first."
                )

    @override
    def _check(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super()._check(trainer, pl_module, batch, batch_idx)
        for name, module in pl_module.named_modules():
            if isinstance(module, _BatchNorm) and module.training:
                raise ValueError(
                    f"`MER` steps on one sample at a time, which has no batch statistics for {name!r}. Use another"
                    " normalisation, or `ExperienceReplay` with `Reptile`."
                )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._waiting = []

    # ------------------------------------------------------------------ the step

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._waiting.append(own_mapping(batch))

    @override
    def change_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        incoming, self._waiting = self._waiting, []
        size = self.batch_size or sum(self.adapter.size(batch) for batch in incoming)
        draws = [self.draw(trainer, size, stream=number) for number in range(self.batches)]
        inner = [incoming if drawn is None else [*incoming, self.as_batch(drawn, like=incoming[-1])] for drawn in draws]
        with _Walk(step, self.learning_rate) as walk:
            with gradients_aside(pl_module), metrics_kept(pl_module):
                for number, weights in enumerate(self._weights_of_ranks(inner, pl_module.device)):
                    walk.begin_batch()
                    samples = self._samples(inner[number])
                    for position, weight in enumerate(weights):
                        sample = next(samples, None)
                        if sample is None:
                            # a rank with fewer samples keeps the others company
                            sample = self.adapter.select(incoming[0], [0])
                        parts = (trainer.global_rank, self.number_of_draw(trainer), number, position)
                        seed = derived_seed(self.seed, "inner step", *parts)
                        backward_aside(trainer, pl_module, sample, seed=seed, weight=weight)
                        average_over_ranks_(step.parameters.values())
                        walk.step()
                    walk.end_batch(self.beta)
            walk.leave_gradient(self.gamma)

    def _samples(self, batches: list[Any]) -> Iterator[Any]:
        return (self.adapter.select(batch, [row]) for batch in batches for row in range(self.adapter.size(batch)))

    def _weights_of_ranks(self, inner: list[list[Any]], device: torch.device) -> list[list[Tensor | None]]:
        """Return for each inner batch the factor of this rank's loss in each step, as many as the longest rank takes.

        The strategy divides by the number of ranks; what is wanted is the mean over those that have a sample.
        """
        own = [sum(self.adapter.size(batch) for batch in batches) for batches in inner]
        if world_size() == 1:
            return [[None] * length for length in own]
        lengths = max_over_ranks_(torch.tensor(own, device=device)).tolist()
        here = torch.zeros(len(own), max(lengths), device=device)
        for row, length in zip(here, own, strict=True):
            row[:length] = 1
        weights = here * world_size() / sum_over_ranks_(here.clone()).clamp(min=1)
        return [list(row[:length].unbind()) for row, length in zip(weights, lengths, strict=True)]

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        trained = [local(p) for p in pl_module.parameters() if p.requires_grad]
        # the weights before the step and before the inner batch, and the gradient of the step, which waits
        device = sum(shard.nbytes * 2 + shard.numel() * max(shard.itemsize, 4) for shard in trained)
        return replace(super().footprint(trainer, pl_module, batch), device=device)


class _Walk:
    """Moves an optimizer's weights by inner steps, and turns the way into a gradient."""

    def __init__(self, step: OptimizerStep, learning_rate: float | None) -> None:
        self._groups: list[tuple[float, list[Parameter]]] = []
        for group in step.optimizer.param_groups:
            rate = float(group["lr"]) if learning_rate is None else learning_rate
            if rate > 0:
                self._groups.append((rate, [p for p in group["params"] if p.requires_grad]))
        parameters = [p for _, members in self._groups for p in members]
        self._shards = [local(p.detach()) for p in parameters]
        self._origin = [shard.clone() for shard in self._shards]
        # of float32 the weights themselves
        self._weights = [shard.to(torch.promote_types(shard.dtype, torch.float32)) for shard in self._shards]
        self._start: list[Tensor] = []
        self._index = {p: number for number, p in enumerate(parameters)}
        self._reached: set[Parameter] = set()

    def __enter__(self) -> _Walk:
        return self

    def __exit__(self, *_: object) -> None:
        # to the bit, also if a pass fails and a checkpoint is written for it
        for shard, kept in zip(self._shards, self._origin, strict=True):
            shard.copy_(kept)

    def begin_batch(self) -> None:
        """Note the weights before an inner batch."""
        self._start = [weight.clone() for weight in self._weights]

    def step(self) -> None:
        """Take a plain step by the present gradients."""
        for rate, members in self._groups:
            reached = {p: p.grad for p in members if p.grad is not None}
            virtual_step_([self._weights[self._index[p]] for p in reached], [local(g) for g in reached.values()], rate)
            self._reached |= reached.keys()
        self._show()

    def end_batch(self, rate: float) -> None:
        """Keep a part of the way since the inner batch began."""
        reptile_(self._weights, self._start, rate)
        self._show()

    def leave_gradient(self, rate: float) -> None:
        """Make a part of the whole way the gradient of the optimizer's step."""
        origin = [kept.to(weight.dtype) for kept, weight in zip(self._origin, self._weights, strict=True)]
        reptile_(self._weights, origin, rate)
        for learning_rate, members in self._groups:
            for parameter in members:
                if parameter in self._reached:
                    number = self._index[parameter]
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    gradient = meta_gradient(origin[number], self._weights[number], learning_rate)
                    local(parameter.grad).copy_(gradient)

    def _show(self) -> None:
        """Give the module weights that are kept in a wider dtype."""
        for shard, weight in zip(self._shards, self._weights, strict=True):
            if shard is not weight:
                shard.copy_(weight)
