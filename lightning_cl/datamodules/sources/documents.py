"""Documents and rows one after the other: of files, and of Hugging Face datasets, map-style and streaming."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from lightning_cl.core.imports import require
from lightning_cl.datamodules.sources.arrow import is_hf
from lightning_cl.datamodules.sources.hub import load_hf
from lightning_cl.datamodules.sources.rows import read_rows

__all__ = ["Documents", "dataset_documents", "dataset_rows", "file_documents", "file_rows", "find_files"]

_ROWS = (".jsonl", ".ndjson", ".json", ".parquet")
_TABLES = (".csv", ".tsv")
_READ_AT_ONCE = 1000  # rows of a dataset
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Documents(Generic[_Item]):
    """Texts, or rows, that can be read any number of times.

    Attributes:
        name: What they are, for messages.
        identity: What changes when the texts may have changed, as plain values for JSON.
        read: Starts reading.
    """

    name: str
    identity: list[Any]
    read: Callable[[], Iterator[_Item]]


def find_files(path: Any, of_files: Mapping[str, Any], of_hub: Mapping[str, Any], revision: str | None) -> list[Path]:
    """Return the files that a path or a list of paths and globs names, each glob's in sorted order.

    Args:
        path: What the user gave; there are no files if it is, or names, a dataset.
        of_files: Settings that go with files only, by name; false where they are not given.
        of_hub: Settings that go with a dataset by name only.
        revision: A setting that goes with datasets.

    Raises:
        ValueError: If only some of the paths are files, or a glob or a path with a suffix of our formats names none;
            for a setting that belongs to another kind of data.
    """
    files = _matches([path] if isinstance(path, str) else path) if isinstance(path, (str, list)) else []
    if files:
        kind, unfit = "files", {**of_hub, "revision": revision}
    elif isinstance(path, str):
        kind, unfit = "a dataset by name", {**of_files}
    else:
        kind, unfit = "a dataset", {**of_files, **of_hub}
    given = next((name for name, value in unfit.items() if value), None)
    if given is not None:
        raise ValueError(f"`{given}` does not go with a `path` that is {kind}; leave it out.")
    return files


def _matches(paths: list[str]) -> list[Path]:
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


def file_documents(files: list[Path], text: str, field: str | list[str] | None, lines: bool) -> Documents[str]:
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
    _check_field(files, field)

    def read() -> Iterator[str]:
        for file in files:
            if file.suffix.lower() in _ROWS:
                yield from _texts(_rows(file, field), text, f"'{file.name}'")
            else:
                yield from _plain(file, lines)

    return Documents(_name(files), ["files", text, field, lines, _state(files)], read)


def file_rows(files: list[Path], field: str | list[str] | None) -> Documents[tuple[str, Any]]:
    """Return the rows of JSON, JSON lines and Parquet files, each with the place where it stands.

    Args:
        files: The files, in the order of the rows.
        field: Key or keys of a JSON object whose lists of rows are read.

    Raises:
        ValueError: If a file is of another kind, or ``field`` does not fit it.
    """
    other = next((file for file in files if file.suffix.lower() not in _ROWS), None)
    if other is not None:
        raise ValueError(f"`path` must be files of rows {_ROWS}, but '{other.name}' is none; convert it.")
    _check_field(files, field)

    def read() -> Iterator[tuple[str, Any]]:
        for file in files:
            for number, row in enumerate(_rows(file, field)):
                yield f"row {number} of '{file.name}'", row

    return Documents(_name(files), ["rows", field, _state(files)], read)


def dataset_rows(
    data: Any, *, split: str, config: str | None, revision: str | None, streaming: bool
) -> Documents[tuple[str, Any]]:
    """Return the rows of a Hugging Face dataset, each with its place; arguments and errors are those of documents."""
    name, identity, _, open_data = _dataset(data, split, config, revision, streaming)

    def read() -> Iterator[tuple[str, Any]]:
        for number, row in enumerate(open_data()):
            yield f"row {number} of {name}", row

    return Documents(name, [*identity, "rows"], read)


def dataset_documents(
    data: Any, text: str, *, split: str, config: str | None, revision: str | None, streaming: bool
) -> Documents[str]:
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
    name, identity, columns, open_data = _dataset(data, split, config, revision, streaming)
    if columns is not None and text not in columns:
        raise ValueError(f"`text={text!r}` is no column of {name}; it has {columns}.")
    return Documents(name, [*identity, text], lambda: _column(open_data(), text))


def _dataset(
    data: Any, split: str, config: str | None, revision: str | None, streaming: bool
) -> tuple[str, list[Any], list[str] | None, Callable[[], Any]]:
    """Return a dataset's name, identity, columns where they are known, and what opens it."""
    if isinstance(data, str) and streaming:
        # opened when it is read: a cached stream needs no network
        identity = ["stream", data, split, config, revision]
        return f"'{data}'", identity, None, lambda: _open_stream(data, split, config, revision)
    name = f"'{data}'" if isinstance(data, str) else type(data).__name__
    if isinstance(data, str):
        data = load_hf(data, split, config, revision)
    if is_hf(data, "IterableDataset"):
        if revision is None:
            raise ValueError(
                "An `IterableDataset` does not tell what it holds, and its tokens are cached: name it by `revision`,"
                " and change the name when the data changes."
            )
        return name, ["stream", revision], None, lambda: data
    if not is_hf(data):
        raise ValueError(f"`path` must be files, the name of a dataset, or a Hugging Face dataset, got {name}.")
    return name, ["dataset", data._fingerprint], data.column_names, lambda: data


def _open_stream(path: str, split: str, config: str | None, revision: str | None) -> Any:
    load = require("datasets", extra="llm").load_dataset
    return load(path, config, split=split, revision=revision, streaming=True)


def _name(files: list[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"{len(files)} files ({files[0]}, ...)"


def _state(files: list[Path]) -> list[list[Any]]:
    """Return what changes when a file may have changed."""
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _check_field(files: list[Path], field: str | list[str] | None) -> None:
    other = next((file for file in files if file.suffix.lower() != ".json"), None)
    if field is not None and other is not None:
        raise ValueError(f"`field={field!r}` picks a key of a .json file, but '{other.name}' is none; leave it out.")


def _column(dataset: Any, text: str) -> Iterator[str]:
    for columns in dataset.iter(_READ_AT_ONCE):
        if text not in columns:
            raise ValueError(f"`text={text!r}` is no column of the dataset; it has {sorted(columns)}.")
        yield from _texts(({text: value} for value in columns[text]), text, "the dataset")


def _rows(file: Path, field: str | list[str] | None) -> Iterable[Any]:
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
