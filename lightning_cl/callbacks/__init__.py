"""Methods and measurements as Lightning callbacks."""

from lightning_cl.callbacks.agem import AGEM
from lightning_cl.callbacks.component_clip import ComponentClip
from lightning_cl.callbacks.der import DER
from lightning_cl.callbacks.derpp import DERPP
from lightning_cl.callbacks.erace import ERACE
from lightning_cl.callbacks.evaluation import ContinualEvaluation
from lightning_cl.callbacks.ewc import EWC
from lightning_cl.callbacks.feature_distillation import FeatureDistillation
from lightning_cl.callbacks.freeze_except import FreezeExcept
from lightning_cl.callbacks.gem import GEM
from lightning_cl.callbacks.gradient_mask import GradientMask
from lightning_cl.callbacks.gradient_projection import GradientProjection
from lightning_cl.callbacks.half_fine_tuning import HalfFineTuning
from lightning_cl.callbacks.icarl import ICaRL
from lightning_cl.callbacks.ilora import ILoRA
from lightning_cl.callbacks.judges import ExactMatch
from lightning_cl.callbacks.l2_anchor import L2Anchor
from lightning_cl.callbacks.lwf import LwF
from lightning_cl.callbacks.mas import MAS
from lightning_cl.callbacks.memory import ReplayMemory
from lightning_cl.callbacks.mer import MER
from lightning_cl.callbacks.metrics import ContinualMetrics
from lightning_cl.callbacks.mir import MIR
from lightning_cl.callbacks.momentum_interpolation import MomentumInterpolation
from lightning_cl.callbacks.pcr import PCR
from lightning_cl.callbacks.progress import TaskProgressBar
from lightning_cl.callbacks.replay import ExperienceReplay
from lightning_cl.callbacks.reptile import Reptile
from lightning_cl.callbacks.rewarm import Rewarm
from lightning_cl.callbacks.rwalk import RWalk
from lightning_cl.callbacks.salient_layers import SalientLayers
from lightning_cl.callbacks.self_rehearsal import SelfRehearsal
from lightning_cl.callbacks.si import SI
from lightning_cl.callbacks.singular_subspaces import SingularSubspaceProjection
from lightning_cl.callbacks.soft_mask import SoftMask
from lightning_cl.callbacks.spike_aware import SpikeAware
from lightning_cl.callbacks.spike_monitor import SpikeMonitor
from lightning_cl.callbacks.stored_samples import StoredSamples

__all__ = [
    "AGEM",
    "DER",
    "DERPP",
    "ERACE",
    "EWC",
    "GEM",
    "MAS",
    "MER",
    "MIR",
    "PCR",
    "SI",
    "ComponentClip",
    "ContinualEvaluation",
    "ContinualMetrics",
    "ExactMatch",
    "ExperienceReplay",
    "FeatureDistillation",
    "FreezeExcept",
    "GradientMask",
    "GradientProjection",
    "HalfFineTuning",
    "ICaRL",
    "ILoRA",
    "L2Anchor",
    "LwF",
    "MomentumInterpolation",
    "RWalk",
    "ReplayMemory",
    "Reptile",
    "Rewarm",
    "SalientLayers",
    "SelfRehearsal",
    "SingularSubspaceProjection",
    "SoftMask",
    "SpikeAware",
    "SpikeMonitor",
    "StoredSamples",
    "TaskProgressBar",
]
