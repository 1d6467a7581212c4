"""Pure tensor mathematics, one family of equations per file; nothing here knows Lightning."""

from lightning_cl.functional.agem import agem_coefficient
from lightning_cl.functional.component_clip import clip_components_, squared_norms
from lightning_cl.functional.distillation import distillation_loss, feature_distance
from lightning_cl.functional.ewc import merge_online_, merge_separate_
from lightning_cl.functional.fisher import FisherSums, batched_fisher, empirical_fisher, exact_fisher, sampled_fisher
from lightning_cl.functional.gem import gem_coefficients
from lightning_cl.functional.gpm import add_gram_, extend_basis
from lightning_cl.functional.mas import SensitivitySums, output_sensitivity
from lightning_cl.functional.masks import half_of_each, hold_gradient_, kth_largest, scale_update_, unit_importance
from lightning_cl.functional.path_integral import path_importance_, path_integral_
from lightning_cl.functional.per_sample import LayerTape
from lightning_cl.functional.quadratic import quadratic_gradient_, quadratic_penalty
from lightning_cl.functional.references import add_references_, gram_matrix, reference_products
from lightning_cl.functional.rwalk import (
    add_squares_,
    average_score_,
    moving_fisher_,
    rwalk_importance,
    walk_score_,
)
from lightning_cl.functional.sample_loop import (
    AbsoluteGradients,
    SampleLoop,
    SquaredGradients,
    absolute_sums_by_loop,
    squared_sums_by_loop,
)
from lightning_cl.functional.sharding import UnshardedWeights
from lightning_cl.functional.singular_subspaces import (
    add_similarity_,
    leading_subspaces,
    normalised_importance,
    protected_rank,
)
from lightning_cl.functional.subspaces import Subspace, complement_basis
from lightning_cl.functional.task_filters import train_filter

__all__ = [
    "AbsoluteGradients",
    "FisherSums",
    "LayerTape",
    "SampleLoop",
    "SensitivitySums",
    "SquaredGradients",
    "Subspace",
    "UnshardedWeights",
    "absolute_sums_by_loop",
    "add_gram_",
    "add_references_",
    "add_similarity_",
    "add_squares_",
    "agem_coefficient",
    "average_score_",
    "batched_fisher",
    "clip_components_",
    "complement_basis",
    "distillation_loss",
    "empirical_fisher",
    "exact_fisher",
    "extend_basis",
    "feature_distance",
    "gem_coefficients",
    "gram_matrix",
    "half_of_each",
    "hold_gradient_",
    "kth_largest",
    "leading_subspaces",
    "merge_online_",
    "merge_separate_",
    "moving_fisher_",
    "normalised_importance",
    "output_sensitivity",
    "path_importance_",
    "path_integral_",
    "protected_rank",
    "quadratic_gradient_",
    "quadratic_penalty",
    "reference_products",
    "rwalk_importance",
    "sampled_fisher",
    "scale_update_",
    "squared_norms",
    "squared_sums_by_loop",
    "train_filter",
    "unit_importance",
    "walk_score_",
]
