"""All metrics of a stream at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from lightning_cl.metrics import functional

__all__ = ["summarise_matrix"]

_WINDOWS = (10, 100)
# in the unit of the score; all others are differences, which say better or worse
_AVERAGES = {
    "average_accuracy",
    "average_incremental_accuracy",
    "learning_accuracy",
    "min_accuracy",
    "worst_case_accuracy",
}


def summarise_matrix(
    R: Tensor,
    trained: list[list[int]],
    *,
    baseline: Tensor | None = None,
    joint: Tensor | None = None,
    curves: Tensor | None = None,
    task_of_evaluation: Tensor | None = None,
    lower_is_better: bool = False,
) -> dict[str, float]:
    """Return the metrics of :mod:`lightning_cl.metrics.functional` that the scores at hand allow, by their names.

    A metric whose scores were not measured is left out; one that is undefined so far is NaN.

    Args:
        R: Accuracy matrix [T, N], NaN where not evaluated.
        trained: What each row trained.
        baseline: Scores [N] of the module before the stream, for the forward transfer.
        joint: Scores [N] of a run on all tasks at once, for the intransigence.
        curves: Scores [E, N] of all evaluations during the stream, for the stability-gap family.
        task_of_evaluation: int64 [E], the row that was being learned at each.
        lower_is_better: The scores are losses or perplexities. Forgetting is then their rise, and transfer is positive
            where it helps, as ever; averages are in the unit of the score.

    Example:
        >>> import torch
        >>> summary = summarise_matrix(torch.tensor([[0.9, float("nan")], [0.5, 0.8]]), [[0], [1]])
        >>> {name: round(value, 2) for name, value in summary.items()}["forgetting"]
        0.4
    """
    if lower_is_better:
        summary = summarise_matrix(
            -R,
            trained,
            baseline=None if baseline is None else -baseline,
            joint=None if joint is None else -joint,
            curves=None if curves is None else -curves,
            task_of_evaluation=task_of_evaluation,
        )
        return {name: -value if name in _AVERAGES else value for name, value in summary.items()}
    measures: dict[str, Callable[[], Tensor]] = {
        "average_accuracy": lambda: functional.average_accuracy(R, trained=trained),
        "average_incremental_accuracy": lambda: functional.average_incremental_accuracy(R, trained=trained),
        "forgetting": lambda: functional.forgetting(R, trained=trained),
        "backward_transfer": lambda: functional.backward_transfer(R, trained=trained),
        "learning_accuracy": lambda: functional.learning_accuracy(R, trained=trained),
    }
    if baseline is not None:
        measures["forward_transfer"] = lambda: functional.forward_transfer(R, baseline, trained=trained)
    if joint is not None:
        measures["intransigence"] = lambda: functional.intransigence(R, joint, trained=trained)
    if curves is not None and task_of_evaluation is not None:
        scores, tasks = curves, task_of_evaluation
        measures["min_accuracy"] = lambda: functional.min_accuracy(scores, tasks, trained=trained)
        measures["worst_case_accuracy"] = lambda: functional.worst_case_accuracy(scores, tasks, trained=trained)
        for window in _WINDOWS:
            measures[f"windowed_forgetting_{window}"] = partial(functional.windowed_forgetting, scores, window)
            measures[f"windowed_plasticity_{window}"] = partial(functional.windowed_plasticity, scores, window)
    summary = {}
    for name, measure in measures.items():
        try:
            summary[name] = float(measure())
        except ValueError:
            # a score it needs was not evaluated: `evaluate="current"`, or one loader without a stream
            continue
    return summary
