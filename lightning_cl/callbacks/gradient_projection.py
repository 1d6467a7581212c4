"""Gradient projection memory (Saha, Garg, Roy 2021, arXiv:2103.09762), on weights instead of gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.functional import pad
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from typing_extensions import override

from lightning_cl.callbacks.projection import Others, Record, SubspaceProjection, row_offset, spread_over_ranks
from lightning_cl.callbacks.renewal import measured_again
from lightning_cl.core.batches import BatchAdapter
from lightning_cl.core.card import MethodCard
from lightning_cl.core.distributed import sum_over_ranks_
from lightning_cl.core.footprint import Footprint
from lightning_cl.core.requests import Influence
from lightning_cl.core.state import ParameterState, local
from lightning_cl.core.task import Task
from lightning_cl.functional.gpm import add_gram_, empty_gram, extend_basis, input_shape
from lightning_cl.functional.subspaces import Subspace

__all__ = ["GradientProjection"]


class GradientProjection(SubspaceProjection):
    r"""Keep what linear layers and convolutions make of the inputs that they had in earlier tasks.

    At a task's end, the space M that the inputs x of each layer span grows by the fewest directions with

    .. math:: \| M M^\top R \|_F^2 + \| \hat R_k \|_F^2 \ge \epsilon_t \, \| R \|_F^2, \qquad
        \hat R = R - M M^\top R, \qquad \epsilon_t = \min(1, \epsilon + (t - 1) \, \delta),

    R being the inputs of task t, in evaluation mode, and :math:`\hat R_k` its best approximation of rank k. From then
    on weights move by :math:`\Delta W (I - M M^\top)`, so that :math:`(W + \Delta W) x = W x` for x in M. The paper
    projects gradients, which is the same for plain SGD only; here the weight is projected after the optimizer's step,
    so that it holds for momentum, Adam and weight decay. A bias is projected with its weight, as the weight of a
    constant input of 1.

    Args:
        threshold: :math:`\epsilon`, the share of the inputs' energy to protect, above 0 and at most 1; higher forgets
            less and leaves less room for new tasks.
        threshold_step: :math:`\delta`, by how much the threshold rises with every task; at least 0.
        n_samples: Samples of a task to measure the inputs on, over all ranks; the whole task if ``None``.
        others: What becomes, from the second task on, of trainable parameters that are not of such layers (norms,
            embeddings, tied weights, attention's packed projections): ``"hold"`` keeps them as they are, as the paper
            does with batch normalisation; ``"free"`` trains them, and old outputs move with them.
        exclude: Patterns (as in :mod:`fnmatch`) of parameters that train freely, such as the head of each task.
        batch_adapter: Reads batches of an uncommon structure.

    Raises:
        ValueError: For a setting out of range; at the start of a fit for a pattern that matches nothing, a module
            without such layers or whose step calls none of them, and a weight and its bias in different optimizers.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="gradient-projection",
        family="gradient projection",
        paper="Saha, Garg & Roy 2021, arXiv:2103.09762",
        needs="linear layers or 2-d convolutions that are called as modules",
        state="1 copy of the weights, and up to d²/2 numbers for a layer of d inputs",
    )

    def __init__(
        self,
        *,
        threshold: float = 0.97,
        threshold_step: float = 0.003,
        n_samples: int | None = 300,
        others: Others = "hold",
        exclude: list[str] | None = None,
        batch_adapter: BatchAdapter | None = None,
    ) -> None:
        super().__init__(others=others, exclude=exclude, n_samples=n_samples, batch_adapter=batch_adapter)
        if not 0 < threshold <= 1:
            raise ValueError(f"`threshold` must be above 0 and at most 1, got {threshold!r}.")
        if not threshold_step >= 0:
            raise ValueError(f"`threshold_step` must be at least 0, got {threshold_step!r}.")
        self.threshold = threshold
        self.threshold_step = threshold_step
        self.subspaces: dict[str, Subspace] = {}
        self._layers: dict[str, nn.Linear | nn.Conv2d] = {}
        self._tried = False
        self._full: set[str] = set()

    # ------------------------------------------------------------------ set-up

    @override
    def choose(self, pl_module: LightningModule, trainable: Mapping[str, Parameter]) -> dict[str, list[str]]:
        owners = Counter(id(p) for module in pl_module.modules() for p in module._parameters.values())
        # a tied weight acts on the inputs of several layers
        names = {id(p): name for name, p in trainable.items() if owners[id(p)] == 1}
        self._layers, units = {}, {}
        for layer in pl_module.modules():
            if not isinstance(layer, (nn.Linear, nn.Conv2d)) or isinstance(layer, NonDynamicallyQuantizableLinear):
                # the latter is the output of attention, which takes its weight and does not call it
                continue
            weight, bias = (names.get(id(layer._parameters.get(key))) for key in ("weight", "bias"))
            if weight is not None:
                self._layers[weight] = layer
                units[weight] = [weight] if bias is None else [weight, bias]
        return units

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._tried = False
        for name, subspace in self.subspaces.items():
            if name not in self.units or self._shape(name) != tuple(subspace.matrix.shape[:2]):
                found = f"inputs of shape {self._shape(name)}" if name in self.units else "no such layer"
                raise ValueError(
                    f"`GradientProjection` has a subspace of inputs of shape {tuple(subspace.matrix.shape[:2])} for"
                    f" {name!r}, the module has {found}. Go on with the model, the trainable parameters and the"
                    " `exclude` setting of the run before."
                )
            self.subspaces[name] = subspace.to(self.parameters[name])
        if self.subspaces and (missing := self.units.keys() - self.subspaces.keys()):
            raise ValueError(
                f"`GradientProjection` has no subspace for {sorted(missing)[:3]}: these layers would train unprotected."
                " Go on with the model and the trainable parameters of the run before, or name new layers in `exclude`."
            )

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._tried:
            return
        # what would fail at the task's end fails before the first step
        called: set[str] = set()
        add = self._adder(self._empty_grams(pl_module.device))

        def record(name: str, *seen: Any) -> None:
            add(name, *seen)
            called.add(name)

        with self.recording(pl_module, self._layers, record) as run:
            run(batch)
        if not called:
            raise ValueError(
                f"The step of {type(pl_module).__name__} calls none of the layers that `GradientProjection` projects,"
                f" {list(self.units)[:3]}: their inputs cannot be seen. Call them as modules."
            )
        self._tried = True

    def _shape(self, name: str) -> tuple[int, int]:
        return input_shape(self._layers[name], constant=len(self.units[name]) > 1)

    # ------------------------------------------------------------------ steps

    @override
    def protects(self) -> bool:
        return bool(self.subspaces)

    @override
    def protected_part(self, name: str, changes: list[Tensor]) -> list[Tensor]:
        weight, subspace = changes[0], self.subspaces[name]
        flat = torch.cat([weight.flatten(1), *(bias[:, None] for bias in changes[1:])], dim=1)
        groups, length = self._shape(name)
        outputs = self.parameters[name].shape[0] // groups
        if groups > 1:
            # a shard may begin and end inside a group
            first, before = divmod(row_offset(self.parameters[name]), outputs)
            padded = pad(flat, (0, 0, before, -(before + len(flat)) % outputs)).view(-1, outputs, length)
            subspace = Subspace(subspace.matrix[first : first + len(padded)], subspace.complement)
            part = subspace.component(padded).view(-1, length)[before : before + len(flat)]
        else:
            part = subspace.component(flat[None])[0]
        inputs = weight.shape[1:].numel()
        return [part[:, :inputs].reshape(weight.shape), *(part[:, inputs] for _ in changes[1:])]

    # ------------------------------------------------------------------ the end of a task

    @override
    def on_task_end(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> None:
        self.anchors = ParameterState()
        self._extend(trainer, pl_module, self.completed_tasks)

    @override
    def renew_state(self, trainer: Trainer, pl_module: LightningModule, task: Task) -> list[Influence]:
        if not self.subspaces:
            return []
        measure = partial(self._extend, trainer, pl_module, self.completed_tasks - 1)
        return [measured_again(trainer, task, self, "the subspaces of inputs", self.subspaces.clear, measure)]

    def _extend(
        self, trainer: Trainer, pl_module: LightningModule, number: int, sample_ids: Tensor | None = None
    ) -> None:
        """Take into the subspaces what the task of this number shows, or samples by their identities."""
        grams = self._empty_grams(pl_module.device)
        with self.recording(pl_module, self._layers, self._adder(grams)) as run:
            self.read_task(trainer, pl_module, run, sample_ids)
        for gram in grams.values():
            sum_over_ranks_(gram)
        threshold = min(1.0, self.threshold + number * self.threshold_step)

        def extend(name: str, gram: Tensor) -> list[Subspace]:
            if name in self.subspaces:
                old = [basis.to(gram) for basis in self.subspaces[name].bases()]
            else:
                old = [gram.new_zeros(gram.shape[1], 0)] * len(gram)
            new = [extend_basis(basis, space, threshold) for basis, space in zip(old, gram, strict=True)]
            # in the precision that is kept, so that no more is sent
            return [Subspace.spanned_by(new).to(self.parameters[name])]

        extended = spread_over_ranks(list(grams), lambda name: grams[name], extend)
        self.subspaces = {name: subspace.to(self.parameters[name]) for name, (subspace,) in extended.items()}
        self._report(grams)

    def _empty_grams(self, device: torch.device) -> dict[str, Tensor]:
        constant = {name: len(unit) > 1 for name, unit in self.units.items()}
        return {name: empty_gram(layer, constant=constant[name], device=device) for name, layer in self._layers.items()}

    def _adder(self, grams: Mapping[str, Tensor]) -> Record:
        def record(name: str, inputs: Tensor, output: Tensor, present: Tensor | None) -> None:
            add_gram_(grams[name], self._layers[name], inputs, present)

        return record

    def _report(self, grams: Mapping[str, Tensor]) -> None:
        """Tell how much room is left, and warn of layers that have none, or that train without being called."""
        used = self.used()
        rank_zero_info(
            "`GradientProjection` protects, of the input dimensions of each layer: "
            + ", ".join(f"{name} {share:.0%}" for name, share in used.items())
        )
        full = {name for name, share in used.items() if share == 1}
        new, self._full = sorted(full - self._full), full
        if new:
            rank_zero_warn(
                f"Old inputs span all dimensions of {new[:3]}: from now on these weights stay as they are. A lower"
                " `threshold` leaves room for new tasks."
            )
        unseen = [
            name
            for name, gram in grams.items()
            if not gram.any() and (gradient := self.parameters[name].grad) is not None and local(gradient).any()
        ]
        if unseen:
            rank_zero_warn(
                f"`GradientProjection` does not protect {unseen[:3]}: they train, but their layers were not called, so"
                " their inputs are not known. Call them as modules, or name them in `exclude`."
            )

    def used(self) -> dict[str, float]:
        """Return the share of the input dimensions that is protected, by the name of the weight."""
        return {
            name: sum(subspace.ranks()) / subspace.matrix.shape[:2].numel() for name, subspace in self.subspaces.items()
        }

    @override
    def footprint(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Footprint:
        self.select(pl_module)
        weights = [local(parameter.detach()) for parameter in self.parameters.values()]
        # at its largest, with half of the dimensions protected
        sizes = [
            (*self._shape(name), torch.promote_types(self.parameters[name].dtype, torch.float32)) for name in self.units
        ]
        kept = sum(groups * length * (length // 2) * dtype.itemsize for groups, length, dtype in sizes)

        def collect() -> Any:
            grams = self._empty_grams(pl_module.device)
            with self.recording(pl_module, self._layers, self._adder(grams)) as run:
                run(batch)
            subspaces = [
                grams_of.new_empty(g, d, d // 2, dtype=t)
                for grams_of, (g, d, t) in zip(grams.values(), sizes, strict=True)
            ]
            return subspaces, [weight.clone() for weight in weights]

        return Footprint(device=kept + sum(w.numel() * w.itemsize for w in weights), task_end=collect)

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        subspaces = {
            name: {"matrix": subspace.matrix.cpu().clone(), "complement": subspace.complement}
            for name, subspace in self.subspaces.items()
        }
        return {"subspaces": subspaces, "anchors": self.anchors.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # copies, because the tensors may be mapped from a file
        self.subspaces = {
            name: Subspace(torch.as_tensor(saved["matrix"]).clone(), saved["complement"])
            for name, saved in state_dict["subspaces"].items()
        }
        self.anchors.load_state_dict(state_dict["anchors"])
