"""How ranks stay together while they read or write a checkpoint: an error of one is an error of all, never a hang."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

__all__ = ["cpu_group", "on_all_ranks", "together"]

T = TypeVar("T")

_groups: dict[str, WeakKeyDictionary[ProcessGroup, ProcessGroup]] = {
    "foreground": WeakKeyDictionary(),
    "background": WeakKeyDictionary(),
}

# errors that keep their kind on the way to the user; every other one becomes a RuntimeError
_KINDS: dict[str, type[Exception]] = {"FileNotFoundError": FileNotFoundError, "ValueError": ValueError}


def cpu_group(purpose: Literal["foreground", "background"]) -> ProcessGroup:
    """Return a gloo group of all ranks, apart from the groups that train, with the timeout of the default group.

    It is made at the first call, which all ranks must make together.

    Args:
        purpose: ``"background"`` for what runs in another thread: two threads must not share a group.

    Raises:
        RuntimeError: Without a process group.
    """
    world = dist.group.WORLD
    if world is None:
        raise RuntimeError(
            "a sharded checkpoint needs a process group: call torch.distributed.init_process_group first"
        )
    groups = _groups[purpose]
    if world not in groups:
        # a new group would otherwise wait its own default time, half an hour
        timeout = world._get_backend(world._device_types[0]).options._timeout
        groups[world] = dist.new_group(backend="gloo", timeout=timeout)
    return groups[world]


def on_all_ranks(step: Callable[[], T], group: ProcessGroup, explain: Callable[[str], str] = str) -> list[T]:
    """Run ``step`` on every rank and return what it returned on each, in rank order.

    Args:
        step: What this rank does; its result is pickled. It makes no collective call.
        group: A CPU group.
        explain: Turns the errors of the ranks into the message for the user.

    Raises:
        Exception: On every rank if ``step`` raised on any: ``FileNotFoundError`` and ``ValueError`` as such, all others
            as ``RuntimeError``.
    """
    result: T | None = None
    error: Exception | None = None
    try:
        result = step()
    except Exception as caught:
        error = caught
    mine = None if error is None else (type(error).__name__, str(error))
    outcomes: list[tuple[tuple[str, str] | None, T]] = [None] * group.size()  # type: ignore[list-item]
    dist.all_gather_object(outcomes, (mine, result), group=group)
    failures = {rank: failure for rank, (failure, _) in enumerate(outcomes) if failure is not None}
    if failures:
        raise _joined(failures, explain) from error
    return [result for _, result in outcomes]


def together(collective: Callable[[], None], explain: Callable[[str], str]) -> None:
    """Run a collective of :mod:`torch.distributed.checkpoint`, and turn its errors into those of :func:`on_all_ranks`.

    Raises:
        RuntimeError: On every rank if any failed, or if the ranks lost each other.
    """
    try:
        collective()
    except CheckpointException as error:  # not an Exception, and the same on all ranks
        failures = {rank: (type(cause).__name__, str(cause)) for rank, (cause, _) in error.failures.items()}
        raise _joined(failures, explain) from error
    except Exception as error:
        raise RuntimeError(explain(f"{type(error).__name__}: {error}")) from error


def _joined(failures: Mapping[int, tuple[str, str]], explain: Callable[[str], str]) -> Exception:
    """Return one error for those of several ranks, each said once."""
    ranks: dict[tuple[str, str], list[int]] = {}
    for rank, failure in failures.items():
        ranks.setdefault(failure, []).append(rank)
    kind = next((_KINDS[name] for name, _ in ranks if name in _KINDS), RuntimeError)
    lines = []
    for (name, text), where in ranks.items():
        whose = f"rank {where[0]}" if len(where) == 1 else f"ranks {', '.join(map(str, where))}"
        lines.append(f"{text} ({whose})" if name in _KINDS else f"{name}: {text} ({whose})")
    return kind(explain("; ".join(lines)))
