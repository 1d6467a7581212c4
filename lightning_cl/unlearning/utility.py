"""A floor under what a model retains, where a request must end before the model is destroyed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_cl.core.checks import check_positive

__all__ = ["UtilityFloor"]


class UtilityFloor:
    """Looks at the mean probability of retained samples from time to time, and says when it has fallen too far.

    Args:
        share: Of the probability at the request's start, above 0 and below 1; ``None`` never looks.
        every: Optimizer steps between two looks, at least 1.

    Raises:
        ValueError: For a setting out of range.

    Example:
        >>> floor = UtilityFloor(0.5, every=10)
        >>> floor.start(lambda: 0.8)
        >>> floor.look(10, lambda: 0.5), floor.look(15, lambda: 0.1)
        (None, None)
        >>> floor.look(20, lambda: 0.3)
        'after 20 steps the mean probability of retained samples had fallen to 0.3, below 0.5 of 0.8'
    """

    def __init__(self, share: float | None, every: int) -> None:
        check_positive("utility_every", every)
        if share is not None and not 0 < share < 1:
            raise ValueError(f"`utility_floor` must be above 0 and below 1, got {share!r}.")
        self._share = share
        self._every = every
        self._at_start: float | None = None
        # the same step comes several times under accumulation
        self._looked_at = 0

    def start(self, measure: Callable[[], float]) -> None:
        """Begin a request."""
        self._looked_at = 0
        self._at_start = None if self._share is None else measure()

    def look(self, steps: int, measure: Callable[[], float], *, last: bool = False) -> str | None:
        """Return why the request must end after so many optimizer steps, ``None`` if it need not.

        After its ``last`` step there is always a look: a short request may have had none before.
        """
        due = self._share is not None and (last or steps % self._every == 0) and steps != self._looked_at
        if not due or self._at_start is None or self._share is None:
            return None
        self._looked_at = steps
        utility = measure()
        if utility >= self._share * self._at_start:
            return None
        fallen = f"had fallen to {utility:.3g}, below {self._share} of {self._at_start:.3g}"
        if last:
            rank_zero_warn(f"A request ended, and the utility {fallen}. Look more often: lower `utility_every`.")
        return f"after {steps} steps the mean probability of retained samples {fallen}"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs."""
        return {"at_start": self._at_start, "looked_at": self._looked_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` returned."""
        self._at_start, self._looked_at = state["at_start"], state["looked_at"]
