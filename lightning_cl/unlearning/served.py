"""Whether the data of a fit still mean what the ledger of requests says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_cl.core.requests import RequestStream
from lightning_cl.unlearning.digest import digest_of_samples
from lightning_cl.unlearning.ledger import Ledger, hash_of_ids

__all__ = ["check_served", "hash_of_samples", "of_rank_zero"]

T = TypeVar("T")


def check_served(
    trainer: Trainer,
    stream: RequestStream,
    ledger: Ledger,
    running: Mapping[str, Any] | None,
    erased: Sequence[str],
) -> dict[str, Tensor]:
    """Check that what was forgotten is left out: a request that the stream names still means the same samples.

    All ranks must call this.

    Args:
        trainer: The Trainer.
        stream: The stream of the fit.
        ledger: The requests that were served.
        running: The request that a resumed fit goes on with: its ``name``, ``ids`` and ``samples_hash``.
        erased: Names of served requests whose samples are placeholders now.

    Returns:
        The identities of the samples of each served request that the stream names, but those erased.

    Raises:
        ValueError: If a named request means other samples now; if one that is not named has its samples in the data; if
            a name that is erased was not served.
    """
    if unknown := [name for name in erased if ledger.find(name) is None]:
        raise ValueError(f"`erased` names {unknown}, which are not among the requests that were served.")
    named = {task.name: stream.forgotten_ids(task) for task in stream.tasks if task.kind == "forget"}
    records = ledger.records
    known = [(r.name, torch.tensor(r.ids, dtype=torch.int64), r.ids_hash, r.samples_hash) for r in records]
    if running is not None:
        known.append((running["name"], running["ids"], hash_of_ids(running["ids"]), running["samples_hash"]))
    for name, forgotten, ids_hash, samples_hash in known:
        ids = named.get(name)
        if ids is None:
            if name not in erased and hash_of_samples(trainer, stream, forgotten) == samples_hash:
                raise ValueError(
                    f"Request {name!r} was served, and the data still hold its samples in their rows, but the"
                    " stream does not name it: it would learn or retain them. Keep the request in `requests`."
                )
            continue
        same = hash_of_ids(ids) == ids_hash if name in erased else hash_of_samples(trainer, stream, ids) == samples_hash
        if not same:
            raise ValueError(
                f"Request {name!r} was served for other samples ({len(forgotten)}) than the data hold in the rows"
                f" that it names now ({len(ids)}). If rows were deleted or moved, put them back; of samples that"
                " were erased keep the rows, with placeholders, and name the request in `erased`, or, in a run that"
                " does not go on from a checkpoint, take it out of `requests`. Give a new request a name of its own."
            )
    return {record.name: named[record.name] for record in records if record.name in named.keys() - set(erased)}


def hash_of_samples(trainer: Trainer, stream: RequestStream, ids: Tensor) -> str:
    """Return the digest of the content of samples; all ranks must call this, and one reads them."""
    return of_rank_zero(trainer, lambda: digest_of_samples(stream.read_raw(ids)))


def of_rank_zero(trainer: Trainer, read: Callable[[], T]) -> T:
    """Return on all ranks what ``read`` returns on rank 0; an error there is an error of all, so that none waits.

    Raises:
        RuntimeError: On the other ranks, if ``read`` raised; on rank 0 it is that error.
    """
    found: T | None = None
    error: Exception | None = None
    if trainer.is_global_zero:
        try:
            found = read()
        except Exception as caught:
            error = caught
    message = None if error is None else f"{type(error).__name__}: {error}"
    found, message = trainer.strategy.broadcast((found, message))
    if error is not None:
        raise error
    if message is not None:
        raise RuntimeError(f"Rank 0 failed: {message}")
    return found  # type: ignore[return-value]
