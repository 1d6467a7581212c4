"""A source over a Hugging Face dataset by name, for command lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from lightning_cl.core.imports import require
from lightning_cl.datamodules.sources.arrow import arrow_column, integer_labels, read_arrow_batch
from lightning_cl.datamodules.sources.base import Source
from lightning_cl.datamodules.sources.tokens import ByteTokenizer, HashTokenizer, PretrainedTokenizer, make_tokenizer

__all__ = ["HFSource", "load_hf"]

_BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}


class HFSource(Source):
    """A dataset of the Hugging Face hub, of ``save_to_disk``, or of local CSV, JSON, Parquet or Arrow files.

    Samples are dicts of tensors, memory-mapped and read by batch. With ``text`` they are ``{"input_ids",
    "attention_mask", "labels"}``, tokenized once and cached by ``datasets``; otherwise the columns as they are.
    Needs the extra ``llm``.

    Args:
        path: Name on the hub, a directory written by ``save_to_disk``, or a file.
        split: Split, with the slices of ``datasets`` where it loads the data, such as ``"train[:10%]"``.
        config: Configuration of the hub dataset.
        revision: Version of the hub dataset.
        label: Column of the labels; by default ``"label"`` or ``"labels"``, where there is one. Text is numbered.
        label_names: The label set of a column of text, in its order; by default the sorted set of the split, which
            may differ from that of another split.
        domain: Column of the domains, for ``DomainIncremental``; it is not part of a sample.
        columns: Columns of a sample; all if ``None``.
        text: Column of texts to tokenize.
        tokenizer: ``"hash"`` or a :class:`HashTokenizer`, ``"bytes"``, or the name or path of a tokenizer of
            transformers.
        max_length: Tokens per text, at least 1.

    Attributes:
        dataset: The ``datasets.Dataset`` that is read.
        vocab_size: Number of token ids, ``None`` without ``text``.

    Raises:
        ImportError: If ``datasets`` is not installed.
        ValueError: If a split or column is missing, or a label is not in the label set.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        *,
        config: str | None = None,
        revision: str | None = None,
        label: str | None = None,
        label_names: list[str] | None = None,
        domain: str | None = None,
        columns: list[str] | None = None,
        text: str | None = None,
        tokenizer: HashTokenizer | str = "hash",
        max_length: int = 32,
    ) -> None:
        if max_length < 1:
            raise ValueError(f"`max_length` must be at least 1, got {max_length}.")
        dataset = load_hf(path, split, config, revision)
        missing = {label, domain, text, *(columns or ())} - {None, *dataset.column_names}
        if missing:
            raise ValueError(f"'{path}' has no columns {sorted(missing)}; it has {dataset.column_names}.")
        if label is None:
            label = next((name for name in ("label", "labels") if name in dataset.column_names), None)
        if domain is not None:
            self.domains = arrow_column(dataset, domain)
        if label is not None:
            dataset = _number_labels(dataset, label, label_names)
            self.labels = integer_labels(dataset, label)
            self.label_names = getattr(dataset.features[label], "names", None)
        self.vocab_size: int | None = None
        if text is not None:
            encoder = make_tokenizer(tokenizer)
            self.vocab_size = encoder.vocab_size
            dataset = _tokenize(dataset, text, label, encoder, max_length)
            columns = ["input_ids", "attention_mask", *(["labels"] if label else [])]
        elif columns is None:
            columns = [name for name in dataset.column_names if name != domain]
        self.dataset = dataset.select_columns(columns).with_format("torch")

    def __len__(self) -> int:
        return len(self.dataset)

    @override
    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    @override
    def read_batch(self, indices: np.ndarray) -> Any:
        return read_arrow_batch(self.dataset, indices)


def load_hf(path: str, split: str, config: str | None, revision: str | None) -> Any:
    """Return a ``datasets.Dataset`` of the hub, of ``save_to_disk``, of a folder or of a local file.

    Raises:
        ValueError: If a split is missing, or the file has another format.
    """
    datasets = require("datasets", extra="llm")
    local = Path(path)
    if local.is_dir() and any((local / name).is_file() for name in ("state.json", "dataset_dict.json")):
        loaded = datasets.load_from_disk(path)
        if isinstance(loaded, datasets.DatasetDict):
            if split not in loaded:
                raise ValueError(f"`split={split!r}` is not in '{path}'; it has {sorted(loaded)}.")
            loaded = loaded[split]
        return loaded
    if local.is_file():
        if local.suffix not in _BUILDERS:
            raise ValueError(f"`path` must end in one of {sorted(_BUILDERS)} to be read as a file, got '{path}'.")
        options = {"delimiter": "\t"} if local.suffix == ".tsv" else {}
        return datasets.load_dataset(_BUILDERS[local.suffix], data_files=path, split=split, **options)
    return datasets.load_dataset(path, config, split=split, revision=revision)


def _number_labels(dataset: Any, label: str, names: list[str] | None) -> Any:
    """Turn a column of text into class numbers; other columns stay."""
    datasets = require("datasets", extra="llm")
    feature = dataset.features[label]
    if getattr(feature, "dtype", None) not in ("string", "large_string"):
        if names is not None:
            raise ValueError(f"`label_names` numbers a column of text, but {label!r} is {feature}; leave it out.")
        return dataset
    present = set(dataset.unique(label))
    names = sorted(present) if names is None else names
    if present - set(names):
        raise ValueError(f"`label_names` lacks labels of the column {label!r}: {sorted(present - set(names))[:5]}.")
    return dataset.cast_column(label, datasets.ClassLabel(names=names))


def _tokenize(
    dataset: Any,
    text: str,
    label: str | None,
    encoder: HashTokenizer | ByteTokenizer | PretrainedTokenizer,
    max_length: int,
) -> Any:
    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        ids, mask = encoder.encode([str(value) for value in rows[text]], max_length)
        return {"input_ids": ids, "attention_mask": mask} | ({"labels": rows[label]} if label else {})

    return dataset.map(encode, batched=True, remove_columns=dataset.column_names)
