"""Rows of text files: JSON, JSON lines, CSV and Parquet, and the fields picked from them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from lightning_cl.core.imports import require

__all__ = ["class_labels", "read_rows", "row_values"]

Row = dict[str, Any] | list[Any]


def read_rows(path: str | Path, field: str | list[str] | None = None) -> list[Row]:
    """Return the rows of a file, dicts or lists.

    Args:
        path: A ``.json``, ``.jsonl``, ``.ndjson``, ``.csv``, ``.tsv`` or ``.parquet`` file.
        field: Key or keys of a JSON object whose lists of rows are joined; ``None`` if the file is one list.

    Raises:
        ValueError: If the format is not known, ``field`` does not lead to a list, or there is no row.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`path` must be an existing file, got '{path}'.")
    suffix = path.suffix.lower()
    if field is not None and suffix != ".json":
        raise ValueError(f"`field={field!r}` picks a key of a .json file, but '{path.name}' is none; leave it out.")
    rows: Any
    if suffix == ".json":
        rows = _read_json(path, field)
    elif suffix in (".jsonl", ".ndjson"):
        rows = _json_lines(path.read_text(encoding="utf-8"))
    elif suffix in (".csv", ".tsv"):
        # utf-8-sig, because spreadsheets put a byte-order mark before the header
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, delimiter="," if suffix == ".csv" else "\t"))
    elif suffix == ".parquet":
        rows = require("datasets", extra="llm").Dataset.from_parquet(str(path)).to_list()
    else:
        raise ValueError(f"'{path.name}' is no .json, .jsonl, .ndjson, .csv, .tsv or .parquet file; convert it.")
    if not rows:
        raise ValueError(f"'{path.name}' holds no row" + (f" in {field!r}." if field else "."))
    return list(rows)


def row_values(rows: list[Row], key: str | int, position: int | None, setting: str) -> list[Any]:
    """Return one value of each row.

    Args:
        rows: What :func:`read_rows` returned.
        key: Key for rows that are dicts, position for rows that are lists.
        position: Position in rows that are lists when ``key`` is a name; ``None`` if there is no usual one.
        setting: Name of the setting that ``key`` comes from, for messages.

    Raises:
        ValueError: If a row lacks the value.
    """
    if isinstance(rows[0], list) and isinstance(key, str):
        if position is None:
            raise ValueError(f"Rows are lists: `{setting}` must be a position, got {key!r}.")
        key = position
    values = []
    for number, row in enumerate(rows):
        try:
            value = row[key]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            value = None
        if value is None:
            has = f"keys {sorted(row)}" if isinstance(row, dict) else f"{row!r:.80}"
            raise ValueError(f"`{setting}={key!r}` is missing in row {number}, which has {has}.")
        values.append(value)
    return values


def class_labels(
    values: list[Any], names: list[str] | None, known: list[Any] | None = None
) -> tuple[np.ndarray, list[str] | None]:
    """Return int64 labels and the names they stand for.

    Numbers (in a CSV file: text of digits) are labels as they are; other text is numbered by ``names``, or by its
    place in the sorted set of ``known``.

    Args:
        values: Label of each row.
        names: The label set in its order; ``None`` to compute it.
        known: Labels that define the label set; those of the rows if ``None``.

    Raises:
        ValueError: If a label is not in the label set, or is neither an integer nor text.
    """
    wrong = next((value for value in values if isinstance(value, bool) or not isinstance(value, (int, str))), None)
    if wrong is not None:
        raise ValueError(f"Labels must be integers or text, got {wrong!r}.")
    if names is None:
        domain = values if known is None else known
        if all(isinstance(value, int) or value.isdecimal() for value in domain):
            if all(isinstance(value, int) or value.isdecimal() for value in values):
                return np.asarray([int(value) for value in values], dtype=np.int64), None
            names = sorted({str(value) for value in domain}, key=int)
        else:
            names = sorted({str(value) for value in domain})
    if len(set(names)) < len(names):
        raise ValueError(f"`label_names` must hold each name once, got {len(names) - len(set(names))} repetitions.")
    number_of = {name: number for number, name in enumerate(names)}
    unknown = sorted({str(value) for value in values} - set(number_of))
    if unknown:
        raise ValueError(
            f"{len(unknown)} labels are not in the label set of {len(names)} names: {unknown[:5]}. Add them to"
            " `label_names`, take the label set from more rows (`label_field`, `label_path`), or drop their rows."
        )
    return np.asarray([number_of[str(value)] for value in values], dtype=np.int64), list(names)


def _read_json(path: Path, field: str | list[str] | None) -> list[Row]:
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise ValueError(f"'{path.name}' is no valid JSON: {error}.") from None
        content = _json_lines(text)
    if isinstance(content, dict):
        fields = [field] if isinstance(field, str) else field
        lists = sorted(key for key, value in content.items() if isinstance(value, list))
        if fields is None or not set(fields) <= set(lists):
            raise ValueError(f"`field` must name lists of rows in '{path.name}', got {field!r}; it has {lists}.")
        return [row for key in fields for row in content[key]]
    if field is not None:
        raise ValueError(f"`field={field!r}` picks a key, but '{path.name}' is a plain list of rows; leave it out.")
    if not isinstance(content, list):
        raise ValueError(f"'{path.name}' must hold a list of rows, or an object of such lists.")
    return content


def _json_lines(text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"Line {number} is no valid JSON: {error}.") from None
    return rows
