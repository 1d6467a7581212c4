"""Which callbacks have something to say at a hook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_cl.core.callback import ContinualCallback

__all__ = ["overriding"]


def overriding(callbacks: Sequence[ContinualCallback], hook: str) -> list[ContinualCallback]:
    """Return the callbacks whose class defines ``hook``, so that the others cost nothing."""
    from lightning_cl.core.callback import ContinualCallback

    return [c for c in callbacks if getattr(type(c), hook) is not getattr(ContinualCallback, hook)]
