"""SPAM written out from its definition, in float64 numpy, a tensor at a time: the reference for the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
MaskOf = Callable[[int, int], NDArray[np.bool_]]

DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "threshold": 5000.0,
    "reset_interval": 500,
    "warmup_steps": 150,
    "density": 1.0,
    "clip_delay": 20,
}


@dataclass(eq=False)
class Weights:
    """One tensor of weights and what belongs to it.

    ``carried`` marks the coordinates whose moments came over a reset: these are no longer biased towards zero.
    """

    values: Array
    first: Array = field(init=False)
    second: Array = field(init=False)
    mask: NDArray[np.bool_] = field(init=False)
    carried: NDArray[np.bool_] = field(init=False)
    step: int = 0
    resets: int = 0
    clipped: int = 0

    def __post_init__(self) -> None:
        self.first, self.second = np.zeros_like(self.values), np.zeros_like(self.values)
        self.mask = np.ones(self.values.shape, dtype=bool)
        self.carried = np.zeros(self.values.shape, dtype=bool)


class SpamReference:
    """SPAM over groups of ``(arrays, settings)``.

    Args:
        groups: The weights, with what differs from ``DEFAULTS``.
        mask_of: The mask of a tensor by its number over all groups and its resets, where a density is below 1.
    """

    def __init__(
        self, groups: Sequence[tuple[Sequence[Any], Mapping[str, Any]]], mask_of: MaskOf | None = None
    ) -> None:
        self.groups: list[tuple[list[Weights], dict[str, Any]]] = []
        self.mask_of = mask_of
        for arrays, settings in groups:
            self.add_group(arrays, settings)

    def add_group(self, arrays: Sequence[Any], settings: Mapping[str, Any]) -> None:
        weights = [Weights(np.array(array, dtype=np.float64)) for array in arrays]
        self.groups.append((weights, DEFAULTS | dict(settings)))
        if settings.get("density", 1.0) < 1:
            for number, one in enumerate(self.weights):
                if any(one is new for new in weights):
                    one.mask = self.mask_of(number, 0)

    @property
    def weights(self) -> list[Weights]:
        return [one for weights, _ in self.groups for one in weights]

    def values(self) -> list[Array]:
        return [one.values for one in self.weights]

    def reset(self, one: Weights, settings: Mapping[str, Any], *, anew: bool = False) -> None:
        """Where a coordinate is in both masks, before and after, its moments go on, but not with ``anew``."""
        if not one.step:  # nothing to forget
            return
        first, second = np.zeros_like(one.values), np.zeros_like(one.values)
        one.resets += 1
        if settings["density"] < 1:
            old, one.mask = one.mask, self.mask_of(self.weights.index(one), one.resets)
            both = old & one.mask & (not anew)
            beta1, beta2 = settings["betas"]
            for index in zip(*np.nonzero(both), strict=True):
                unbiased = one.carried[index]
                first[index] = one.first[index] / (1 if unbiased else 1 - beta1**one.step)
                second[index] = one.second[index] / (1 if unbiased else 1 - beta2**one.step)
            one.carried = both
        one.first, one.second, one.step = first, second, 0

    def reset_moments(self) -> None:
        for weights, settings in self.groups:
            for one in weights:
                self.reset(one, settings, anew=True)

    def step(self, gradients: Sequence[Any]) -> None:
        """One optimizer step; ``None`` leaves a tensor alone."""
        numbers = iter(gradients)
        for weights, settings in self.groups:
            for one in weights:
                gradient = next(numbers)
                if gradient is not None:
                    self._step(one, np.array(gradient, dtype=np.float64), settings)

    def _step(self, one: Weights, gradient: Array, settings: Mapping[str, Any]) -> None:
        lr, (beta1, beta2), interval = float(settings["lr"]), settings["betas"], settings["reset_interval"]
        if interval and one.step >= interval:
            self.reset(one, settings)
        k = one.step
        if k >= settings["clip_delay"]:
            limit = settings["threshold"] * one.second
            spikes = (gradient**2 > limit) & (limit > 0) & one.mask
            gradient[spikes] = np.sign(gradient[spikes]) * np.sqrt(limit[spikes])
            one.clipped += int(spikes.sum())
        one.step += 1
        decayed = one.values * (1 - lr * settings["weight_decay"])
        one.first = beta1 * one.first + (1 - beta1) * gradient
        one.second = beta2 * one.second + (1 - beta2) * gradient**2
        correction1 = np.where(one.carried, 1.0, 1 - beta1**one.step)
        correction2 = np.where(one.carried, 1.0, 1 - beta2**one.step)
        scale = 1.0
        if one.resets and k < settings["warmup_steps"]:
            scale = 1 - 0.99 * (1 + math.cos(math.pi * k / (settings["warmup_steps"] + 1))) / 2
        move = lr * scale * (one.first / correction1) / (np.sqrt(one.second / correction2) + settings["eps"])
        one.values = np.where(one.mask, decayed - move, one.values)
        one.first, one.second = np.where(one.mask, one.first, 0.0), np.where(one.mask, one.second, 0.0)
