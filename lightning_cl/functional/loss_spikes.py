r"""How far a training loss stands out from those before it (Hampel 1974, Journal of the ASA 69, 383-393)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

__all__ = ["loss_deviation"]

# of a normal distribution, the standard deviation over the median absolute deviation
_NORMAL = 1.4826
# of the median: losses that hardly differ make no spike of one that differs by little
_LEAST_SCALE = 0.01


def loss_deviation(loss: float, history: Sequence[float]) -> float:
    r"""Return by how many robust standard deviations a loss lies above the losses :math:`H` before it.

    .. math:: z = \frac{L - \operatorname{med} H}
        {\max(1.4826 \operatorname{med} |H - \operatorname{med} H|, \; 0.01 \, |\operatorname{med} H|)}.

    Median and median absolute deviation hold their ground while less than half of the history are spikes themselves; of
    a mean and a standard deviation one spike in the history hides the next.

    Args:
        loss: :math:`L`.
        history: :math:`H`, finite losses, at least one.

    Returns:
        :math:`z`, below zero for a low loss; infinity for a loss that is not finite.

    Example:
        >>> losses = [2.0, 2.1, 1.9, 2.0, 2.2, 50.0]
        >>> [round(loss_deviation(loss, losses), 1) for loss in (2.1, 3.0, float("nan"))]
        [0.3, 6.4, inf]
    """
    if not math.isfinite(loss):
        return math.inf
    middle = median(history)
    scale = max(_NORMAL * median([abs(value - middle) for value in history]), _LEAST_SCALE * abs(middle))
    if scale == 0.0:
        return math.copysign(math.inf, loss - middle) if loss != middle else 0.0
    return (loss - middle) / scale
