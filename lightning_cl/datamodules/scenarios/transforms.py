"""Streams in which every task holds all samples, each task seen through a transform of the inputs of its own."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from lightning_cl.datamodules.scenarios.base import (
    DataInfo,
    IndexArray,
    Scenario,
    TaskPlan,
    check_evaluated,
    check_n_tasks,
    classes_of,
    generator,
)

__all__ = ["Permutation", "Permuted", "Rotated", "Rotation"]


class Permutation:
    """Reorders the features of each input by one fixed permutation, a pure function of the seed and the task.

    Args:
        seed: Seed of the stream.
        task: Position of the task.

    Example:
        >>> Permutation(seed=0, task=1)(torch.arange(6).view(1, 2, 3)).shape
        torch.Size([1, 2, 3])
    """

    def __init__(self, seed: int, task: int) -> None:
        self.seed = seed
        self.task = task
        self._order = torch.empty(0, dtype=torch.int64)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Permute inputs ``[B, ...]`` of any dtype; the shape stays."""
        flat = inputs.flatten(start_dim=1)
        if len(self._order) != flat.shape[1]:
            order = generator(self.seed, f"permutation {self.task}").permutation(flat.shape[1])
            self._order = torch.from_numpy(order)
        return flat[:, self._order.to(flat.device)].reshape(inputs.shape)


class Rotation:
    """Rotates images counter-clockwise about their centre, bilinear, with zeros where nothing was.

    Args:
        degrees: The angle.
        image_shape: ``(H, W)`` or ``(C, H, W)`` of inputs that come flat; ``None`` for inputs that come as images.

    Example:
        >>> image = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        >>> Rotation(90.0)(image).round()
        tensor([[[2., 4.],
                 [1., 3.]]])
    """

    def __init__(self, degrees: float, image_shape: tuple[int, ...] | None = None) -> None:
        self.degrees = degrees
        self.image_shape = image_shape

    def __call__(self, inputs: Tensor) -> Tensor:
        """Rotate ``[B, H, W]``, ``[B, C, H, W]`` or flat ``[B, features]`` floating-point inputs; the shape stays."""
        if not inputs.is_floating_point():
            raise ValueError(f"`Rotated` needs floating-point images, got {inputs.dtype}; convert them in the dataset.")
        images = self._images(inputs)
        height, width = images.shape[-2:]
        cos, sin = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        # The grid is in units of half the width and half the height, so that a non-square image needs their ratio.
        theta = images.new_tensor([[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]])
        grid = functional.affine_grid(theta.expand(len(images), 2, 3), list(images.shape), align_corners=False)
        return functional.grid_sample(images, grid, mode="bilinear", align_corners=False).reshape(inputs.shape)

    def _images(self, inputs: Tensor) -> Tensor:
        """Return the inputs as ``[B, C, H, W]``."""
        if inputs.ndim == 4:
            return inputs
        if inputs.ndim == 3:
            return inputs[:, None]
        features = inputs[0].numel()
        if self.image_shape is None:
            side = math.isqrt(features)
            example = f"({side}, {side})" if side * side == features else "(height, width)"
            raise ValueError(
                f"`Rotated` got flat inputs of shape {tuple(inputs.shape)} and no `image_shape`; set"
                f" `image_shape={example}`."
            )
        if math.prod(self.image_shape) != features:
            raise ValueError(f"`image_shape={self.image_shape}` does not fit inputs of {features} features.")
        return inputs.reshape(len(inputs), -1, *self.image_shape[-2:])


class Permuted(Scenario):
    """Every task holds all samples with the features of the inputs in another fixed order (Permuted MNIST).

    The first task leaves the inputs as they are. Goodfellow et al. 2013, arXiv:1312.6211.

    Args:
        n_tasks: Number of tasks, at least 1.
    """

    def __init__(self, n_tasks: int) -> None:
        self.n_tasks = check_n_tasks(n_tasks)

    @override
    def plan(self, train: DataInfo, seed: int) -> list[TaskPlan]:
        everything, classes = np.arange(train.length, dtype=np.int64), classes_of(train.labels)
        return [
            TaskPlan(f"permutation {task}", everything, classes, Permutation(seed, task) if task else None)
            for task in range(self.n_tasks)
        ]

    @override
    def evaluation(self, plans: list[TaskPlan], data: DataInfo, seed: int) -> list[IndexArray]:
        return _whole_set_each(plans, data)


class Rotated(Scenario):
    """Every task holds all samples with the images rotated by another angle (Rotated MNIST).

    Counter-clockwise about the centre, bilinear, zeros in the corners. Lopez-Paz & Ranzato 2017, arXiv:1706.08840.

    Args:
        n_tasks: Number of tasks; task ``i`` is rotated by ``i * 180 / n_tasks`` degrees.
        degrees: The angles instead, one per task.
        image_shape: ``(H, W)`` or ``(C, H, W)`` of inputs that come flat.

    Raises:
        ValueError: Unless exactly one of ``n_tasks`` and ``degrees`` is given; if an angle is given twice.
    """

    def __init__(
        self,
        n_tasks: int | None = None,
        degrees: list[float] | None = None,
        image_shape: tuple[int, ...] | None = None,
    ) -> None:
        if (n_tasks is None) == (degrees is None):
            raise ValueError(f"`Rotated` takes `n_tasks` or `degrees`, got n_tasks={n_tasks} and degrees={degrees}.")
        if image_shape is not None and (len(image_shape) not in (2, 3) or min(image_shape) < 1):
            raise ValueError(f"`image_shape` must be (height, width) or (channels, height, width), got {image_shape}.")
        if degrees is None:
            assert n_tasks is not None
            degrees = [task * 180 / n_tasks for task in range(check_n_tasks(n_tasks))]
        if not degrees or len(set(degrees)) < len(degrees):
            raise ValueError(f"`degrees` must hold at least one angle and none twice, got {degrees}.")
        self.degrees = [float(angle) for angle in degrees]
        self.image_shape = image_shape

    @override
    def plan(self, train: DataInfo, seed: int) -> list[TaskPlan]:
        everything, classes = np.arange(train.length, dtype=np.int64), classes_of(train.labels)
        return [
            TaskPlan(f"rotation {angle:g}", everything, classes, Rotation(angle, self.image_shape) if angle else None)
            for angle in self.degrees
        ]

    @override
    def evaluation(self, plans: list[TaskPlan], data: DataInfo, seed: int) -> list[IndexArray]:
        return _whole_set_each(plans, data)


def _whole_set_each(plans: list[TaskPlan], data: DataInfo) -> list[IndexArray]:
    everything = np.arange(data.length, dtype=np.int64)
    for plan in plans:
        check_evaluated(plan, everything)
    return [everything] * len(plans)
