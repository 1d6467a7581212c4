"""Unlearning: requests to forget, served in sequence with learning."""

from lightning_cl.unlearning.forget_loss import ForgetLoss, Outputs
from lightning_cl.unlearning.ledger import Ledger, RequestRecord
from lightning_cl.unlearning.losses import (
    CEU,
    DPO,
    NPO,
    PDU,
    RMU,
    ULD,
    UNDIAL,
    WGA,
    GradientAscent,
    MaximumEntropy,
    RandomLabel,
    SatImp,
    SimNPO,
)
from lightning_cl.unlearning.probing import LayerProbe, linear_probe, probe_layers
from lightning_cl.unlearning.relearning import Relearning, relearning_attack
from lightning_cl.unlearning.request_callback import RequestCallback, RequestSettings
from lightning_cl.unlearning.ssd import SelectiveSynapticDampening, dampen_
from lightning_cl.unlearning.task_vector import TaskVectorNegation, negate_task_vector_
from lightning_cl.unlearning.unlearn import Unlearn

__all__ = [
    "CEU",
    "DPO",
    "NPO",
    "PDU",
    "RMU",
    "ULD",
    "UNDIAL",
    "WGA",
    "ForgetLoss",
    "GradientAscent",
    "LayerProbe",
    "Ledger",
    "MaximumEntropy",
    "Outputs",
    "RandomLabel",
    "Relearning",
    "RequestCallback",
    "RequestRecord",
    "RequestSettings",
    "SatImp",
    "SelectiveSynapticDampening",
    "SimNPO",
    "TaskVectorNegation",
    "Unlearn",
    "dampen_",
    "linear_probe",
    "negate_task_vector_",
    "probe_layers",
    "relearning_attack",
]
