"""Sources of arrays: the user's own, and the digits that come with scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_cl.core.checks import check_choice
from lightning_cl.core.imports import require
from lightning_cl.datamodules.sources.base import MappedArray, TableSource, stratified_split

__all__ = ["ArraySource", "DigitsSource"]


class ArraySource(TableSource):
    """Samples ``(input, label)``, or bare inputs, from arrays, tensors or ``.npy`` files.

    Inputs of a file are read through a memory map, batch by batch; values keep their dtype.

    Args:
        inputs: ``[n, ...]``: an array, a tensor or the path of a ``.npy`` file.
        labels: Integer labels ``[n]``, given likewise; samples are bare inputs without.
        domains: One value per sample ``[n]``, numbers or strings, given likewise.

    Raises:
        ValueError: If lengths differ or labels are not integers.

    Example:
        >>> source = ArraySource(np.zeros((3, 2), dtype=np.float32), labels=[0, 1, 1])
        >>> source[2], len(source)
        ((tensor([0., 0.]), tensor(1)), 3)
    """

    def __init__(
        self,
        inputs: str | Path | np.ndarray | Tensor,
        labels: str | Path | np.ndarray | Tensor | list[int] | None = None,
        domains: str | Path | np.ndarray | list[int] | list[str] | None = None,
    ) -> None:
        column = MappedArray(inputs) if isinstance(inputs, (str, Path)) else torch.as_tensor(inputs)
        label_array = None if labels is None else _read(labels)
        domain_array = None if domains is None else _read(domains)
        for name, values in (("labels", label_array), ("domains", domain_array)):
            if values is not None and values.shape != (len(column),):
                raise ValueError(
                    f"`{name}` must hold one value for each of the {len(column)} inputs, got shape {values.shape}."
                )
        if label_array is not None:
            if label_array.dtype.kind not in "iub":
                raise ValueError(
                    f"`labels` must be integers, got {label_array.dtype}. Map each class to a number from 0; for"
                    " targets of a regression pass a torch `TensorDataset`."
                )
            label_array = label_array.astype(np.int64)
        super().__init__(
            [column] if label_array is None else [column, torch.from_numpy(label_array)],
            labels=label_array,
            domains=domain_array,
        )


class DigitsSource(TableSource):
    """The 1797 images of handwritten digits (8 by 8, 10 classes) that come with scikit-learn.

    Split 60/20/20 within every class. Pixels are float32 in [0, 1].

    Args:
        split: ``"train"`` (1078 images), ``"val"`` or ``"test"``.
        seed: Seed of the split; give the three parts the same.
        flatten: Inputs of shape ``[64]``; otherwise ``[1, 8, 8]``.
        target: What is learned: the ``"digit"``, or whether it is ``"odd"``. The domain of a sample is its pair of
            digits (0 and 1 are pair 0), so that both targets split into the same tasks.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If ``target`` is unknown.
    """

    def __init__(
        self,
        split: Literal["train", "val", "test"] = "train",
        *,
        seed: int = 0,
        flatten: bool = True,
        target: Literal["digit", "odd"] = "digit",
    ) -> None:
        check_choice("target", target, ("digit", "odd"))
        digits = require("sklearn.datasets", extra="examples").load_digits()
        labels = digits.target.astype(np.int64)
        chosen = stratified_split(labels, split, seed, shares=(0.6, 0.2, 0.2))
        images = torch.from_numpy(digits.images[chosen].astype(np.float32) / 16)
        targets = labels[chosen] % 2 if target == "odd" else labels[chosen]
        super().__init__(
            [images.flatten(1) if flatten else images[:, None], torch.from_numpy(targets)],
            labels=targets,
            domains=labels[chosen] // 2,
        )


def _read(values: str | Path | np.ndarray | Tensor | list[int] | list[str]) -> np.ndarray:
    return np.load(values) if isinstance(values, (str, Path)) else np.asarray(values)
