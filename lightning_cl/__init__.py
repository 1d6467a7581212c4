"""Continual learning and unlearning as callbacks and mixins for PyTorch Lightning."""

from lightning_cl.__about__ import __version__
from lightning_cl.callbacks import EWC, ContinualEvaluation, ContinualMetrics, ExperienceReplay, TaskProgressBar
from lightning_cl.core import ContinualCallback, Task
from lightning_cl.datamodules import TaskStreamDataModule
from lightning_cl.mixins import MaskedHead
from lightning_cl.strategies import FSDP2Strategy

__all__ = [
    "EWC",
    "ContinualCallback",
    "ContinualEvaluation",
    "ContinualMetrics",
    "ExperienceReplay",
    "FSDP2Strategy",
    "MaskedHead",
    "Task",
    "TaskProgressBar",
    "TaskStreamDataModule",
    "__version__",
]
