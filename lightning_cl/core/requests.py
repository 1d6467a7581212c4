"""Requests to forget: what they ask for, what a stream that has some offers, what became of a callback's state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from lightning_cl.core.task import Task

__all__ = ["ForgetRequest", "Influence", "RequestStream"]


@dataclass(frozen=True)
class ForgetRequest:
    """A request to forget samples of the training data.

    Of ``rows``, ``classes`` and ``where`` exactly one says which samples.

    Args:
        name: A short name, unique among the requests of a model's life: one that was served is not served again.
        rows: Rows of the training data.
        classes: Labels: all samples of these classes.
        where: Values of a column, such as ``{"author": ["Ada", "Bo"]}``: all samples that have one of them. With
            several columns a sample must have one of the values in each.
        after: Learning tasks before the request; all of them if ``None``.
        epochs: Passes over the samples, at least 1; those of the stream's ``epochs_per_request`` if ``None``.

    Raises:
        ValueError: If the name is empty, or not exactly one of the three says what to forget.

    Example:
        >>> ForgetRequest("customer 17", where={"customer": [17]}, after=2).after
        2
    """

    name: str
    rows: list[int] | None = None
    classes: list[int] | None = None
    where: dict[str, list[Any]] | None = None
    after: int | None = None
    epochs: int | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("A request needs a `name`, by which it is known to have been served.")
        given = [kind for kind in ("rows", "classes", "where") if getattr(self, kind)]
        if len(given) != 1:
            raise ValueError(
                f"Request {self.name!r} must say what to forget by one of `rows`, `classes` and `where`, got"
                f" {given or 'none of them'}."
            )
        if self.after is not None and (isinstance(self.after, bool) or self.after < 1):
            raise ValueError(f"`after` of request {self.name!r} must be at least 1, got {self.after!r}.")
        if self.epochs is not None and (isinstance(self.epochs, bool) or self.epochs < 1):
            raise ValueError(f"`epochs` of request {self.name!r} must be at least 1, got {self.epochs!r}.")


@dataclass(frozen=True)
class Influence:
    """What became of the part of a callback's state that forgotten samples had a share in.

    Args:
        owner: The callback's class.
        state: What it keeps, in a few words.
        outcome: ``"removed"``, ``"recomputed"`` without the samples, or ``"remains"``, which still carries their
            influence.
        count: Entries removed or recomputed, over all ranks, where that is a number.
    """

    owner: str
    state: str
    outcome: Literal["removed", "recomputed", "remains"]
    count: int | None = None


@runtime_checkable
class RequestStream(Protocol):
    """What a stream with requests offers while it serves one."""

    @property
    def tasks(self) -> Sequence[Task]:
        """The tasks of the stream, in order."""

    def request_of(self, task: Task) -> ForgetRequest:
        """Return the request that a task of the kind ``"forget"`` serves."""

    def forgotten_ids(self, task: Task) -> Tensor:
        """Return the identities that the request of ``task`` names, int64 [n], ascending."""

    def retained_ids(self, task: Task) -> Tensor:
        """Return the identities learned before ``task`` and not forgotten since, int64 [n], ascending."""

    def read_samples(self, sample_ids: Tensor, batch_size: int | None = None) -> Iterator[tuple[Any, Tensor]]:
        """Read samples of the training data in order, each once over all ranks, with identities.

        Args:
            sample_ids: Identities, int64 [n]; the same on all ranks.
            batch_size: Samples of a rank's batch; that of training if ``None``.
        """

    def read_raw(self, sample_ids: Tensor) -> Iterator[Any]:
        """Read samples of the training data one by one as the dataset gives them; of rows that it has not, none."""

    def requested(self, task: Task) -> int:
        """Return how many samples the request of ``task`` names, also those that were not learned."""

    def read_holdout(self, task: Task, n_samples: int) -> Iterator[tuple[Any, Tensor]]:
        """Read validation samples of the tasks learned before ``task``, each once over all ranks, with their rows.

        There are none without validation data.

        Args:
            task: The task that serves a request.
            n_samples: At most so many over all ranks, the same ones at every call.
        """
