"""What projections of updates share: in protected subspaces, weights stay where a task found them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from typing_extensions import override

from lightning_cl.callbacks.partial import PartialUpdate
from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.callback import ContinualCallback
from lightning_cl.core.checks import check_choice, check_positive, select_parameters
from lightning_cl.core.recording import Record, recording
from lightning_cl.core.shared_work import share_out
from lightning_cl.core.state import ParameterState, local, reshard
from lightning_cl.core.task import Task
from lightning_cl.core.task_data import task_batches
from lightning_cl.core.update import OptimizerStep, StepCache
from lightning_cl.functional.sharding import check_layout
from lightning_cl.functional.subspaces import Subspace

__all__ = ["Others", "Record", "SubspaceProjection", "row_offset", "spread_over_ranks"]

Others = Literal["hold", "free"]
_Source = TypeVar("_Source")


class SubspaceProjection(ContinualCallback):
    r"""Takes out of every update what lies in a protected subspace.

    After the optimizer's step, :math:`W \leftarrow W - P(W - W^*)`, with :math:`W^*` the weights at the task's start
    and P the projection on the subspace. In exact arithmetic every single update is projected by that, whatever the
    optimizer made of the gradient (momentum, preconditioning, weight decay), and rounding does not add up over steps.
    What has no gradient in a step, because another method holds it, stays as it is to the bit.

    Args:
        others: What becomes of trainable parameters that are not projected, while there is something to protect:
            ``"hold"`` keeps them as they are, ``"free"`` trains them.
        exclude: Patterns (as in :mod:`fnmatch`) of parameters that are neither projected nor held.
        n_samples: Samples of a task to measure on, over all ranks; the whole task if ``None``.
        batch_adapter: Reads batches of an uncommon structure.

    Attributes:
        units: The names of the parameters that are projected together, by the weight among them.
        parameters: The parameters that are projected, by name, from the start of a fit.
        anchors: :math:`W^*`, while there is something to protect.
    """

    compares_weights = True

    def __init__(
        self,
        *,
        others: Others,
        exclude: list[str] | None,
        n_samples: int | None,
        batch_adapter: BatchAdapter | None,
    ) -> None:
        check_choice("others", others, ("hold", "free"))
        if n_samples is not None:
            check_positive("n_samples", n_samples)
        self.others = others
        self.exclude = exclude
        self.n_samples = n_samples
        self.adapter = batch_adapter or BatchAdapter()
        self.units: dict[str, list[str]] = {}
        self.parameters: dict[str, Parameter] = {}
        self.anchors = ParameterState()
        self._others: list[str] = []
        self._checked: StepCache[bool] = StepCache()

    # ------------------------------------------------------------------ what a subclass says

    @abstractmethod
    def choose(self, pl_module: LightningModule, trainable: Mapping[str, Parameter]) -> dict[str, list[str]]:
        """Return the names of what is projected together, by the weight among it."""

    @abstractmethod
    def protects(self) -> bool:
        """Return whether there is something to protect; asked before every step, by all ranks."""

    @abstractmethod
    def protected_part(self, name: str, changes: list[Tensor]) -> list[Tensor]:
        """Return the part of changes since the task's start that lies in the subspace of a weight.

        Args:
            name: The weight.
            changes: Local shards, of all parameters of its unit, float32 or above.
        """

    # ------------------------------------------------------------------ set-up

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # a validation before training may have left whole weights in their place
        reshard(pl_module)
        name, trainable = type(self).__name__, self.select(pl_module)
        self._checked.clear()
        self._refuse_masks(trainer, pl_module)
        for optimizer in trainer.optimizers:
            stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            for unit in self.units.values():
                if len({id(trainable[key]) in stepped for key in unit}) > 1:
                    raise ValueError(
                        f"`{name}` projects {unit} together, so one optimizer must step them: give them to the same"
                        " one, or name the bias in `exclude`."
                    )
        if self._others:
            fate = "held" if self.others == "hold" else "trained on, and may move old outputs"
            rank_zero_info(
                f"`{name}` does not project {self._others[:4]}{' and others' if len(self._others) > 4 else ''}: while"
                f" it protects, they are {fate} (`others={self.others!r}`)."
            )
        self.anchors.place(self.parameters, f"The anchors of `{name}`")

    def select(self, pl_module: LightningModule) -> dict[str, Parameter]:
        """Choose what is projected; return all trainable parameters that are not excluded."""
        name, trainable = type(self).__name__, select_parameters(pl_module, None, self.exclude)
        self.units = self.choose(pl_module, trainable)
        self.parameters = {key: trainable[key] for unit in self.units.values() for key in unit}
        self._others = [key for key in trainable if key not in self.parameters]
        if not self.units:
            raise ValueError(
                f"`{name}` finds no weight to project among the trainable parameters of {type(pl_module).__name__} that"
                f" `exclude={self.exclude}` leaves."
            )
        check_layout(self.parameters)
        for key, parameter in self.parameters.items():
            kinds = parameter.placements if isinstance(parameter, DTensor) else ()
            if any(kind.is_shard() and not kind.is_shard(0) for kind in kinds):
                raise ValueError(f"`{name}` needs weights sharded on dimension 0; {key!r} is placed as {kinds}.")
        return trainable

    def _refuse_masks(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what restores or scales single coordinates: of it and a projection, the later undoes the other."""
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if not isinstance(other, PartialUpdate) or other.whole_tensors:
                continue
            both = self.parameters.keys() & other.selected(pl_module).keys()
            if both:
                name, mask = type(self).__name__, type(other).__name__
                raise ValueError(
                    f"`{mask}` holds single coordinates of {sorted(both)[:3]}, which `{name}` projects: a projection"
                    " mixes coordinates, so only one of the two could keep its promise. Name them in the `exclude` of"
                    " one, or hold whole layers, such as by `HalfFineTuning`."
                )

    # ------------------------------------------------------------------ steps

    @override
    def observe_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        if step in self._checked:
            return
        present = {id(parameter) for parameter in pl_module.parameters()}
        stale = [name for name, parameter in self.parameters.items() if id(parameter) not in present]
        if stale:
            raise ValueError(
                f"`{type(self).__name__}` projects {stale[:3]}, which were replaced by other parameters since the fit"
                " began. Name layers that are replaced, such as a head that grows, in `exclude`, or replace them before"
                " the fit."
            )
        self._checked[step] = True

    @override
    def on_task_start(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self.anchors = ParameterState()

    @override
    def hold_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        if not self.protects():
            return
        if not self.anchors:
            # here, and not at the task's start, where others may still change weights
            weights = {name: local(p.detach()).clone() for name, p in self.parameters.items()}
            self.anchors.set(weights, self.parameters)
        if self.others == "hold":
            for name in self._others:
                if name in step.parameters:
                    step.parameters[name].grad = None

    @override
    def change_update(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        if not self.anchors:
            return
        for name, unit in self.units.items():
            if name not in step.parameters:
                continue
            held = [key for key in unit if self.parameters[key].grad is None]
            if len(held) == len(unit):
                # the optimizer did not move it, and what it moved before was projected then
                continue
            if held:
                raise ValueError(
                    f"`{type(self).__name__}` projects {unit} together, but {held} had no gradient in this step and may"
                    " not move: hold all of them or none, or name what is held in `exclude`."
                )
            weights = [local(self.parameters[key].detach()) for key in unit]
            changes = [_difference(weight, self.anchors[key]) for key, weight in zip(unit, weights, strict=True)]
            for weight, part in zip(weights, self.protected_part(name, changes), strict=True):
                weight.sub_(part)

    # ------------------------------------------------------------------ measuring

    @contextmanager
    def recording(self, pl_module: LightningModule, layers: Mapping[str, nn.Module], record: Record) -> Iterator[Any]:
        """Call ``record`` for every call of the layers inside the block; yield what runs the module on a batch."""
        with recording(pl_module, layers, record, self.adapter) as run:
            yield run

    def read_task(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        run: Callable[[Any], None],
        sample_ids: Tensor | None = None,
    ) -> None:
        """Run the module on the samples of the task that ends, or on those with some identities."""
        for batch, _ in task_batches(trainer, pl_module, self.adapter, self.n_samples, sample_ids):
            run(batch)

    # ------------------------------------------------------------------ checkpoints

    @property
    @override
    def state_key(self) -> str:
        # instances for different parameters live side by side in one Trainer and one checkpoint
        return super().state_key if self.exclude is None else self._generate_state_key(exclude=self.exclude)


def _difference(weight: Tensor, anchor: Tensor) -> Tensor:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype) - anchor.to(dtype)


def row_offset(parameter: Tensor) -> int:
    """Return the number of rows of a parameter, sharded on dimension 0, that lie on the ranks before this one."""
    for axis, kind in enumerate(parameter.placements if isinstance(parameter, DTensor) else ()):
        if kind.is_shard():
            assert isinstance(parameter, DTensor)
            mesh = parameter.device_mesh
            return min(-(-len(parameter) // mesh.size(axis)) * mesh.get_local_rank(axis), len(parameter))
    return 0


def spread_over_ranks(
    names: Sequence[str], read: Callable[[str], _Source], make: Callable[[str, _Source], Sequence[Subspace]]
) -> dict[str, list[Subspace]]:
    """Make subspaces for each name on one of the ranks, and give them to all, so that they have the same bits.

    Args:
        names: The names, the same on all ranks.
        read: Called on all ranks for each name, such as for a gathered weight; only one rank keeps what it returns.
        make: Makes subspaces, on any device, of what was read.

    Returns:
        What was made, on the CPU: a tensor on a GPU would come to all ranks on the GPU of the one that sent it.
    """
    return share_out(names, read, lambda name, source: [subspace.cpu() for subspace in make(name, source)])
