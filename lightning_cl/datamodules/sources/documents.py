"""Documents one after the other: of files, and of Hugging Face datasets, map-style and streaming."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_cl.core.imports import require
from lightning_cl.datamodules.sources.arrow import is_hf
from lightning_cl.datamodules.sources.hub import load_hf
from lightning_cl.datamodules.sources.rows import read_rows

__all__ = ["Documents", "dataset_documents", "file_documents", "find_files"]

_ROWS = (".jsonl", ".ndjson", ".json", ".parquet")
_TABLES = (".csv", ".tsv")
_READ_AT_ONCE = 1000  # rows of a dataset


@dataclass(frozen=True)
class Documents:
    """Texts that can be read any number of times.

    Attributes:
        name: What they are, for messages.
        identity: What changes when the texts may have changed, as plain values for JSON.
        read: Starts reading.
    """

    name: str
    identity: list[Any]
    read: Callable[[], Iterator[str]]


def find_files(paths: list[str]) -> list[Path]:
    """Return the files that paths and globs name, each glob's in sorted order; nothing if none is a file or a glob.

    Raises:
        ValueError: If only some of the paths are files, or a glob or a path with a suffix of our formats names none.
    """
    files: list[Path] = []
    missing = []
    for path in paths:
        if Path(path).is_file():
            found = [path]
        else:
            found = sorted(name for name in glob.glob(path, recursive=True) if Path(name).is_file())
        files += [Path(name) for name in found]
        missing += [] if found else [path]
    if missing and (files or len(paths) > 1 or glob.has_magic(paths[0]) or Path(paths[0]).suffix in (".txt", *_ROWS)):
        raise ValueError(f"`path` names no file: {missing}. Correct it, or take it out of the list.")
    return files


def file_documents(files: list[Path], text: str, field: str | list[str] | None, lines: bool) -> Documents:
    """Return the documents of files: rows of JSON, JSON lines and Parquet; all else is plain text.

    Args:
        files: The files, in the order of the documents.
        text: Key of the text in a row.
        field: Key or keys of a JSON object whose lists of rows are read.
        lines: Each line of a text file is a document, not the whole file.

    Raises:
        ValueError: If a file is a table, or ``lines`` or ``field`` does not fit it; when reading, if a row has no text,
            or a text file is not in UTF-8.
    """
    table = next((file for file in files if file.suffix.lower() in _TABLES), None)
    if table is not None:
        raise ValueError(f"'{table.name}' is a table, not a text; convert it to JSON lines or Parquet.")
    rows = next((file for file in files if file.suffix.lower() in _ROWS), None)
    if lines and rows is not None:
        raise ValueError(f"`lines=True` splits text files, but '{rows.name}' holds rows; leave it out.")
    other = next((file for file in files if file.suffix.lower() != ".json"), None)
    if field is not None and other is not None:
        raise ValueError(f"`field={field!r}` picks a key of a .json file, but '{other.name}' is none; leave it out.")

    def read() -> Iterator[str]:
        for file in files:
            if file.suffix.lower() in _ROWS:
                yield from _texts(_rows(file, text, field), text, f"'{file.name}'")
            else:
                yield from _plain(file, lines)

    known = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    name = str(files[0]) if len(files) == 1 else f"{len(files)} files ({files[0]}, ...)"
    return Documents(name, ["files", text, field, lines, known], read)


def dataset_documents(
    data: Any, text: str, *, split: str, config: str | None, revision: str | None, streaming: bool
) -> Documents:
    """Return the documents of a Hugging Face dataset.

    A stream has no content that could be compared before it is read: it goes by its name and ``revision``.

    Args:
        data: Name on the hub, a folder, a ``datasets.Dataset`` or a ``datasets.IterableDataset``.
        text: Column of the text.
        split: Split of a dataset by name.
        config: Configuration of a dataset on the hub.
        revision: Version on the hub; a name of your choice for an ``IterableDataset``.
        streaming: Read a dataset by name as a stream.

    Raises:
        ValueError: If ``data`` is something else, an ``IterableDataset`` has no ``revision``, or there is no such
            column.
    """
    if isinstance(data, str) and streaming:
        # opened when it is read: a cached stream needs no network
        identity = ["stream", data, text, split, config, revision]
        return Documents(f"'{data}'", identity, lambda: _column(_open_stream(data, split, config, revision), text))
    name = f"'{data}'" if isinstance(data, str) else type(data).__name__
    if isinstance(data, str):
        data = load_hf(data, split, config, revision)
    if is_hf(data, "IterableDataset"):
        if revision is None:
            raise ValueError(
                "An `IterableDataset` does not tell what it holds, and its tokens are cached: name it by `revision`,"
                " and change the name when the data changes."
            )
        return Documents(name, ["stream", text, revision], lambda: _column(data, text))
    if not is_hf(data):
        raise ValueError(f"`path` must be files, the name of a dataset, or a Hugging Face dataset, got {name}.")
    if text not in data.column_names:
        raise ValueError(f"`text={text!r}` is no column of {name}; it has {data.column_names}.")
    return Documents(name, ["dataset", text, data._fingerprint], lambda: _column(data, text))


def _open_stream(path: str, split: str, config: str | None, revision: str | None) -> Any:
    load = require("datasets", extra="llm").load_dataset
    return load(path, config, split=split, revision=revision, streaming=True)


def _column(dataset: Any, text: str) -> Iterator[str]:
    for columns in dataset.iter(_READ_AT_ONCE):
        if text not in columns:
            raise ValueError(f"`text={text!r}` is no column of the dataset; it has {sorted(columns)}.")
        yield from _texts(({text: value} for value in columns[text]), text, "the dataset")


def _rows(file: Path, text: str, field: str | list[str] | None) -> Iterable[Any]:
    """Yield the rows of a file; only .json is read as a whole."""
    suffix = file.suffix.lower()
    if suffix == ".json":
        yield from read_rows(file, field)
    elif suffix == ".parquet":
        load = require("datasets", extra="llm").load_dataset
        yield from load("parquet", data_files=glob.escape(str(file)), split="train", streaming=True)
    else:
        with file.open(encoding="utf-8") as opened:
            for number, line in enumerate(opened, start=1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"Line {number} of '{file.name}' is no valid JSON: {error}.") from None


def _texts(rows: Iterable[Any], text: str, place: str) -> Iterator[str]:
    for number, row in enumerate(rows):
        value = row.get(text) if isinstance(row, dict) else None
        if not isinstance(value, str):
            has = f"keys {sorted(row)}" if isinstance(row, dict) else f"{row!r:.80}"
            raise ValueError(f"`text={text!r}` names no text in row {number} of {place}, which has {has}.")
        yield value


def _plain(file: Path, lines: bool) -> Iterator[str]:
    # without `newline=""` the ends of lines would not be those of the file
    with file.open(encoding="utf-8", newline="") as opened:
        try:
            if lines:
                yield from (line.rstrip("\r\n") for line in opened)
            else:
                yield opened.read()
        except UnicodeDecodeError as error:
            raise ValueError(f"'{file}' is no text in UTF-8 ({error}); convert it, or take it out of `path`.") from None
