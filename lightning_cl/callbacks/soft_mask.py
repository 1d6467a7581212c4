"""Soft masks of units that mattered before (CoFiTune, Zhang et al. 2024, arXiv:2404.10306)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from typing_extensions import override

from lightning_cl.callbacks.gates import GateSensitivity, unit_dim
from lightning_cl.callbacks.partial import PartialUpdate
from lightning_cl.callbacks.renewal import measured_again
from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_automatic_optimization, check_positive
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.requests import Influence
from lightning_cl.core.rng import derived_seed
from lightning_cl.core.state import shard
from lightning_cl.core.task import Task
from lightning_cl.core.update import OptimizerStep
from lightning_cl.functional.masks import unit_importance

__all__ = ["SoftMask"]


class SoftMask(PartialUpdate):
    r"""Slow down the units that mattered for earlier tasks, each by its importance.

    A unit is an output feature of a linear layer or a channel of a convolution, with its weights and its bias. Its
    importance is how much the loss would feel a gate :math:`g = 1` on it, within its layer,

    .. math:: I^{(t)} = |\tanh(z)|, \qquad
        z = \mathrm{Norm}\left( \frac{1}{N} \sum_{n=1}^{N} \left| \nabla_g \ell_n \right| \right), \qquad
        I = \max_{s \le t} I^{(s)},

    measured at the end of task t over its samples, in evaluation mode; Norm brings the units of a layer to mean 0 and
    variance 1. From the second task on, the update that the optimizer applies to a unit is scaled by :math:`1 - I`.

    Args:
        n_samples: Samples to measure on, over all ranks; the whole task if ``None``.
        include: Patterns (as in :mod:`fnmatch`) of the parameters to scale; those of all trainable linear layers and
            convolutions if ``None``.
        exclude: Patterns of parameters that move freely.
        batch_adapter: Reads batches of an uncommon structure.

    Attributes:
        importance: I of the units of each layer by the layer's name, float32 [units].

    Raises:
        ValueError: For a setting out of range; at the start of a fit for a pattern that matches nothing, for a module
            without such a layer, and under manual optimization.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="soft-mask",
        family="partial update",
        paper="Zhang et al. 2024, arXiv:2404.10306",
        needs="linear layers or convolutions; a loss from `training_step`",
        state="1 float32 per unit; 1 copy of the weights during a step",
    )

    compares_weights = True
    graded: ClassVar[bool] = True

    def __init__(
        self,
        *,
        n_samples: int | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        batch_adapter: BatchAdapter | None = None,
    ) -> None:
        super().__init__(include=include, exclude=exclude, from_task=1)
        if n_samples is not None:
            check_positive("n_samples", n_samples)
        self.sensitivity = GateSensitivity(batch_adapter or BatchAdapter(), n_samples)
        self.importance: dict[str, Tensor] = {}
        self._layers: dict[str, nn.Module] = {}
        self._masks: dict[str, Tensor] = {}
        self._checked = False

    # ------------------------------------------------------------------ set-up

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            way_out = "Under manual optimization use another method, such as `HalfFineTuning`."
            check_automatic_optimization(pl_module, self, "", way_out)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        owned = {id(parameter) for parameter in self.parameters.values()}
        self._layers = {
            name: layer
            for name, layer in pl_module.named_modules()
            if unit_dim(layer) is not None and id(layer.weight) in owned
        }
        if not self._layers:
            raise ValueError(
                f"`SoftMask` found no trainable linear layer or convolution in {type(pl_module).__name__} by"
                f" `include={self.include}`, `exclude={self.exclude}`."
            )
        self.importance = {name: value.to(pl_module.device) for name, value in self.importance.items()}
        self._place()
        self._checked = False

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._checked:
            # what would fail at the task's end fails before the first step
            self.sensitivity.check(pl_module, self._layers, batch)
            self._checked = True

    def _place(self) -> None:
        """Make the movability of the parameters' shards from the importance of the layers' units."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._masks = {}
        if self.importance and (missing := sorted(self._layers.keys() - self.importance.keys())):
            raise ValueError(
                f"The importance of `SoftMask` has no entry for the layers {missing[:3]}: they would train unmasked. Go"
                " on with the model, the trainable parameters and the `include`/`exclude` settings of the run before."
            )
        for layer_name, importance in self.importance.items():
            layer = self._layers.get(layer_name)
            if layer is None:
                raise ValueError(
                    f"The importance of `SoftMask` is of a layer {layer_name!r} that the module has not. Go on with the"
                    " model, the trainable parameters and the `include`/`exclude` settings of the run before."
                )
            for own_name, dim in (("weight", unit_dim(layer) or 0), ("bias", 0)):
                parameter = layer._parameters.get(own_name)
                if parameter is not None and id(parameter) in names:
                    self._masks[names[id(parameter)]] = _spread(1 - importance, parameter, dim)

    # ------------------------------------------------------------------ the step

    @override
    def movability(
        self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep
    ) -> Mapping[str, float | Tensor]:
        return {name: mask for name, mask in self._masks.items() if name in step.parameters}

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        sums = self.sensitivity.estimate(trainer, pl_module, self._layers, derived_seed("soft-mask", task.index))
        for name, total in sums.items():
            new = unit_importance(total)
            self.importance[name] = torch.maximum(self.importance[name], new) if name in self.importance else new
        self._place()

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        if not self.importance:
            return []

        def measure(sample_ids: Tensor) -> None:
            seed = derived_seed("soft-mask", task.index)
            sums = self.sensitivity.estimate(trainer, pl_module, self._layers, seed, sample_ids)
            self.importance.update({name: unit_importance(total) for name, total in sums.items()})

        found = measured_again(trainer, task, self, "the importances of units", self.importance.clear, measure)
        self._place()
        return [found]

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        return Footprint(device=self.copy_bytes(pl_module))

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        importance = {name: value.cpu() for name, value in self.importance.items()}
        return {**super().state_dict(), "importance": importance, "by_sample": self.sensitivity.by_sample}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.importance = {name: value.clone() for name, value in state_dict["importance"].items()}
        self.sensitivity.by_sample = state_dict["by_sample"]


def _spread(values: Tensor, parameter: Parameter, dim: int) -> Tensor:
    """Return one value for each unit as this rank's part of a tensor that broadcasts to its shard of ``parameter``."""
    shape = [1] * parameter.ndim
    shape[dim] = len(values)
    values = values.view(shape)
    if isinstance(parameter, DTensor) and any(p.is_shard() and not p.is_shard(dim) for p in parameter.placements):
        values = values.expand(parameter.shape).contiguous()
    return shard(values, parameter)
