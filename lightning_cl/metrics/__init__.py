"""Continual-learning metrics over the accuracy matrix ``R[t, i]``, the score on task ``i`` after task ``t``."""

from lightning_cl.metrics.functional import (
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forgetting_per_task,
    forward_transfer,
    intransigence,
    learning_accuracy,
    min_accuracy,
    windowed_forgetting,
    windowed_plasticity,
    worst_case_accuracy,
)

__all__ = [
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "forgetting",
    "forgetting_per_task",
    "forward_transfer",
    "intransigence",
    "learning_accuracy",
    "min_accuracy",
    "windowed_forgetting",
    "windowed_plasticity",
    "worst_case_accuracy",
]
