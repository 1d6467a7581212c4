"""Distillation of features, plain or through task-aware filters (Liang et al. 2023, arXiv:2210.01351)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_cl.callbacks.distillation import Distillation
from lightning_cl.callbacks.renewal import measured_again
from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.capture import OutputCapture, forward_step, undisturbed
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_choice, check_positive
from lightning_cl.core.distributed import copy_of_rank_zero_, gather_rows
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.requests import Influence
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.task import Task
from lightning_cl.core.task_data import IdentifiedData, task_batches
from lightning_cl.core.teacher import TeacherKind, Watched
from lightning_cl.functional.distillation import FeatureDistance, feature_distance
from lightning_cl.functional.task_filters import initial_filter, train_filter

__all__ = ["FeatureDistillation", "features_last", "first_tensor"]


class FeatureDistillation(Distillation):
    r"""Hold the features of new samples in some layers near those that a teacher has there.

    The step minimises the module's own loss plus the mean over the layers l of

    .. math:: \frac{\lambda}{N D_l} \sum_n \left\| W_l \left(h_{nl} - h_{nl}^{teacher}\right) \right\|^2

    a mean over samples, positions and features, with the teacher in evaluation mode on the very same batch. W is the
    identity, or a task-aware filter (TED): at the end of a task, the filter of each layer is trained together with a
    linear classifier behind it to tell the classes of the task, the module being frozen. TED trains a second filter for
    the student, which may be of another width; here both are one, since the student starts as its teacher.

    Args:
        strength: :math:`\lambda`; above 0.
        layers: Names of the submodules, or patterns for names with as many parts: ``"encoder.layers.*"`` takes the
            layers, and nothing inside them. Where a layer returns several values, its first tensor counts.
        distance: ``"mse"`` as above, or ``"cosine"``, :math:`1 - \cos` of filtered features, over the last dimension
            (of images, over channels).
        filters: Learn task-aware filters; for ``teacher="previous"`` and data with one class label for each sample.
        filter_size: Rows of a filter; as many as the layer has features if ``None``.
        filter_samples: Samples to train the filters on, over all ranks.
        filter_steps: Steps of Adam on all of them at once.
        teacher: ``"previous"``: the weights at the end of the task before, from the second task on; ``"pretrained"``:
            those that the first fit started from; ``"ema"``: an exponential moving average of the weights;
            ``"base"``: the module without its adapters, which needs no copy (a head that trains is shared with it).
        decay: The share of the average that stays at each optimizer step; for ``"ema"``.
        batch_adapter: Reads batches of an uncommon structure.
        seed: Seed of the first filters.

    Raises:
        ValueError: For a setting out of range; at the start of a fit under manual optimization, for a pattern that
            matches nothing, for a layer that the step does not call, and for ``filters`` without labels.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="feature-distillation",
        family="distillation",
        paper="Liang et al. 2023, arXiv:2210.01351",
        needs="names of layers; automatic optimization; class labels for filters",
        state="a copy of the trainable parameters; a matrix for each filter",
    )

    def __init__(
        self,
        strength: float = 1.0,
        *,
        layers: list[str],
        distance: FeatureDistance = "mse",
        filters: bool = False,
        filter_size: int | None = None,
        filter_samples: int = 1024,
        filter_steps: int = 100,
        teacher: TeacherKind = "previous",
        decay: float | None = None,
        batch_adapter: BatchAdapter | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(strength, teacher, decay, batch_adapter)
        if isinstance(layers, str) or not layers:
            raise ValueError(f"`layers` must be a list of names or patterns, such as ['encoder.*'], got {layers!r}.")
        check_choice("distance", distance, get_args(FeatureDistance))
        check_positive("filter_samples", filter_samples)
        check_positive("filter_steps", filter_steps)
        if filter_size is not None:
            check_positive("filter_size", filter_size)
            if not filters:
                raise ValueError(f"`filter_size={filter_size}` goes with `filters=True`.")
        if filters and teacher != "previous":
            raise ValueError(
                f"`filters=True` learns at a task's end what its weights are good for, which is no other teacher than"
                f" `teacher='previous'`, got {teacher!r}."
            )
        self.layers = layers
        self.distance_kind = distance
        self.filters = filters
        self.filter_size = filter_size
        self.filter_samples = filter_samples
        self.filter_steps = filter_steps
        self.seed = seed
        self._watched: dict[str, Watched] = {}
        self._weights: dict[str, Tensor] = {}
        if teacher != "previous":
            # a class attribute of the base: these know no tasks
            self.boundaries = "unused"  # type: ignore[misc]

    # ------------------------------------------------------------------ set-up

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        names = self._names(pl_module)
        self._watched = {name: self.teaching.watch(pl_module, name, first_tensor) for name in names}
        self._weights = {name: weight.to(pl_module.device) for name, weight in self._weights.items()}

    def _names(self, pl_module: LightningModule) -> list[str]:
        names = [name for name, _ in pl_module.named_modules() if name]
        for pattern in self.layers:
            if not any(_matches(name, pattern) for name in names):
                raise ValueError(
                    f"`layers` pattern {pattern!r} matches no submodule of {type(pl_module).__name__}. Its names look"
                    f" like {names[:6]}; `*` stands for one part of a name."
                )
        return [name for name in names if any(_matches(name, pattern) for pattern in self.layers)]

    @override
    def check(self, pl_module: LightningModule, batch: Any) -> None:
        features = self._features(pl_module, batch)
        if self.filters:
            self._class_labels(batch)
            for name, found in features.items():
                if name in self._weights and self._weights[name].shape[1] != found.shape[1]:
                    raise ValueError(
                        f"The layer {name!r} has {found.shape[1]} features, and its filter was learned on"
                        f" {self._weights[name].shape[1]}. Go on with the model of the run before."
                    )

    # ------------------------------------------------------------------ the term

    @override
    def distance(self, batch: Any) -> Tensor | None:
        if not self.teaching:
            return None
        mask = self.adapter.padding_mask(batch)
        terms = []
        for name, watched in self._watched.items():
            student, teacher = (features_last(output) for output in watched.take())
            positions = mask if mask is not None and student.ndim == 3 and student.shape[:2] == mask.shape else None
            terms.append(
                feature_distance(
                    student, teacher, self.distance_kind, weight=self._weights.get(name), positions=positions
                )
            )
        return torch.stack(terms).mean()

    # ------------------------------------------------------------------ filters

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        super().on_task_end(trainer, pl_module, task)
        if self.filters:
            self._learn_filters(trainer, pl_module, derived_seed(self.seed, "filters", task.index))

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        found = super().renew_state(trainer, pl_module, task)
        if not self._weights:
            return found
        learn = partial(self._learn_filters, trainer, pl_module, derived_seed(self.seed, "filters", task.index))
        return [*found, measured_again(trainer, task, self, "the filters", self._weights.clear, learn)]

    def _learn_filters(
        self, trainer: Trainer, pl_module: LightningModule, seed: int, sample_ids: Tensor | None = None
    ) -> None:
        rows: dict[str, list[Tensor]] = {name: [] for name in self._watched}
        labels, ids = [], []
        for batch, found in task_batches(trainer, pl_module, self.adapter, self.filter_samples, sample_ids):
            for name, features in self._features(pl_module, batch, seed).items():
                rows[name].append(features)
            labels.append(self._class_labels(batch))
            ids.append(found)
        all_labels = gather_rows(torch.cat(labels))[0]
        # in an order that does not depend on ranks and batches
        identified = isinstance(trainer.datamodule, IdentifiedData)  # type: ignore[attr-defined]
        all_ids = gather_rows(torch.cat(ids).to(all_labels.device))[0]
        order = all_ids.argsort(stable=True) if identified else torch.arange(len(all_ids), device=all_ids.device)
        for name, parts in rows.items():
            features = gather_rows(torch.cat(parts))[0][order]
            size = self.filter_size or features.shape[1]
            weight = self._weights.get(name)
            if weight is None:
                weight = initial_filter(size, features.shape[1], derived_seed(self.seed, "filter", name))
            trained = train_filter(features, all_labels[order], weight, steps=self.filter_steps)
            self._weights[name] = copy_of_rank_zero_(trained)

    def _features(self, pl_module: LightningModule, batch: Any, seed: int = 0) -> dict[str, Tensor]:
        """Return the features of all layers, means over positions, float32 [N, D]."""
        mask = self.adapter.padding_mask(batch)
        with undisturbed(pl_module, seed), torch.no_grad(), ExitStack() as stack:
            captures = {
                name: stack.enter_context(OutputCapture(pl_module, name, first_tensor)) for name in self._watched
            }
            forward_step(pl_module, batch)
            return {name: _mean_over_positions(capture.output, mask) for name, capture in captures.items()}

    def _class_labels(self, batch: Any) -> Tensor:
        labels = self.adapter.class_labels(batch)
        if labels is None:
            raise ValueError(
                "`FeatureDistillation(filters=True)` needs one class label for each sample, and found none in the"
                " batch. Name them by `batch_adapter=BatchAdapter(labels=...)`, or use `filters=False`."
            )
        return labels

    # ------------------------------------------------------------------ memory and checkpoints

    @property
    @override
    def state_key(self) -> str:
        # instances for different layers live side by side in one Trainer and one checkpoint
        return self._generate_state_key(layers=self.layers, teacher=self.teacher, decay=self.decay)

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        kept = super().footprint(trainer, pl_module, batch).device
        return Footprint(device=kept + sum(weight.nbytes for weight in self._weights.values()))

    @override
    def state_dict(self) -> dict[str, Any]:
        filters = {name: weight.cpu().clone() for name, weight in self._weights.items()}
        return {**super().state_dict(), "filters": filters}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._weights = dict(state_dict["filters"])


def _matches(name: str, pattern: str) -> bool:
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def first_tensor(output: Any) -> Tensor | None:
    """Return the hidden states in what a layer returned: itself, or the first tensor of several values."""
    values = output.values() if isinstance(output, Mapping) else output
    candidates = values if not isinstance(values, Tensor) and hasattr(values, "__iter__") else [values]
    tensor = next((value for value in candidates if isinstance(value, Tensor)), None)
    return tensor if tensor is not None and tensor.ndim >= 2 and tensor.is_floating_point() else None


def features_last(features: Tensor) -> Tensor:
    """Return features with their own dimension last; of images and videos it is the second."""
    return features.movedim(1, -1) if features.ndim >= 4 else features


def _mean_over_positions(output: Tensor, mask: Tensor | None) -> Tensor:
    features = features_last(output.detach()).float()
    if mask is not None and features.ndim == 3 and features.shape[:2] == mask.shape:
        kept = mask.unsqueeze(-1)
        return (features * kept).sum(1) / kept.sum(1).clamp(min=1)
    return features.flatten(1, -2).mean(1) if features.ndim > 2 else features
