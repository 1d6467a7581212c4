"""Reading of Hugging Face datasets: recognised without importing the package, columns and batches through Arrow."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import default_collate

__all__ = ["arrow_column", "integer_labels", "is_hf", "read_arrow_batch", "reads_tensors"]


def is_hf(value: object, kind: str = "Dataset") -> bool:
    """Return whether ``value`` is a ``datasets.<kind>``; such a value exists only if the package is imported."""
    module = sys.modules.get("datasets")
    return module is not None and isinstance(value, getattr(module, kind))


def arrow_column(dataset: Any, name: str) -> np.ndarray:
    """Return one column without decoding the others; selections and shuffles of the dataset are honoured.

    Raises:
        ValueError: If there is no such column, or it has missing values.
    """
    if name not in dataset.column_names:
        raise ValueError(f"The dataset has no column {name!r}; it has {dataset.column_names}.")
    column = dataset.select_columns([name]).with_format("arrow")[:].column(name)
    if column.null_count:
        raise ValueError(f"Column {name!r} has {column.null_count} missing values; filter those rows out.")
    values: np.ndarray = column.to_numpy()
    # text comes as Python objects, which numpy sorts slowly
    return values.astype(np.str_) if str(column.type) in ("string", "large_string") else values


def integer_labels(dataset: Any, name: str) -> np.ndarray:
    """Return a column of labels as int64.

    Raises:
        ValueError: If the column holds something else than integers.
    """
    values = arrow_column(dataset, name)
    if values.dtype.kind == "U":
        raise ValueError(
            f"Column {name!r} holds text, labels must be integers. Pass `dataset.class_encode_column({name!r})`, or"
            " use `HFSource`, which numbers the names."
        )
    if values.dtype.kind not in "iub":
        raise ValueError(f"Column {name!r} holds {values.dtype}, labels must be integers; name another column.")
    return values.astype(np.int64)


def reads_tensors(dataset: Any) -> bool:
    """Return whether the dataset gives tensors and nothing of the user's runs while it is read."""
    return bool(dataset.format["type"] == "torch")


def read_arrow_batch(dataset: Any, indices: np.ndarray) -> Any:
    """Return ``default_collate([dataset[i] for i in indices])`` of a dataset in torch format, read at once.

    A column whose rows could not be stacked by reading them together is collated row by row.
    """
    columns = dataset[indices.tolist()]
    for values in columns.values():
        stacked = isinstance(values, Tensor) or all(isinstance(value, str) for value in values)
        if not stacked:
            return default_collate(dataset.__getitems__(indices.tolist()))
    return columns
