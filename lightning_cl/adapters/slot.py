"""Two slots of LoRA in a layer: what trains now, and what finished tasks left."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from typing_extensions import override

from lightning_cl.core.state import fill, full_copy
from lightning_cl.functional.low_rank import wide
from lightning_cl.quantization.layers import dequantize, is_quantized

__all__ = ["PAST", "Slot", "SlotFactor"]

PAST = "past"


class SlotFactor(nn.Linear):
    r"""The factor A of a slot, with what may stand between it and B: the layer adds :math:`s B M A x`.

    Args:
        linear: The layer that it replaces, without a bias; its weight goes over.
        zeros: Whether it starts with zeros, as a slot that is empty.

    Attributes:
        mixing: :math:`M`: a vector of gates for a diagonal matrix, a matrix ``[r, r]``, ``None`` for the identity.
        groups: The gate of each rank, int64 ``[r]``, where several share one; else rank i has gate i.
        route: What each sample of the coming forward takes of each rank, ``[B, r]``; all of it if ``None``.
        routed: Whether samples differ in what they take, so that no one adapter computes the same.
        owner: The callback that made the slot.
    """

    mixing: Parameter | None
    groups: Tensor | None
    route: Tensor | None

    def __init__(self, linear: nn.Linear, *, zeros: bool = False) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.zeros = zeros
        self.register_parameter("mixing", None)
        # a buffer, because a checkpoint is evaluated without the callback's state
        self.register_buffer("groups", None)
        self.route = None
        self.routed = False
        self.owner = ""
        self._first: Tensor | None = None
        self._first_groups: Tensor | None = None
        self.train(linear.training)

    def add_mixing(self, values: Tensor, groups: Tensor | None = None) -> None:
        """Put a mixing between the factors, on the device of the weight and in its dtype.

        Args:
            values: What it starts with, ``[r]`` or ``[r, r]``, or a value for each group, on the CPU.
            groups: The gate of each rank.
        """
        self._first, self._first_groups = values.detach().clone(), groups
        self.mixing = Parameter(values.to(self.weight.device, self.weight.dtype))
        if groups is not None:
            self.groups = groups.to(self.weight.device, copy=True)

    @torch.no_grad()
    def start(self) -> None:
        """Give values, after it stood on the meta device, to what does not start as PEFT starts it."""
        if self.zeros:
            self.weight.zero_()
        self.start_mixing()
        if self.groups is not None and self._first_groups is not None:
            self.groups.copy_(self._first_groups)

    def start_mixing(self) -> None:
        """Give the mixing, plain or sharded, the values that it started with."""
        if self.mixing is not None and self._first is not None:
            fill(self.mixing, self._first)

    def gates(self, mixing: Tensor) -> Tensor:
        """Return M as a vector ``[r]`` or a matrix ``[r, r]`` from the values of the mixing."""
        return mixing if self.groups is None else mixing[self.groups.to(mixing.device)]

    def mix(self, output: Tensor) -> Tensor:
        """Return :math:`M y` for rows :math:`y`, ``[..., r]``."""
        if self.mixing is None:
            return output
        gates = self.gates(self.mixing).to(output.dtype)
        return output * gates if gates.ndim == 1 else output @ gates.mT

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Return :math:`M A x` for rows :math:`x`, ``[..., in]``, or what :attr:`route` takes of it.

        Raises:
            ValueError: If there is not one row of the route for each of the first dimension.
        """
        output = self.mix(super().forward(input))
        if self.route is None:
            return output
        route = self.route.to(output)
        if len(route) not in (1, len(output)):
            raise ValueError(
                f"A layer with adapters got the shape {list(input.shape)}, and each of {len(route)} samples has the"
                " adapter of its own task: the first dimension must be that of the samples. Let the layer get the batch"
                " first (such as `batch_first=True`), or leave it out of `target_modules`."
            )
        return output * route.view(len(route), *[1] * (output.ndim - 2), -1)


@dataclass(frozen=True)
class Slot:
    """The slots of one layer, plain or sharded.

    Args:
        name: The layer's name in the LightningModule.
        layer: PEFT's layer.
        current: Name of the adapter that trains.
        past: Name of the adapter that holds what finished tasks left.
    """

    name: str
    layer: Any
    current: str
    past: str = PAST

    def down(self, adapter: str) -> Any:
        """Return the layer of factor A, whose weight is ``[r, in]``."""
        return self.layer.lora_A[adapter]

    def up(self, adapter: str) -> Any:
        """Return the layer of factor B, whose weight is ``[out, r]``."""
        return self.layer.lora_B[adapter]

    def rank(self, adapter: str) -> int:
        """Return r, the rows of A."""
        rows: int = self.down(adapter).weight.shape[0]
        return rows

    @property
    def scaling(self) -> float:
        """What both slots multiply the product of their factors by."""
        return float(self.layer.scaling[self.current])

    def parameters(self, adapter: str) -> dict[str, Parameter]:
        """Return the parameters of a slot as ``"lora_A"``, ``"lora_B"`` and, where there is one, ``"mixing"``."""
        found = {"lora_A": self.down(adapter).weight, "lora_B": self.up(adapter).weight}
        mixing = getattr(self.down(adapter), "mixing", None)
        return found if mixing is None else {**found, "mixing": mixing}

    def all_parameters(self) -> list[Parameter]:
        """Return the parameters of both slots."""
        return [p for adapter in (self.current, self.past) for p in self.parameters(adapter).values()]

    def add_mixing(self, adapter: str, values: Tensor, groups: Tensor | None = None) -> None:
        """Put a mixing between the factors of a slot, see :class:`SlotFactor`; before the strategy wraps the module."""
        self.slot_factor(adapter).add_mixing(values, groups)

    def slot_factor(self, adapter: str) -> SlotFactor:
        """Return the layer of factor A, made one of ours where it is not."""
        found = self.down(adapter)
        if not isinstance(found, SlotFactor):
            found = self.layer.lora_A[adapter] = SlotFactor(found)
            # PEFT's merge reads weights alone; parts of the layer, as a reference to itself would keep its memory
            parts = self.layer.lora_A, self.layer.lora_B, self.layer.scaling
            self.layer.get_delta_weight = partial(_delta_weight, *parts, getattr(self.layer, "fan_in_fan_out", False))
        return found

    def weights(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return whole, plain copies of A ``[r, in]`` and B ``[out, r]`` as they are; all ranks must call this."""
        return full_copy(self.down(adapter).weight), full_copy(self.up(adapter).weight)

    def mixing(self, adapter: str) -> Tensor:
        """Return a whole, plain copy of the values of a mixing; all ranks must call this."""
        return full_copy(self.parameters(adapter)["mixing"])

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """Return whole, plain :math:`M A` ``[r, in]`` and :math:`B` ``[out, r]``, in float32 or above.

        The scaling is not in them. All ranks must call this.
        """
        whole = {name: wide(full_copy(parameter)) for name, parameter in self.parameters(adapter).items()}
        down = whole["lora_A"]
        if "mixing" in whole:
            gates = self.down(adapter).gates(whole["mixing"])
            down = gates[:, None] * down if gates.ndim == 1 else gates @ down
        return down, whole["lora_B"]

    @torch.no_grad()
    def write(self, adapter: str, down: Tensor, up: Tensor) -> None:
        """Give a slot the values of whole factors; shards take their part."""
        for parameter, value in zip((self.down(adapter).weight, self.up(adapter).weight), (down, up), strict=True):
            fill(parameter, value)

    def write_mixing(self, adapter: str, values: Tensor) -> None:
        """Give the mixing of a slot whole values; a shard takes its part."""
        fill(self.down(adapter).mixing, values)

    def base_weight(self) -> Tensor:
        """Return the whole weight ``[out, in]`` of the base, dequantized, in float32; all ranks must call this."""
        base = self.layer.get_base_layer()
        weight = dequantize(base).float() if is_quantized(base) else full_copy(base.weight).float()
        return weight.mT if getattr(self.layer, "fan_in_fan_out", False) else weight


def _delta_weight(downs: Any, ups: Any, scalings: dict[str, float], transposed: bool, adapter: str) -> Tensor:
    """Return what an adapter adds to the weight of the base, for ``merge_adapter`` and ``merge_and_unload`` of PEFT."""
    down, up = downs[adapter], ups[adapter].weight
    if getattr(down, "routed", False):
        raise ValueError(
            f"The adapter {adapter!r} gives each sample the part of a task, and no one weight computes the same: it"
            " cannot be merged. Keep a checkpoint of the Trainer, and evaluate with the callback."
        )
    # some CPUs have slow products in 16 bits
    accurate = wide(up) if up.device.type == "cpu" else up
    weight = down.weight.to(accurate.dtype)
    if isinstance(down, SlotFactor):
        weight = down.mix(weight.mT).mT
    delta: Tensor = accurate @ weight * scalings[adapter]
    return (delta.mT if transposed else delta).to(up.dtype)
