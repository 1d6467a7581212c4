"""Forget losses, one method per file."""

from lightning_cl.unlearning.losses.ceu import CEU
from lightning_cl.unlearning.losses.dpo import DPO
from lightning_cl.unlearning.losses.gradient_ascent import GradientAscent
from lightning_cl.unlearning.losses.max_entropy import MaximumEntropy
from lightning_cl.unlearning.losses.npo import NPO
from lightning_cl.unlearning.losses.pdu import PDU
from lightning_cl.unlearning.losses.random_label import RandomLabel
from lightning_cl.unlearning.losses.rmu import RMU
from lightning_cl.unlearning.losses.satimp import SatImp
from lightning_cl.unlearning.losses.simnpo import SimNPO
from lightning_cl.unlearning.losses.uld import ULD
from lightning_cl.unlearning.losses.undial import UNDIAL
from lightning_cl.unlearning.losses.wga import WGA

__all__ = [
    "CEU",
    "DPO",
    "NPO",
    "PDU",
    "RMU",
    "ULD",
    "UNDIAL",
    "WGA",
    "GradientAscent",
    "MaximumEntropy",
    "RandomLabel",
    "SatImp",
    "SimNPO",
]
