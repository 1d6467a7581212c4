"""What users pass as data, turned into one map-style dataset."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_cl.datamodules.sources.arrays import ArraySource
from lightning_cl.datamodules.sources.arrow import is_hf

__all__ = ["as_dataset"]

_ACCEPTED = "a map-style torch `Dataset`, a Hugging Face dataset, an array, or a tuple of arrays `(inputs, labels)`"


def as_dataset(data: Any, split: str | None = None, *, tensors: bool = True) -> Dataset[Any]:
    """Return a map-style dataset with a length.

    Args:
        data: A map-style dataset, a Hugging Face ``Dataset`` or ``DatasetDict``, an array or tensor of inputs, or a
            tuple ``(inputs, labels)`` of these.
        split: Split of a ``DatasetDict``.
        tensors: Give a Hugging Face dataset without a format the torch format, whose rows can be read by batch. Set it
            to ``False`` for a ``collate_fn`` that expects Python lists.

    Raises:
        ValueError: If ``data`` is something else: an iterable dataset, a dataset without length, a loader.

    Example:
        >>> as_dataset((np.zeros((4, 2)), np.array([0, 1, 0, 1])))[1]
        (tensor([0., 0.], dtype=torch.float64), tensor(1))
    """
    if is_hf(data, "DatasetDict"):
        if split is None or split not in data:
            raise ValueError(f"A `DatasetDict` needs one of its splits {sorted(data)}, got {split!r}; pass that split.")
        data = data[split]
    if isinstance(data, IterableDataset) or is_hf(data, "IterableDataset"):
        raise ValueError(
            f"`{type(data).__name__}` is an iterable dataset, which cannot be split into tasks, shuffled or resumed by"
            " index. Pass a map-style dataset (with `__getitem__` and `__len__`), or read it into one first; for texts"
            " `PackedTextSource` does."
        )
    if is_hf(data):
        unformatted = tensors and data.format["type"] is None
        return cast("Dataset[Any]", data.with_format("torch") if unformatted else data)
    if isinstance(data, (np.ndarray, Tensor)):
        return ArraySource(data)
    if isinstance(data, tuple):
        if len(data) != 2 or not all(isinstance(part, (np.ndarray, Tensor)) for part in data):
            raise ValueError(f"A tuple must hold two arrays or tensors, `(inputs, labels)`, got {_types(data)}.")
        return ArraySource(*data)
    if isinstance(data, DataLoader):
        raise ValueError("Got a `DataLoader`; pass its `dataset`, the stream makes a loader for each task.")
    if isinstance(data, Dataset) and not hasattr(data, "__len__"):
        raise ValueError(
            f"`{type(data).__name__}` has no `__len__`, which is needed to split it into tasks; add it to the class."
        )
    # a list or a dict would hold several datasets, which the caller has to tell apart
    if isinstance(data, (str, list, dict)) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise ValueError(f"Expected {_ACCEPTED}, got {type(data).__name__}. For data by name use `HFSource`.")
    return cast("Dataset[Any]", data)


def _types(values: tuple[Any, ...]) -> list[str]:
    return [type(value).__name__ for value in values]
