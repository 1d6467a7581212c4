"""Random weights of a Hugging Face network by their names, as if they were read from a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_cl.core.rng import derived_seed, isolated_rng

__all__ = ["RandomWeights"]


class RandomWeights:
    """A checkpoint that was never written: what the class of a network draws for each of its layers.

    Every layer draws from a seed of its own name. So its weights are the same on every rank, in whatever order, and
    with or without quantization and adapters around it.

    Args:
        skeleton: The network on the meta device, neither quantized nor with adapters.
        seed: Seed of the weights.
    """

    path = "the random weights of the config"

    def __init__(self, skeleton: nn.Module, seed: int) -> None:
        self._seed = seed
        self._models = {name: part for name, part in skeleton.named_modules() if hasattr(part, "_init_weights")}
        self._layers: dict[str, nn.Module] = {}
        self._tensors: dict[str, Tensor] = {}
        for name, layer in skeleton.named_modules():
            for attribute, tensor in layer.named_parameters(recurse=False):
                full = f"{name}.{attribute}".lstrip(".")
                self._layers[full], self._tensors[full] = layer, tensor

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of the parameters of a module ``prefix``, or of all."""
        return [name for name in self._tensors if not prefix or name.startswith(f"{prefix}.")]

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a parameter."""
        return self._tensors[name].shape

    def read(self, name: str) -> Tensor:
        """Return a parameter, on the CPU."""
        module_name, _, attribute = name.rpartition(".")
        owner = max((model for model in self._models if not model or f"{name}.".startswith(f"{model}.")), key=len)
        # the layer alone: its parts have seeds of their own
        layer = copy.copy(self._layers[name])
        layer._parameters, layer._buffers = dict(layer._parameters), dict(layer._buffers)
        layer._modules = {}
        with isolated_rng(derived_seed("weights", self._seed, module_name)), torch.no_grad():
            layer.to_empty(device="cpu", recurse=False)
            rule: Any = self._models[owner]._init_weights
            rule(layer)
        return layer.get_parameter(attribute).detach()

    def rows(self, name: str, portion: int) -> Iterator[Tensor]:
        """Yield a matrix in portions of so many rows."""
        yield from self.read(name).split(portion)

    def read_ahead(self, names: Sequence[str]) -> None:
        """Do nothing: there is no file."""
