"""Recall schedules: which of the samples in a memory come back, and when."""

from lightning_cl.memory.recall.base import LocalSamples, Recall
from lightning_cl.memory.recall.chances import distinct, weighted
from lightning_cl.memory.recall.collateral import Collateral
from lightning_cl.memory.recall.power_law import PowerLaw
from lightning_cl.memory.recall.task_uniform import TaskUniform
from lightning_cl.memory.recall.uniform import Uniform
from lightning_cl.memory.recall.view_batch import ViewBatch

__all__ = [
    "Collateral",
    "LocalSamples",
    "PowerLaw",
    "Recall",
    "TaskUniform",
    "Uniform",
    "ViewBatch",
    "distinct",
    "weighted",
]
