"""Pure tensor mathematics, one family of equations per file; nothing here knows Lightning."""

from lightning_cl.functional.adapter_starts import least_context_rows, variance_rows
from lightning_cl.functional.agem import agem_coefficient
from lightning_cl.functional.asymmetric_cross_entropy import keep_classes
from lightning_cl.functional.codyra import soft_threshold_, surviving_factors, threshold_at
from lightning_cl.functional.component_clip import clip_components_, squared_norms
from lightning_cl.functional.cosine_head import cosine_scores
from lightning_cl.functional.curlora import inverted_probabilities, sample_columns_and_rows
from lightning_cl.functional.dark_experience import compared_logits, logit_distance, pad_logits
from lightning_cl.functional.distillation import distillation_loss, feature_distance
from lightning_cl.functional.ewc import merge_online_, merge_separate_
from lightning_cl.functional.fisher import FisherSums, batched_fisher, empirical_fisher, exact_fisher, sampled_fisher
from lightning_cl.functional.gem import gem_coefficients
from lightning_cl.functional.gpm import add_gram_, extend_basis
from lightning_cl.functional.icarl import icarl_loss
from lightning_cl.functional.inflora import leading_directions, memory_threshold
from lightning_cl.functional.interference import most_interfered, virtual_step_
from lightning_cl.functional.lorafa import orthonormal_rows
from lightning_cl.functional.loss_spikes import loss_deviation
from lightning_cl.functional.mas import SensitivitySums, output_sensitivity
from lightning_cl.functional.masks import half_of_each, hold_gradient_, kth_largest, scale_update_, unit_importance
from lightning_cl.functional.mezo import direction, move_along_, projected_gradient
from lightning_cl.functional.nearest_mean import class_means, feature_sums, nearest_mean_scores
from lightning_cl.functional.olora import orthogonality_gradient_, orthogonality_penalty
from lightning_cl.functional.path_integral import path_importance_, path_integral_
from lightning_cl.functional.per_sample import LayerTape
from lightning_cl.functional.prompts import (
    component_weights,
    key_distance,
    key_similarities,
    orthonormalise_,
    prompt_orthogonality,
    selection_penalty,
)
from lightning_cl.functional.prototypes import k_means, prototype_distances
from lightning_cl.functional.proxy_contrastive import (
    gradient_factor,
    proxy_contrastive_loss,
    proxy_distillation,
    proxy_similarities,
    sample_distillation,
    sample_proxy_contrastive_loss,
)
from lightning_cl.functional.quadratic import quadratic_gradient_, quadratic_penalty
from lightning_cl.functional.rank_growth import add_sketch_, leading_directions_outside, num_probes, probes
from lightning_cl.functional.references import add_references_, gram_matrix, reference_products
from lightning_cl.functional.reptile import meta_gradient, reptile_
from lightning_cl.functional.routing import pooled_features, rank_masks, scores_of_tasks
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
from lightning_cl.functional.sd_lora import direction_and_magnitude, fit_direction
from lightning_cl.functional.self_rehearsal import find_answers, replace_answers
from lightning_cl.functional.sharding import UnshardedWeights
from lightning_cl.functional.singular_subspaces import (
    add_similarity_,
    leading_subspaces,
    normalised_importance,
    protected_rank,
)
from lightning_cl.functional.stable_spam import (
    absolute_maxima,
    annealing_scale,
    clip_to_thresholds_,
    euclidean_norms,
    norm_factors_,
    spike_thresholds_,
)
from lightning_cl.functional.subspaces import Subspace, complement_basis
from lightning_cl.functional.task_filters import train_filter
from lightning_cl.functional.task_selector import likeliest_tasks, train_selector

__all__ = [
    "AbsoluteGradients",
    "FisherSums",
    "LayerTape",
    "SampleLoop",
    "SensitivitySums",
    "SquaredGradients",
    "Subspace",
    "UnshardedWeights",
    "absolute_maxima",
    "absolute_sums_by_loop",
    "add_gram_",
    "add_references_",
    "add_similarity_",
    "add_sketch_",
    "add_squares_",
    "agem_coefficient",
    "annealing_scale",
    "average_score_",
    "batched_fisher",
    "class_means",
    "clip_components_",
    "clip_to_thresholds_",
    "compared_logits",
    "complement_basis",
    "component_weights",
    "cosine_scores",
    "direction",
    "direction_and_magnitude",
    "distillation_loss",
    "empirical_fisher",
    "euclidean_norms",
    "exact_fisher",
    "extend_basis",
    "feature_distance",
    "feature_sums",
    "find_answers",
    "fit_direction",
    "gem_coefficients",
    "gradient_factor",
    "gram_matrix",
    "half_of_each",
    "hold_gradient_",
    "icarl_loss",
    "inverted_probabilities",
    "k_means",
    "keep_classes",
    "key_distance",
    "key_similarities",
    "kth_largest",
    "leading_directions",
    "leading_directions_outside",
    "leading_subspaces",
    "least_context_rows",
    "likeliest_tasks",
    "logit_distance",
    "loss_deviation",
    "memory_threshold",
    "merge_online_",
    "merge_separate_",
    "meta_gradient",
    "most_interfered",
    "move_along_",
    "moving_fisher_",
    "nearest_mean_scores",
    "norm_factors_",
    "normalised_importance",
    "num_probes",
    "orthogonality_gradient_",
    "orthogonality_penalty",
    "orthonormal_rows",
    "orthonormalise_",
    "output_sensitivity",
    "pad_logits",
    "path_importance_",
    "path_integral_",
    "pooled_features",
    "probes",
    "projected_gradient",
    "prompt_orthogonality",
    "protected_rank",
    "prototype_distances",
    "proxy_contrastive_loss",
    "proxy_distillation",
    "proxy_similarities",
    "quadratic_gradient_",
    "quadratic_penalty",
    "rank_masks",
    "reference_products",
    "replace_answers",
    "reptile_",
    "rwalk_importance",
    "sample_columns_and_rows",
    "sample_distillation",
    "sample_proxy_contrastive_loss",
    "sampled_fisher",
    "scale_update_",
    "scores_of_tasks",
    "selection_penalty",
    "soft_threshold_",
    "spike_thresholds_",
    "squared_norms",
    "squared_sums_by_loop",
    "surviving_factors",
    "threshold_at",
    "train_filter",
    "train_selector",
    "unit_importance",
    "variance_rows",
    "virtual_step_",
    "walk_score_",
]
