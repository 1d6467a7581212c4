"""The ledger: what was asked to be forgotten, what was done about it, and with what result."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from lightning_cl.core.requests import Influence

__all__ = ["Ledger", "RequestRecord", "hash_of_ids", "moment"]


def moment() -> str:
    """Return the present moment as a record has it, in ISO 8601 and UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def hash_of_ids(sample_ids: Tensor) -> str:
    """Return the SHA-256 of a set of identities: of their ascending little-endian int64 bytes, in hexadecimal.

    Example:
        >>> import torch
        >>> hash_of_ids(torch.tensor([5, 2])) == hash_of_ids(torch.tensor([2, 5]))
        True
    """
    return hashlib.sha256(np.unique(sample_ids.numpy()).astype("<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class RequestRecord:
    """One request that was served.

    Args:
        name: Name of the request.
        asked: Samples that the request named, also those that were not learned or forgotten before.
        ids: Identities of the samples that were forgotten; empty where the user's own loaders gave none.
        ids_hash: Of :func:`hash_of_ids`; ``""`` where there are no identities.
        samples_hash: Of :func:`~lightning_cl.unlearning.digest.digest_of_samples`, of what the forgotten samples held;
            ``""`` where there are no identities.
        method: Card name or class of the method.
        settings: Its settings.
        seed: Seed of what it drew.
        reference_hash: Digest of the weights it was held against, ``None`` if it needed none.
        weights_hash: Digest of the trained weights after the request.
        started: When it began, ISO 8601 in UTC.
        ended: When it ended.
        steps: Optimizer steps.
        stopped: Why it ended before its last step, ``None`` if it did not.
        before: Measurements before it, by name; NaN, or infinite until it is written, where there was no number.
        after: The same after it.
        influences: What became of the state of other callbacks.
        previous: Hash of the record before it, ``""`` for the first: a record that is changed later breaks the chain.
    """

    name: str
    asked: int
    ids: list[int]
    ids_hash: str
    samples_hash: str
    method: str
    settings: dict[str, Any]
    seed: int
    reference_hash: str | None
    weights_hash: str
    started: str
    ended: str
    steps: int
    stopped: str | None
    before: dict[str, float]
    after: dict[str, float]
    influences: list[Influence] = field(default_factory=list)
    previous: str = ""

    @property
    def num_ids(self) -> int:
        """Samples that were forgotten, 0 where the user's own loaders gave no identities."""
        return len(self.ids)

    @property
    def hash(self) -> str:
        """SHA-256 of the record's JSON, in hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Return the record as one line of JSON, with sorted keys and null for a measurement that is no number."""
        values = asdict(self)
        for name in ("before", "after"):
            values[name] = {key: value if math.isfinite(value) else None for key, value in values[name].items()}
        return json.dumps(values, sort_keys=True, ensure_ascii=False, allow_nan=False)

    @staticmethod
    def from_json(line: str) -> RequestRecord:
        """Return the record of a line.

        Raises:
            ValueError: If the line is no record.
        """
        try:
            values = json.loads(line)
            for name in ("before", "after"):
                values[name] = {key: math.nan if value is None else value for key, value in values[name].items()}
            values["influences"] = [Influence(**influence) for influence in values["influences"]]
            return RequestRecord(**values)
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"No record of a request: {line[:80]!r} ({error}).") from None


class Ledger:
    """Records of requests in the order in which they were served; records are appended and never changed.

    Example:
        >>> ledger = Ledger()
        >>> len(ledger), ledger.last_hash
        (0, '')
    """

    def __init__(self, records: Sequence[RequestRecord] = ()) -> None:
        self._records: tuple[RequestRecord, ...] = ()
        for record in records:
            self.append(record)

    def __len__(self) -> int:
        return len(self._records)

    @property
    def records(self) -> tuple[RequestRecord, ...]:
        """The records, first to last."""
        return self._records

    @property
    def last_hash(self) -> str:
        """Hash of the last record, which the next one must name; ``""`` if there is none."""
        return self._records[-1].hash if self._records else ""

    def append(self, record: RequestRecord) -> None:
        """Add a record.

        Raises:
            ValueError: If it does not follow the last one, or its name was served.
        """
        if record.previous != self.last_hash:
            raise ValueError(
                f"The record of request {record.name!r} does not follow the one before it: the ledger was changed, or"
                " lines of it are missing."
            )
        if self.find(record.name) is not None:
            raise ValueError(f"Request {record.name!r} was served before, and is not served twice.")
        self._records = (*self._records, record)

    def find(self, name: str) -> RequestRecord | None:
        """Return the record of a request, ``None`` if it was not served."""
        return next((record for record in self._records if record.name == name), None)

    def write(self, path: Path) -> None:
        """Append to a file of JSON Lines what it lacks of the records; no line of it is changed."""
        lines = set(_lines_of(path)) if path.exists() else set()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in (r.to_json() for r in self._records) if line not in lines)

    def starts(self, other: Ledger) -> bool:
        """Return whether another ledger holds all records of this one, in their places."""
        # as lines, because a measurement that is no number equals nothing
        mine, theirs = ([record.to_json() for record in ledger._records] for ledger in (self, other))
        return mine == theirs[: len(mine)]

    def check_written(self, path: str | Path, source: str) -> Ledger:
        """Return the ledger in a file, which has all of these records in their places, and may go on.

        It goes on if the run went on from an earlier checkpoint, or died after a request and before the next one.

        Args:
            path: The file; without it the records are returned as they are, for they are to be written there.
            source: What holds these records, for the error.

        Raises:
            ValueError: If the file lacks the last of the records, or holds others.
        """
        if not Path(path).exists():
            return self
        written = Ledger.read(path)
        if written.starts(self) and len(written) < len(self):
            missing = ", ".join(repr(record.name) for record in self.records[len(written) :])
            raise ValueError(
                f"The ledger {str(path)!r} lacks the last records that {source} has, of {missing}: they were taken out,"
                " or not written by a run that died. Put back the whole file; or move it away, and it is written anew"
                f" from {source}."
            )
        if not self.starts(written):
            raise ValueError(
                f"The ledger {str(path)!r} holds records of another run, or changed ones: they are not those that"
                f" {source} has. Put back the file of this run, name another one, or go on from a checkpoint of that"
                " run."
            )
        return written

    @staticmethod
    def read(path: str | Path) -> Ledger:
        """Return the ledger in a file of JSON Lines.

        A record that follows an earlier one than the last takes the place of those between: the run went on from a
        checkpoint written before them, and has forgotten anew what they say.

        Raises:
            ValueError: If a line is no record, or follows none.
        """
        records: list[RequestRecord] = []
        for record in (RequestRecord.from_json(line) for line in _lines_of(Path(path)) if line):
            known = ["", *(earlier.hash for earlier in records)]
            records = (
                [*records[: known.index(record.previous)], record] if record.previous in known else [*records, record]
            )
        return Ledger(records)


def _lines_of(path: Path) -> list[str]:
    # a name may hold what `splitlines` takes for the end of a line
    return path.read_text(encoding="utf-8").split("\n")
