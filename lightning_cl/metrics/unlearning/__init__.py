"""Is it gone, and what did it cost: metrics of unlearning, as functions and over batches and ranks."""

from lightning_cl.metrics.unlearning.accumulated import (
    ExactMemorization,
    ExtractionStrength,
    ForgetQuality,
    MembershipAUC,
    Probability,
    SampleScores,
    TruthRatio,
)
from lightning_cl.metrics.unlearning.membership import (
    Membership,
    loss_score,
    membership_auc,
    min_k_plus_plus_score,
    min_k_score,
    zlib_score,
)
from lightning_cl.metrics.unlearning.memorization import (
    exact_memorization,
    extraction_strength,
    probability,
    truth_ratio,
    truth_ratio_score,
)
from lightning_cl.metrics.unlearning.quality import (
    KolmogorovSmirnov,
    class_margins,
    forget_quality,
    klom,
    model_utility,
    recovery_ratio,
)
from lightning_cl.metrics.unlearning.rouge import rouge_l
from lightning_cl.metrics.unlearning.sequence import revival

__all__ = [
    "ExactMemorization",
    "ExtractionStrength",
    "ForgetQuality",
    "KolmogorovSmirnov",
    "Membership",
    "MembershipAUC",
    "Probability",
    "SampleScores",
    "TruthRatio",
    "class_margins",
    "exact_memorization",
    "extraction_strength",
    "forget_quality",
    "klom",
    "loss_score",
    "membership_auc",
    "min_k_plus_plus_score",
    "min_k_score",
    "model_utility",
    "probability",
    "recovery_ratio",
    "revival",
    "rouge_l",
    "truth_ratio",
    "truth_ratio_score",
    "zlib_score",
]
