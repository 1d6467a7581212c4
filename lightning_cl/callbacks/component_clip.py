"""Component-wise gradient norm clipping (Yang & Ma 2022, arXiv:2210.10325)."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from typing_extensions import override

from lightning_cl.core.callback import ContinualCallback
from lightning_cl.core.card import MethodCard
from lightning_cl.core.checks import check_positive
from lightning_cl.core.state import local, sum_over_shards
from lightning_cl.core.update import OptimizerStep, StepCache
from lightning_cl.functional.component_clip import clip_components_, squared_norms

__all__ = ["ComponentClip"]


@dataclass(frozen=True)
class _Placement:
    """Parameters that one optimizer steps and that are sharded alike, with the numbers of their components."""

    parameters: list[Parameter]
    components: Tensor

    def gradients(self) -> tuple[list[Tensor], Tensor]:
        """Return the local gradients that there are, and the numbers of their components."""
        rows = [row for row, parameter in enumerate(self.parameters) if parameter.grad is not None]
        grads = [local(parameter.grad) for parameter in self.parameters if parameter.grad is not None]
        return grads, self.components if len(rows) == len(self.parameters) else self.components[rows]


class ComponentClip(ContinualCallback):
    r"""Clip the gradient norm of every component by itself, so that no part of the network outruns the others.

    Before each optimizer step, every component c is scaled by its own norm, not by that of all gradients together:

    .. math:: g_c \leftarrow g_c \cdot \min\left(1, \frac{\tau}{\lVert g_c \rVert_2 + 10^{-6}}\right).

    The norm is that of the whole component, over all ranks and micro-batches, with what other callbacks added. With one
    component (``components=["*"]``) this is :func:`torch.nn.utils.clip_grad_norm_`. ``Trainer(gradient_clip_val=...)``
    may stay; it clips what is left.

    Args:
        max_norm: :math:`\tau`; above 0.
        components: Patterns (as in :mod:`fnmatch`), each of which makes one component of all parameters that it matches
            and no pattern before it did, such as ``"layers.0.*"``. Other parameters are components by themselves, as
            all are if ``None``: the paper's form, where the weights and the biases of query, key and value are all
            clipped apart.

    Raises:
        ValueError: If ``max_norm`` is not above 0 or ``components`` is no list; at the start of a fit for a pattern to
            which no parameter is left.
    """

    card: ClassVar[MethodCard] = MethodCard(
        name="component-clip",
        family="gradients and updates",
        paper="Yang & Ma 2022, arXiv:2210.10325",
        needs="nothing",
        state="nothing",
    )
    acts_on: ClassVar[tuple[Literal["learn", "forget"], ...]] = ("learn", "forget")
    boundaries: ClassVar[Literal["required", "unused", "evaluation"]] = "unused"
    needs_state: ClassVar[bool] = False

    def __init__(self, max_norm: float = 1.0, *, components: list[str] | None = None) -> None:
        check_positive("max_norm", max_norm)
        if isinstance(components, str):
            raise ValueError(f"`components` must be a list of patterns, such as {[components]}, got {components!r}.")
        self.max_norm = max_norm
        self.components = components
        self._numbers: dict[str, int] = {}
        self._num_components = 0
        self._placements: StepCache[list[_Placement]] = StepCache()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._numbers = self._component_numbers(pl_module)
        self._num_components = max(self._numbers.values(), default=-1) + 1

    def _component_numbers(self, pl_module: LightningModule) -> dict[str, int]:
        left = [name for name, _ in pl_module.named_parameters()]
        numbers: dict[str, int] = {}
        for number, pattern in enumerate(self.components or ()):
            matched = [name for name in left if fnmatchcase(name, pattern)]
            if not matched:
                raise ValueError(
                    f"`components` pattern {pattern!r} matches no parameter of {type(pl_module).__name__} that the"
                    f" patterns before it left. Left are names like {left[:3]}."
                )
            numbers |= dict.fromkeys(matched, number)
            left = [name for name in left if name not in numbers]
        return numbers | {name: number for number, name in enumerate(left, start=len(self.components or ()))}

    @override
    def limit_gradients(self, trainer: Trainer, pl_module: LightningModule, step: OptimizerStep) -> None:
        placements = self._placements_of(step)
        if not placements:
            return
        parts = [placement.gradients() for placement in placements]
        squared = {str(row): squared_norms(*part, self._num_components) for row, part in enumerate(parts)}
        total = sum_over_shards(squared, {str(row): p.parameters[0] for row, p in enumerate(placements)})
        for part in parts:
            clip_components_(*part, total, self.max_norm)

    def _placements_of(self, step: OptimizerStep) -> list[_Placement]:
        """Return what the step's optimizer moves, grouped so that all components share one reduction."""
        if step not in self._placements:
            groups: dict[Any, list[str]] = {}
            for name, parameter in step.parameters.items():
                if name not in self._numbers:
                    # it came since the fit began
                    self._numbers[name] = self._num_components
                    self._num_components += 1
                sharding = (parameter.device_mesh, parameter.placements) if isinstance(parameter, DTensor) else None
                groups.setdefault(sharding, []).append(name)
            self._placements[step] = [
                _Placement(
                    [step.parameters[name] for name in names],
                    torch.tensor([self._numbers[name] for name in names], device=step.parameters[names[0]].device),
                )
                for names in groups.values()
            ]
        return self._placements[step]
