"""How long ranks wait for each other, and what they say when they have waited in vain."""

from __future__ import annotations

import re
from datetime import timedelta

from torch.distributed.constants import default_pg_nccl_timeout, default_pg_timeout
from torch.distributed.distributed_c10d import _world

__all__ = ["explain_lost_rank", "limit_waiting"]

# what gloo and nccl say of a rank that is gone, hangs, or is behind a cut link
_LOST = re.compile(
    r"Timed out waiting \d+ms|Application timeout|Connection (reset|closed) by peer|Broken pipe|Connection timed out"
    r"|Watchdog caught collective operation timeout|NCCL communicator was aborted|ncclRemoteError"
)


def limit_waiting(timeout: timedelta) -> None:
    """Give ``timeout`` to the groups of this process that still have torch's own.

    Those of a device mesh do, half an hour or ten minutes, whatever the timeout of the default group is.
    """
    for group in list(_world.pg_map):
        for device in group._device_types:
            backend = group._get_backend(device)
            # torch's fake group, on which runs are planned, has no options
            if backend.options and backend.options._timeout in (default_pg_timeout, default_pg_nccl_timeout):
                backend._set_default_timeout(timeout)


def explain_lost_rank(error: BaseException, rank: int, timeout: timedelta) -> None:
    """Add to the message of an error that a lost rank caused what that means and where to look.

    Args:
        error: Changed in place. An error of another cause stays as it is.
        rank: The rank that reports.
        timeout: How long it may have waited.
    """
    if not isinstance(error, RuntimeError) or _LOST.search(str(error)) is None:
        return
    error.args = (
        f"{error}\nRank {rank} lost another rank, which has failed or hangs, or the network between them is cut. Look"
        " for the first error in the logs of all nodes. A rank that does not answer is waited for"
        f" {timeout.total_seconds():g} s (`FSDP2Strategy(timeout=...)`). Start again with `ckpt_path='last'`.",
    )
