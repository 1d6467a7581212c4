"""Labels, domains and label names of a dataset, read without decoding its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_cl.datamodules.sources.arrow import arrow_column, integer_labels, is_hf
from lightning_cl.datamodules.sources.base import Source

__all__ = ["check_label_names", "label_names", "read_column", "read_labels"]

_USUAL_KEYS = ("label", "labels")
_WAY_OUT = "Name the labels' key or position with `label`, or give the dataset an integer attribute `targets`."


def read_labels(dataset: Dataset[Any], key: str | int | None = None, *, required: bool = True) -> np.ndarray | None:
    """Return the label of each sample, int64 ``[n]``.

    Read from, in this order: our sources; ``Subset`` and ``ConcatDataset``, whose parts are read so; the column of a
    Hugging Face dataset; a tensor of a ``TensorDataset``; an attribute ``targets`` or ``labels`` as datasets of
    torchvision have (through the dataset's ``target_transform``). As a last resort every sample is read once, which
    decodes its input and is slow.

    Args:
        dataset: A map-style dataset.
        key: Key of a dict sample or column, name of an attribute, or position in a tuple sample. By default
            ``"label"`` or ``"labels"``, or the last element.
        required: Without it, labels that are not integers and labels that only reading every sample would tell
            count as absent, unless ``key`` names them.

    Returns:
        The labels; ``None`` if the dataset has none.

    Raises:
        ValueError: If the labels are not integers, or ``key`` leads nowhere.

    Example:
        >>> import torch
        >>> data = TensorDataset(torch.zeros(3, 2), torch.tensor([4, 0, 4]))
        >>> read_labels(Subset(data, [2, 1]))
        array([4, 0])
    """
    if required or key is not None:
        return _labels(dataset, key)
    try:
        return _labels(dataset, None, by_sample=False)
    except ValueError:
        return None


def _labels(dataset: Any, key: str | int | None, *, by_sample: bool = True) -> np.ndarray | None:
    if isinstance(dataset, Source):
        return dataset.labels
    if isinstance(dataset, Subset):
        labels = _labels(dataset.dataset, key, by_sample=False)
        if labels is None:
            # only the samples of the subset are read, not the whole dataset below
            return _by_sample(dataset, key) if by_sample else None
        return labels[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [_labels(part, key, by_sample=by_sample) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return np.concatenate(known) if len(known) == len(parts) else None
    if is_hf(dataset):
        column = key if key is not None else _first_usual(dataset.column_names)
        return None if column is None else integer_labels(dataset, str(column))
    if isinstance(dataset, TensorDataset):
        if key is None and len(dataset.tensors) == 1:
            return None
        position = -1 if key is None else key
        if isinstance(position, str) or not -len(dataset.tensors) <= position < len(dataset.tensors):
            raise ValueError(f"`label` must be a position among {len(dataset.tensors)} tensors, got {key!r}.")
        return _integers(dataset.tensors[position], "The tensor of labels")
    name = next((name for name in ([key] if key is not None else ["targets", "labels"]) if _holds(dataset, name)), None)
    if name is not None:
        return _through_transform(dataset, _integers(getattr(dataset, str(name)), f"`{type(dataset).__name__}.{name}`"))
    return _by_sample(dataset, key) if by_sample else None


def read_column(dataset: Dataset[Any], name: str) -> np.ndarray:
    """Return one value per sample ``[n]`` of any dtype, such as its domain.

    Read from our sources (``"domain"`` or ``"domains"`` is their ``domains``), Hugging Face columns, attributes of the
    dataset; as a last resort from every sample, which must be a dict.

    Raises:
        ValueError: If there is no such column.
    """
    data: Any = dataset
    if isinstance(data, Source) and name in ("domain", "domains") and data.domains is not None:
        return data.domains
    if isinstance(data, Subset):
        return read_column(data.dataset, name)[np.asarray(data.indices, dtype=np.int64)]
    if isinstance(data, ConcatDataset):
        return np.concatenate([read_column(part, name) for part in data.datasets])
    if is_hf(data):
        return arrow_column(data, name)
    if _holds(data, name):
        return _array(getattr(data, name))
    if len(data) and isinstance(data[0], Mapping) and name in data[0]:
        return _array([data[index][name] for index in range(len(data))])
    raise ValueError(
        f"`{type(data).__name__}` has no column or attribute {name!r} with one value per sample. Add such an attribute,"
        " give the source its `domain`, or name another column."
    )


def label_names(dataset: Dataset[Any]) -> list[str] | None:
    """Return the name of each label, ``None`` where the dataset does not tell."""
    data: Any = dataset
    if isinstance(data, Source):
        return data.label_names
    if isinstance(data, Subset):
        return label_names(data.dataset)
    if isinstance(data, ConcatDataset):
        return label_names(data.datasets[0])
    if is_hf(data):
        column = _first_usual(data.column_names)
        return None if column is None else getattr(data.features[column], "names", None)
    return None


def check_label_names(datasets: Mapping[str, Dataset[Any]]) -> None:
    """Refuse datasets whose labels are numbered differently: the same number would mean another class.

    Args:
        datasets: Datasets by their name, the training set first.

    Raises:
        ValueError: If two datasets have label names and they differ.
    """
    named = {name: names for name, dataset in datasets.items() if (names := label_names(dataset)) is not None}
    for name, names in list(named.items())[1:]:
        first, reference = next(iter(named.items()))
        if names != reference:
            differing = sorted(set(names) ^ set(reference))[:5]
            raise ValueError(
                f"`{first}` and `{name}` number their labels differently ({len(reference)} and {len(names)} names;"
                f" in one only: {differing}). Give both the same `label_names`, or take the label set of both from"
                " the same rows (`label_field`, `label_path`)."
            )


def _first_usual(keys: Any) -> str | None:
    return next((name for name in _USUAL_KEYS if name in keys), None)


def _holds(dataset: Any, name: str | int) -> bool:
    """Return whether the dataset has an attribute with one entry per sample."""
    values = getattr(dataset, name, None) if isinstance(name, str) else None
    return isinstance(values, (list, tuple, np.ndarray, Tensor)) and len(values) == len(dataset)


def _array(values: Any) -> np.ndarray:
    return values.numpy(force=True) if isinstance(values, Tensor) else np.asarray(values)


def _integers(values: Any, what: str) -> np.ndarray:
    array = _array(values)
    if array.ndim != 1 or array.dtype.kind not in "iub":
        raise ValueError(
            f"{what} must be a 1-D array of integers, got {array.dtype} of shape {array.shape}. {_WAY_OUT}"
        )
    return array.astype(np.int64)


def _through_transform(dataset: Any, labels: np.ndarray) -> np.ndarray:
    """Apply the ``target_transform`` of torchvision datasets, which changes labels on their way out, to each class."""
    transform = getattr(dataset, "target_transform", None)
    if transform is None:
        return labels
    classes, inverse = np.unique(labels, return_inverse=True)
    return _integers([_scalar(transform(int(label))) for label in classes], "The result of `target_transform`")[inverse]


def _by_sample(dataset: Any, key: str | int | None) -> np.ndarray | None:
    labels = []
    for index in range(len(dataset)):
        sample = dataset[index]
        if isinstance(sample, Mapping):
            position = _first_usual(sample) if key is None else key
        elif isinstance(sample, (tuple, list)) and (key is not None or len(sample) > 1):
            position = -1 if key is None else key
        else:
            position = None
        if position is None and key is None:
            return None
        try:
            labels.append(_scalar(sample[position]))
        except (KeyError, IndexError, TypeError):
            raise ValueError(
                f"`label={key!r}` is missing in sample {index} of `{type(dataset).__name__}`. {_WAY_OUT}"
            ) from None
    return _integers(labels, f"The labels in samples of `{type(dataset).__name__}`") if labels else None


def _scalar(value: Any) -> Any:
    return value.item() if isinstance(value, (Tensor, np.ndarray, np.generic)) and np.ndim(value) == 0 else value
