"""Metrics: plain functions of arrays that return the value per example and the aggregate."""

from analysis.metrics.exposure import exposure, exposure_of, generalized_exposure, relative_exposure
from analysis.metrics.extraction import exact_memorization, extraction_strength
from analysis.metrics.lds import LDS, LDSDifference, Truth, lds, lds_difference, read_truth
from analysis.metrics.likelihood import PerRow, accuracy, perplexity
from analysis.metrics.mia import (
    Attack,
    attack,
    gradient_norm_score,
    loss_score,
    min_k,
    min_k_plus_plus,
    privleak,
    reference_score,
    zlib_score,
)
from analysis.metrics.tofu import (
    ForgetQuality,
    Utility,
    UtilitySet,
    answer_probability,
    forget_quality,
    model_utility,
    option_probability,
    truth_ratio,
)
from influence.overlap import Rouge, rouge

__all__ = [
    "Attack",
    "ForgetQuality",
    "LDS",
    "LDSDifference",
    "PerRow",
    "Rouge",
    "Truth",
    "Utility",
    "UtilitySet",
    "accuracy",
    "answer_probability",
    "attack",
    "exact_memorization",
    "exposure",
    "exposure_of",
    "extraction_strength",
    "forget_quality",
    "generalized_exposure",
    "gradient_norm_score",
    "lds",
    "lds_difference",
    "loss_score",
    "min_k",
    "min_k_plus_plus",
    "model_utility",
    "option_probability",
    "perplexity",
    "privleak",
    "read_truth",
    "reference_score",
    "relative_exposure",
    "rouge",
    "truth_ratio",
    "zlib_score",
]
