"""Pure tensor mathematics, one family of equations per file; nothing here knows Lightning."""

from lightning_cl.functional.ewc import merge_online_, merge_separate_
from lightning_cl.functional.fisher import FisherSums, batched_fisher, empirical_fisher, exact_fisher, sampled_fisher
from lightning_cl.functional.per_sample import LayerTape
from lightning_cl.functional.quadratic import quadratic_gradient_, quadratic_penalty
from lightning_cl.functional.sample_loop import SampleLoop, SquaredGradients, squared_sums_by_loop
from lightning_cl.functional.sharding import UnshardedWeights

__all__ = [
    "FisherSums",
    "LayerTape",
    "SampleLoop",
    "SquaredGradients",
    "UnshardedWeights",
    "batched_fisher",
    "empirical_fisher",
    "exact_fisher",
    "merge_online_",
    "merge_separate_",
    "quadratic_gradient_",
    "quadratic_penalty",
    "sampled_fisher",
    "squared_sums_by_loop",
]
