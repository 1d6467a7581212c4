"""Forgetting by adapters whose blocks compete to be used: Zhao et al. 2024 (GS-LoRA, GS-LoRA++)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import relu
from typing_extensions import Unpack, override

from lightning_cl.adapters.lora_blocks import is_start_zero, lora_blocks
from lightning_cl.core.capture import forward_step, move_batch, undisturbed
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_positive
from lightning_cl.core.distributed import gather_rows
from lightning_cl.core.requests import RequestStream
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.state import fill, local, reshard, sum_rows_over_shards
from lightning_cl.core.task import Task
from lightning_cl.core.update import OptimizerStep
from lightning_cl.functional.unlearning import (
    add_group_lasso_,
    bounded_cross_entropy,
    prototype_divergence,
    squared_norm,
)
from lightning_cl.unlearning import ForgetLoss, Outputs, Unlearn
from lightning_cl.unlearning.request_callback import RequestSettings

__all__ = ["GSLoRA"]


class GSLoRA(Unlearn):
    r"""Forget by LoRA adapters of few blocks: ascent up to a bound, and a group lasso over the blocks.

    In a request's steps the module's own loss gives way to

    .. math:: L_\text{retain} + \beta \max\left(0, \mathrm{BND} - \frac{1}{n_f} \sum_{f} \ell\right)
        + \alpha \sum_g \sqrt{\lVert A_g \rVert_F^2 + \lVert B_g \rVert_F^2}

    with :math:`L_\text{retain}` the module's own loss on the retained batch, :math:`\ell` the negative log-likelihoods
    of the forgotten one, and g the blocks of the network, each with all LoRA factors in it that train. The lasso acts
    as its gradient, added once per optimizer step. At a request's end blocks whose norm is below a threshold are
    **pruned**: their B is set to zero exactly, so that they add nothing, and their A starts anew, so that the next
    request or task can use them.

    With ``features`` it is GS-LoRA++: prototypes are the mean features of each class at the request's start, and the
    loss has two more terms,

    .. math:: w_f \max\left(0, \mathrm{BND}_p - \overline{\mathrm{KL}}_f\right) + w_r \overline{\mathrm{KL}}_r,
        \qquad \overline{\mathrm{KL}} = \frac{1}{n} \sum_b \mathrm{KL}\left(\mathrm{softmax}(p_{y_b}) \,\|\,
        \mathrm{softmax}(f_b)\right)

    The lasso counts all that the adapters hold, also what they learned before. The paper merges adapters and starts new
    ones for every request; beside :class:`~lightning_cl.adapters.AdapterSlots` finished tasks are in a slot of their
    own, which neither the lasso nor the pruning touches.

    Args:
        bound: BND, in nats on the scale of the head's logits; above 0. :math:`2 \ln C` for C classes if ``None``: the
            true class then has the C-th part of a guess. The paper's 105 to 110 go with cosines times 64.
        group_lasso: :math:`\alpha`; 0 for none.
        warmup_steps: Optimizer steps of a request before the lasso acts.
        prune_below: Norm of a block under which it is pruned; 0 prunes nothing. What a block adds to any weight is at
            most half its squared norm, times LoRA's scaling.
        features: Name of the submodule that returns the features of a sample, [B, D]; for GS-LoRA++.
        prototype_forget_weight: :math:`w_f`, at least 0.
        prototype_retain_weight: :math:`w_r`, at least 0.
        prototype_bound: :math:`\mathrm{BND}_p`, above 0.
        forget_weight: :math:`\beta`, above 0.
        retain_weight: Weight of what is retained, prototypes included; above 0.
        utility_floor: As of :class:`~lightning_cl.unlearning.Unlearn`.
        settings: Those of :class:`~lightning_cl.unlearning.RequestSettings`.

    Attributes:
        norms: The norm of each block at the end of the latest request, before pruning.
        pruned: The blocks that were pruned then; the ledger has them too.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for a module without LoRA adapters that train, or
            with variants of LoRA, and as :class:`~lightning_cl.unlearning.Unlearn`; at a request's start for
            ``features`` without a stream, or of another shape.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="gs-lora",
        family="unlearning",
        paper="Zhao et al. 2024, arXiv:2403.11530; GS-LoRA++: arXiv:2501.09705",
        needs="a PEFT model with LoRA; labels; for GS-LoRA++ the name of a layer of features",
        state="the ledger; in a request of GS-LoRA++ 2 vectors of features for each class",
    )

    def __init__(
        self,
        *,
        bound: float | None = None,
        group_lasso: float = 1e-4,
        warmup_steps: int = 0,
        prune_below: float = 0.1,
        features: str | None = None,
        prototype_forget_weight: float = 0.01,
        prototype_retain_weight: float = 0.01,
        prototype_bound: float = 18.0,
        forget_weight: float = 0.3,
        retain_weight: float = 1.0,
        utility_floor: float | None = None,
        **settings: Unpack[RequestSettings],
    ) -> None:
        if bound is not None:
            check_positive("bound", bound)
        check_positive("prototype_bound", prototype_bound)
        check_positive("forget_weight", forget_weight)
        at_least_zero = {
            "group_lasso": group_lasso,
            "warmup_steps": warmup_steps,
            "prune_below": prune_below,
            "prototype_forget_weight": prototype_forget_weight,
            "prototype_retain_weight": prototype_retain_weight,
        }
        for name, value in at_least_zero.items():
            check_positive(name, value, zero_allowed=True)
        # of which the whole is multiplied by `forget_weight`
        self._loss = _BoundedLoss(bound, features, prototype_forget_weight / forget_weight, prototype_bound)
        super().__init__(
            self._loss,
            retain="nll",
            forget_weight=forget_weight,
            retain_weight=retain_weight,
            utility_floor=utility_floor,
            **settings,
        )
        self.bound = bound
        self.group_lasso = group_lasso
        self.warmup_steps = warmup_steps
        self.prune_below = prune_below
        self.features = features
        self.prototype_forget_weight = prototype_forget_weight
        self.prototype_retain_weight = prototype_retain_weight
        self.prototype_bound = prototype_bound
        self.norms: dict[str, float] = {}
        self.pruned: list[str] = []
        self._blocks: dict[str, list[str]] = {}

    @override
    def method_name(self) -> str:
        return self.card.name

    @override
    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "blocks": len(self._blocks), "pruned": list(self.pruned)}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._blocks = {block: list(factors) for block, factors in lora_blocks(pl_module, type(self).__name__).items()}

    # ------------------------------------------------------------------ prototypes

    @override
    def serve_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().serve_start(trainer, pl_module, task)
        if self.features is None:
            return
        stream = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(stream, RequestStream):
            raise ValueError(
                f"`GSLoRA(features={self.features!r})` reads the samples of a request for its prototypes, and loaders"
                " of your own name none: use `UnlearningDataModule`, a stream with `requests`, or `features=None`."
            )
        for name, ids in (("forget", stream.forgotten_ids(task)), ("retain", stream.retained_ids(task))):
            self._loss.prototypes[name] = self._class_means(trainer, pl_module, stream.read_samples(ids))

    @override
    def retain_term(self, retained: Outputs, own: Tensor, reference: Outputs | None) -> Tensor:
        term = super().retain_term(retained, own, reference)
        if self.features is None:
            return term
        return term + self.prototype_retain_weight * self._loss.divergence("retain", retained)

    def _class_means(
        self, trainer: Trainer, pl_module: LightningModule, batches: Iterable[tuple[Any, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Return the mean features of each class over all ranks, float32 [P, D], and the classes, int64 [P]."""
        sums: dict[int, Tensor] = {}
        for batch, _ in batches:
            batch = move_batch(trainer, pl_module, batch)
            with undisturbed(pl_module, seed=0, as_in_step=True), self.reader:
                outputs = self.reader.take(batch, forward_step(pl_module, batch))
            features, labels = _features(outputs)
            for label in labels.unique().tolist():
                rows = features[labels == label].double()
                found = torch.cat([torch.tensor([label, len(rows)], device=rows.device).double(), rows.sum(0)])
                sums[label] = found if label not in sums else torch.cat([found[:1], sums[label][1:] + found[1:]])
        parts = gather_rows(torch.stack(list(sums.values())))[0]
        classes, places = parts[:, 0].long().unique(return_inverse=True)
        totals = parts.new_zeros(len(classes), parts.shape[1] - 1).index_add_(0, places, parts[:, 1:])
        return (totals[:, 1:] / totals[:, :1]).float(), classes

    # ------------------------------------------------------------------ the lasso, and pruning

    @override
    def change_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        assert self._open is not None
        if not self.group_lasso or trainer.global_step - self._open["step"] < self.warmup_steps:
            return
        for block, squares in self._squared_norms(step.parameters).items():
            pairs = [(p, p.grad) for name in self._blocks[block] if (p := step.parameters[name]).grad is not None]
            gradients = [local(grad) for _, grad in pairs if grad is not None]
            add_group_lasso_(gradients, [local(p.detach()) for p, _ in pairs], squares, self.group_lasso)

    def _squared_norms(self, parameters: dict[str, Parameter]) -> dict[str, Tensor]:
        """Return the squared norm of each block, over all ranks, which must all call this."""
        names = [name for factors in self._blocks.values() for name in factors]
        rows = torch.stack([squared_norm([local(parameters[name].detach())]) for name in names])
        squares = sum_rows_over_shards(rows[:, None], [parameters[name] for name in names])[:, 0]
        parts = squares.split([len(factors) for factors in self._blocks.values()])
        return {block: part.sum() for block, part in zip(self._blocks, parts, strict=True)}

    @override
    def serve_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().serve_end(trainer, pl_module, task)
        # class means of what is forgotten
        self._loss.prototypes = {}
        # a validation inside an epoch leaves whole weights in their place
        reshard(pl_module)
        parameters = dict(pl_module.named_parameters())
        self.norms = {block: float(squares.sqrt()) for block, squares in self._squared_norms(parameters).items()}
        self.pruned = [block for block, norm in self.norms.items() if norm < self.prune_below]
        for name in (name for block in self.pruned for name in self._blocks[block]):
            fill(parameters[name], self._start(name, parameters[name].shape).to(parameters[name].device))
        rank_zero_info(f"`GSLoRA` pruned {len(self.pruned)} of {len(self._blocks)} blocks in request {task.name!r}.")

    def _start(self, name: str, shape: torch.Size) -> Tensor:
        """Return a whole factor as PEFT starts it: one of a pair is zero, so that the pair adds nothing."""
        if is_start_zero(name):
            return torch.zeros(shape)
        generator = torch.Generator().manual_seed(derived_seed("gs-lora", self.request_seed, name))
        if ".lora_embedding_B." in name:
            return torch.randn(shape, generator=generator)
        reach = shape[1:].numel() ** -0.5
        return torch.empty(shape).uniform_(-reach, reach, generator=generator)

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "norms": dict(self.norms), "pruned": list(self.pruned)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.norms, self.pruned = dict(state_dict["norms"]), list(state_dict["pruned"])


class _BoundedLoss(ForgetLoss):
    """What is forgotten: cross-entropy up to a bound, and distance from prototypes up to another."""

    def __init__(self, bound: float | None, features: str | None, weight: float, prototype_bound: float) -> None:
        self.bound = bound
        self.layer = features
        self.weight = weight
        self.prototype_bound = prototype_bound
        self.prototypes: dict[str, tuple[Tensor, Tensor]] = {}

    @override
    def __call__(self, forget: Outputs, reference: Outputs | None) -> Tensor:
        term = bounded_cross_entropy(*forget.predictions, bound=self.bound)
        if self.layer is None:
            return term
        return term + self.weight * relu(self.prototype_bound - self.divergence("forget", forget))

    def divergence(self, name: str, outputs: Outputs) -> Tensor:
        """Return the mean divergence of a batch from the prototypes of what is forgotten, or retained."""
        features, labels = _features(outputs)
        prototypes, classes = (value.to(features.device) for value in self.prototypes[name])
        return prototype_divergence(features, labels, prototypes, classes)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"prototypes": {name: [value.cpu() for value in pair] for name, pair in self.prototypes.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.prototypes = {name: (pair[0], pair[1]) for name, pair in state_dict["prototypes"].items()}


def _features(outputs: Outputs) -> tuple[Tensor, Tensor]:
    features, labels = outputs.activations, outputs.labels
    if features is None or labels is None or features.ndim != 2 or labels.ndim != 1:
        shape = None if features is None else list(features.shape)
        raise ValueError(
            "`GSLoRA(features=...)` needs one vector of features and one class label for each sample; the submodule"
            f" returned the shape {shape}. Name the layer before the head of a classifier, or use `features=None`."
        )
    return features, labels
