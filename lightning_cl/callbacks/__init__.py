"""Methods and measurements as Lightning callbacks."""

from lightning_cl.callbacks.evaluation import ContinualEvaluation
from lightning_cl.callbacks.ewc import EWC
from lightning_cl.callbacks.metrics import ContinualMetrics
from lightning_cl.callbacks.progress import TaskProgressBar
from lightning_cl.callbacks.replay import ExperienceReplay

__all__ = ["EWC", "ContinualEvaluation", "ContinualMetrics", "ExperienceReplay", "TaskProgressBar"]
