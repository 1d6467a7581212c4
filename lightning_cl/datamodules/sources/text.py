"""A source over a file of labelled texts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch

from lightning_cl.datamodules.sources.base import TableSource, stratified_split
from lightning_cl.datamodules.sources.rows import class_labels, read_rows, row_values
from lightning_cl.datamodules.sources.tokens import HashTokenizer, make_tokenizer

__all__ = ["TextFileSource"]


class TextFileSource(TableSource):
    """Labelled texts of a JSON, JSON lines, CSV, TSV or Parquet file, as token ids of fixed length.

    A row is a dict, or a list such as ``[text, label]``. Samples are ``(ids, label)``, int64 ``[max_length]`` and
    scalar, or dicts for models of transformers.

    Labels that are numbers stay as they are. Labels that are text are numbered in the sorted order of the label set,
    which must be the same for training, validation and test: by default it is that of the rows read, so give
    ``label_field`` or ``label_path`` (the training rows, say) where a part may lack a class.

    Args:
        path: The file. Only Parquet needs the extra ``llm``.
        field: Key, or list of keys to join, of a JSON object of lists, such as ``"train"`` in ``{"train": [...]}``.
        text: Key of the text, or its position (0 unless given) in rows that are lists.
        label: Key of the label, or its position (1 unless given) in rows that are lists.
        domain: Key or position of the domain of each row, for ``DomainIncremental``.
        split: Take a part of the rows only, 80/10/10 within every class at random; ``None`` takes all.
        seed: Seed of ``split``; give the three parts the same.
        label_names: The label set, in its order.
        label_field: Key or keys of the rows that define the label set.
        label_path: File of the rows that define the label set, read like ``path``.
        tokenizer: ``"hash"`` or a :class:`HashTokenizer` (no vocabulary, nothing to install), ``"bytes"``, or the name
            or path of a tokenizer of transformers (extra ``llm``).
        max_length: Tokens per text, at least 1; longer texts are cut, shorter ones padded.
        as_dict: Samples are ``{"input_ids", "attention_mask", "labels"}``.

    Attributes:
        vocab_size: Number of token ids, for the size of an embedding.

    Raises:
        ValueError: If the file, a field or a value is missing, or a label is not in the label set.
    """

    def __init__(
        self,
        path: str | Path,
        field: str | list[str] | None = None,
        *,
        text: int | str = "text",
        label: int | str = "label",
        domain: int | str | None = None,
        split: Literal["train", "val", "test"] | None = None,
        seed: int = 0,
        label_names: list[str] | None = None,
        label_field: str | list[str] | None = None,
        label_path: str | Path | None = None,
        tokenizer: HashTokenizer | str = "hash",
        max_length: int = 32,
        as_dict: bool = False,
    ) -> None:
        if max_length < 1:
            raise ValueError(f"`max_length` must be at least 1, got {max_length}.")
        if label_names is not None and (label_field is not None or label_path is not None):
            raise ValueError("`label_names` is the label set; leave out `label_field` and `label_path`.")
        rows = read_rows(path, field)
        known = None
        if label_field is not None or label_path is not None:
            known = row_values(read_rows(label_path or path, label_field or field), label, 1, "label")
        labels, names = class_labels(row_values(rows, label, 1, "label"), label_names, known)
        chosen = np.arange(len(rows)) if split is None else stratified_split(labels, split, seed, (0.8, 0.1, 0.1))
        if not len(chosen):
            raise ValueError(f"`split={split!r}` of the {len(rows)} rows of '{Path(path).name}' is empty; add rows.")
        texts = row_values(rows, text, 0, "text")
        encoder = make_tokenizer(tokenizer)
        ids, mask = encoder.encode([str(texts[row]) for row in chosen], max_length)
        labels = labels[chosen]
        columns = [ids, mask, labels] if as_dict else [ids, labels]
        super().__init__(
            [torch.from_numpy(column) for column in columns],
            keys=["input_ids", "attention_mask", "labels"] if as_dict else None,
            labels=labels,
            domains=None if domain is None else np.asarray(row_values(rows, domain, None, "domain"))[chosen],
            label_names=names,
        )
        self.vocab_size = encoder.vocab_size
