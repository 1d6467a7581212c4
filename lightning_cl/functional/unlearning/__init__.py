"""Losses of machine unlearning on plain tensors; what is supervised and how it is reduced stands in ``token_nll``."""

from lightning_cl.functional.unlearning.ceu import ceu_loss
from lightning_cl.functional.unlearning.dpo import dpo_loss
from lightning_cl.functional.unlearning.gradient_difference import Bound, grad_diff, gradient_ascent
from lightning_cl.functional.unlearning.gs_lora import (
    add_group_lasso_,
    bounded_cross_entropy,
    group_lasso,
    prototype_divergence,
    squared_norm,
)
from lightning_cl.functional.unlearning.kl_retain import RetainPositions, kl_retain
from lightning_cl.functional.unlearning.max_entropy import max_entropy_loss
from lightning_cl.functional.unlearning.npo import npo_loss, npo_loss_from_logits
from lightning_cl.functional.unlearning.pdu import dual_update, pdu_loss
from lightning_cl.functional.unlearning.random_labels import random_labels
from lightning_cl.functional.unlearning.rmu import activation_distance, control_vector, rmu_loss
from lightning_cl.functional.unlearning.satimp import satimp_loss
from lightning_cl.functional.unlearning.simnpo import simnpo_loss
from lightning_cl.functional.unlearning.ssd import dampen_weights_, subtract_importance_
from lightning_cl.functional.unlearning.task_vector import negate_weights_, negated_factors
from lightning_cl.functional.unlearning.token_nll import (
    Reduction,
    connected_zero,
    mean_over_rows,
    shifted,
    supervised_nll,
    supervised_rows,
    token_nll,
)
from lightning_cl.functional.unlearning.uld import logit_difference, uniform_divergence
from lightning_cl.functional.unlearning.undial import undial_loss
from lightning_cl.functional.unlearning.wga import wga_loss

__all__ = [
    "Bound",
    "Reduction",
    "RetainPositions",
    "activation_distance",
    "add_group_lasso_",
    "bounded_cross_entropy",
    "ceu_loss",
    "connected_zero",
    "control_vector",
    "dampen_weights_",
    "dpo_loss",
    "dual_update",
    "grad_diff",
    "gradient_ascent",
    "group_lasso",
    "kl_retain",
    "logit_difference",
    "max_entropy_loss",
    "mean_over_rows",
    "negate_weights_",
    "negated_factors",
    "npo_loss",
    "npo_loss_from_logits",
    "pdu_loss",
    "prototype_divergence",
    "random_labels",
    "rmu_loss",
    "satimp_loss",
    "shifted",
    "simnpo_loss",
    "squared_norm",
    "subtract_importance_",
    "supervised_nll",
    "supervised_rows",
    "token_nll",
    "undial_loss",
    "uniform_divergence",
    "wga_loss",
]
