"""Updates orthogonal to the leading singular directions of the weights (Nayak et al. 2025, arXiv:2504.07097)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn import Parameter
from typing_extensions import override

from lightning_cl.callbacks.projection import Others, SubspaceProjection, spread_over_ranks
from lightning_cl.callbacks.renewal import measured_again
from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.card import MethodCard
from lightning_cl.core.distributed import sum_over_ranks_
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.requests import Influence
from lightning_cl.core.state import ParameterState, local, shard
from lightning_cl.core.task import Task
from lightning_cl.core.update import OptimizerStep
from lightning_cl.functional.singular_subspaces import (
    add_similarity_,
    leading_subspaces,
    normalised_importance,
    protected_rank,
)
from lightning_cl.functional.subspaces import Subspace, exact_dtype

__all__ = ["SingularSubspaceProjection"]


class SingularSubspaceProjection(SubspaceProjection):
    r"""Train all weights, but not where the leading singular directions of a weight meet.

    From the second task on, with :math:`W = U \Sigma V^\top` at the task's start and its :math:`r_l` leading singular
    vectors :math:`U_h, V_h`, every update of a weight is

    .. math:: \Delta W - U_h U_h^\top \, \Delta W \, V_h V_h^\top, \qquad
        r_l = \left( r_{min} + I_l \, (r_{target} - r_{min}) \right) \min(n, d),

    where :math:`I_l` is the mean cosine similarity of inputs and outputs of layer l on the task before, divided by its
    mean over layers, so that the mean of the ratios is :math:`r_{target}`. The paper projects gradients; here the
    weight is projected after the optimizer's step, which the optimizer cannot undo. All 2-d weights count but those of
    embeddings.

    Args:
        min_ratio: :math:`r_{min}`, the share of the directions to protect in a layer of no importance (mrr in the
            paper), from 0 to 1.
        target_ratio: :math:`r_{target}`, the share to protect in the mean over layers (trr), from ``min_ratio`` to 1.
            If both are the same, nothing is measured at a task's end.
        protect_pretrained: Protect from the first task on: the weights come from pre-training. Importance is not known
            then, and every layer keeps ``target_ratio``.
        n_samples: Samples of a task to measure importance on, over all ranks; the whole task if ``None``.
        others: What becomes of all other trainable parameters (biases, norms, embeddings) while weights are protected:
            ``"free"`` trains them as the paper does, ``"hold"`` keeps them as they are.
        exclude: Patterns (as in :mod:`fnmatch`) of parameters that train freely.
        batch_adapter: Reads batches of an uncommon structure.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for a pattern that matches nothing and for a
            module without such weights.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="singular-subspaces",
        family="gradient projection",
        paper="Nayak et al. 2025, arXiv:2504.07097",
        needs="2-d weights",
        state="1 copy of the weights, and up to 1.5 for singular vectors",
    )

    def __init__(
        self,
        *,
        min_ratio: float = 0.1,
        target_ratio: float = 0.8,
        protect_pretrained: bool = False,
        n_samples: int | None = 300,
        others: Others = "free",
        exclude: list[str] | None = None,
        batch_adapter: BatchAdapter | None = None,
    ) -> None:
        super().__init__(others=others, exclude=exclude, n_samples=n_samples, batch_adapter=batch_adapter)
        if not 0 <= min_ratio <= 1:
            raise ValueError(f"`min_ratio` must be from 0 to 1, got {min_ratio!r}.")
        if not min_ratio <= target_ratio <= 1:
            raise ValueError(f"`target_ratio` must be from `min_ratio={min_ratio}` to 1, got {target_ratio!r}.")
        self.min_ratio = min_ratio
        self.target_ratio = target_ratio
        self.protect_pretrained = protect_pretrained
        self.similarity: dict[str, float] = {}
        # of each weight the left space, this rank's rows of it, and the right space
        self.subspaces: dict[str, tuple[Subspace, Subspace]] = {}
        self._layers: dict[str, nn.Linear] = {}
        self._restored: dict[str, dict[str, Any]] | None = None

    # ------------------------------------------------------------------ set-up

    @override
    def choose(self, pl_module: LightningModule, trainable: Mapping[str, Parameter]) -> dict[str, list[str]]:
        modules = list(pl_module.modules())
        tables = {id(module.weight) for module in modules if isinstance(module, (nn.Embedding, nn.EmbeddingBag))}
        units = {name: [name] for name, p in trainable.items() if p.ndim == 2 and id(p) not in tables}
        names = {id(trainable[name]): name for name in units}
        owners = Counter(id(module._parameters.get("weight")) for module in modules)
        # inputs and outputs of other layers are not of one size
        square = [m for m in modules if isinstance(m, nn.Linear) and m.in_features == m.out_features]
        self._layers = {names[id(m.weight)]: m for m in square if id(m.weight) in names and owners[id(m.weight)] == 1}
        return units

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # the anchors, which come and go with them, have been checked
        for name, found in (self._restored or {}).items():
            left = Subspace(found["left"][None], found["left_complement"])
            self._keep(name, left, Subspace(found["right"][None], found["right_complement"]))
        self._restored = None

    # ------------------------------------------------------------------ steps

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().on_task_start(trainer, pl_module, task)
        self.subspaces = {}

    @override
    def hold_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        if self.protects() and not self.subspaces:
            self._decompose()
        super().hold_gradients(trainer, pl_module, step)

    @override
    def protects(self) -> bool:
        return self.protect_pretrained or self.completed_tasks > 0

    @override
    def protected_part(self, name: str, changes: list[Tensor]) -> list[Tensor]:
        left, right = self.subspaces[name]
        rows = right.component(changes[0][None])
        return [left.component(rows.mT, _over_shards(self.parameters[name]))[0].mT]

    def ranks(self) -> dict[str, int]:
        """Return how many directions the next task protects, by the name of the weight."""
        importance = normalised_importance(self.similarity)
        return {
            name: protected_rank(
                (self.parameters[name].shape[0], self.parameters[name].shape[1]),
                importance.get(name, 1.0),
                self.min_ratio,
                self.target_ratio,
            )
            for name in self.units
        }

    def _decompose(self) -> None:
        ranks = self.ranks()

        def gather(name: str) -> Tensor:
            weight = self.parameters[name].detach()
            return weight.full_tensor() if isinstance(weight, DTensor) else weight

        def decompose(name: str, weight: Tensor) -> tuple[Subspace, Subspace]:
            # in the precision that is kept, so that no more is sent
            left, right = leading_subspaces(weight, ranks[name])
            return left.to(weight), right.to(weight)

        for name, (left, right) in spread_over_ranks(list(self.units), gather, decompose).items():
            self._keep(name, left, right)

    def _keep(self, name: str, left: Subspace, right: Subspace) -> None:
        weight = self.parameters[name]
        # a copy, because a shard is a view of the whole, and what was restored may be mapped from a file
        rows = Subspace(shard(left.matrix[0], weight).clone()[None], left.complement)
        self.subspaces[name] = rows.to(weight), Subspace(right.matrix.clone(), right.complement).to(weight)

    # ------------------------------------------------------------------ the end of a task

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self.anchors, self.subspaces = ParameterState(), {}
        if self.min_ratio != self.target_ratio and self._layers:
            self._measure(trainer, pl_module)

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        if not self.similarity:
            return []
        measure = partial(self._measure, trainer, pl_module)
        state = "how far layers change their inputs"
        return [measured_again(trainer, task, self, state, self.similarity.clear, measure)]

    def _measure(self, trainer: Trainer, pl_module: LightningModule, sample_ids: Tensor | None = None) -> None:
        """Compare what layers return with their inputs on the samples of a task, or on those with some identities."""
        totals = {
            name: torch.zeros(2, dtype=exact_dtype(pl_module.device), device=pl_module.device) for name in self._layers
        }

        def record(name: str, inputs: Tensor, output: Tensor, present: Tensor | None) -> None:
            # without the bias, which rotates all outputs alike
            bias = self._layers[name].bias
            add_similarity_(totals[name], inputs, output if bias is None else output - bias, present)

        with self.recording(pl_module, self._layers, record) as run:
            self.read_task(trainer, pl_module, run, sample_ids)
        joined = sum_over_ranks_(torch.stack(list(totals.values()))).tolist()
        self.similarity = {name: total / n for name, (total, n) in zip(totals, joined, strict=True) if n}

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        self.select(pl_module)
        kept = 0
        for weight in self.parameters.values():
            rows, (outputs, inputs) = local(weight), weight.shape
            most = min(outputs, inputs)
            vectors = len(rows) * min(most, outputs // 2) + inputs * min(most, inputs // 2)
            width = torch.promote_types(weight.dtype, torch.float32).itemsize
            kept += rows.numel() * rows.itemsize + vectors * width
        return Footprint(device=kept)

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        subspaces = self._restored
        if subspaces is None:
            subspaces = {
                name: {
                    "left": _placed(left.matrix[0], self.parameters[name]),
                    "left_complement": left.complement,
                    "right": right.matrix[0].cpu().clone(),
                    "right_complement": right.complement,
                }
                for name, (left, right) in self.subspaces.items()
            }
        return {"subspaces": subspaces, "similarity": dict(self.similarity), "anchors": self.anchors.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # placed where devices and shards are known
        self._restored, self.subspaces = state_dict["subspaces"] or None, {}
        self.similarity = dict(state_dict["similarity"])
        self.anchors.load_state_dict(state_dict["anchors"])


def _over_shards(parameter: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Return what sums a tensor over the ranks that share a parameter."""
    if not isinstance(parameter, DTensor):
        return None
    mesh = parameter.device_mesh
    kinds = [Partial() if placement.is_shard() else Replicate() for placement in parameter.placements]

    def total(value: Tensor) -> Tensor:
        return DTensor.from_local(value, mesh, kinds, run_check=False).full_tensor()

    return total


def _placed(rows: Tensor, parameter: Tensor) -> Tensor:
    """Return rows as a DTensor over those of a sharded parameter, else as a copy on the CPU."""
    if not isinstance(parameter, DTensor):
        return rows.cpu().clone()
    shape = torch.Size([len(parameter), rows.shape[1]])
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(rows, mesh, placements, shape=shape, stride=(rows.shape[1], 1))
