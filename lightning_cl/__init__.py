"""Continual learning and unlearning as callbacks and mixins for PyTorch Lightning."""

from lightning_cl.__about__ import __version__
from lightning_cl.callbacks import (
    AGEM,
    EWC,
    GEM,
    MAS,
    SI,
    ComponentClip,
    ContinualEvaluation,
    ContinualMetrics,
    ExperienceReplay,
    FeatureDistillation,
    FreezeExcept,
    GradientMask,
    GradientProjection,
    HalfFineTuning,
    L2Anchor,
    LwF,
    MomentumInterpolation,
    RWalk,
    SalientLayers,
    SingularSubspaceProjection,
    SoftMask,
    TaskProgressBar,
)
from lightning_cl.core import ContinualCallback, Task
from lightning_cl.datamodules import TaskStreamDataModule
from lightning_cl.mixins import MaskedHead
from lightning_cl.strategies import FSDP2Strategy

__all__ = [
    "AGEM",
    "EWC",
    "GEM",
    "MAS",
    "SI",
    "ComponentClip",
    "ContinualCallback",
    "ContinualEvaluation",
    "ContinualMetrics",
    "ExperienceReplay",
    "FSDP2Strategy",
    "FeatureDistillation",
    "FreezeExcept",
    "GradientMask",
    "GradientProjection",
    "HalfFineTuning",
    "L2Anchor",
    "LwF",
    "MaskedHead",
    "MomentumInterpolation",
    "RWalk",
    "SalientLayers",
    "SingularSubspaceProjection",
    "SoftMask",
    "Task",
    "TaskProgressBar",
    "TaskStreamDataModule",
    "__version__",
]
