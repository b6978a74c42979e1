"""What each metric says of a wrong call, and that every one is handed on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from analysis import metrics
from analysis.metrics import (
    UtilitySet,
    attack,
    exact_memorization,
    exposure,
    exposure_of,
    extraction_strength,
    forget_quality,
    generalized_exposure,
    loss_score,
    min_k,
    min_k_plus_plus,
    model_utility,
    option_probability,
    perplexity,
    privleak,
    reference_score,
    relative_exposure,
    rouge,
    truth_ratio,
    zlib_score,
)
from influence.errors import InputError

T = np.array([True])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: loss_score([]),
            r"losses has shape \(0,\); expected \[n\], one number per row, and at least one: pass",
        ),
        (lambda: loss_score([[1, 2]]), r"losses has shape \(1, 2\)"),
        (
            lambda: loss_score([1, math.nan, math.inf]),
            r"losses has 2 NaN or infinite values, the first at \[1\]; expected",
        ),
        (lambda: loss_score(cast(Any, [None, 1])), r"losses has 1 NaN"),
        (
            lambda: loss_score(["a"]),
            r"losses cannot be read as an array of numbers; expected \[n\].*: pad or select",
        ),
        (
            lambda: truth_ratio([1, 2], [[1, 2], [3]]),
            r"perturbed cannot be read as an array of numbers; expected \[n, k\]",
        ),
        (lambda: truth_ratio([1, 2], [1, 2]), r"perturbed has shape \(2,\); expected \[n, k\]"),
        (
            lambda: truth_ratio([1], [[1], [2]]),
            r"perturbed has 2 rows; expected 1, as before it: pass the same rows",
        ),
        (lambda: truth_ratio([1], [[math.nan]]), r"perturbed has 1 NaN .* first at \[0, 0\]"),
        (lambda: option_probability([1], [[1], [2]]), r"perturbed has 2 rows"),
        (lambda: forget_quality([1], []), r"retain_ratios has shape \(0,\)"),
        (
            lambda: forget_quality([-0.5], [1]),
            r"ratios has the value -0\.5; expected truth ratios, 0 and more: pass",
        ),
        (lambda: rouge([], []), r"given 0 references and 0 generated texts; expected as many"),
        (lambda: rouge(["a"], ["a", "b"]), r"given 1 references and 2 generated"),
        (lambda: model_utility({}), r"No part of model utility was given"),
        (
            lambda: model_utility({"forget": UtilitySet([1])}),
            r"key 'forget'; expected some of retain, real_authors",
        ),
        (
            lambda: model_utility({"retain": UtilitySet([1.5])}),
            r"retain probability has the value 1\.5; expected shares",
        ),
        (
            lambda: model_utility({"retain": UtilitySet(rouge=[50])}),
            r"retain rouge has the value 50; .*or percent",
        ),
        (
            lambda: model_utility({"retain": UtilitySet(truth_ratio=[-1])}),
            r"retain truth_ratio has the value -1",
        ),
        (lambda: attack([1], []), r"non_members has shape \(0,\)"),
        (lambda: attack([math.nan], [1]), r"members has 1 NaN"),
        (
            lambda: attack([1], [1], fprs=[10]),
            r"fprs is \(10,\); expected shares between 0 and 1: write 1 % as 0\.01",
        ),
        (lambda: attack([1], [1], resamples=0), r"0 resamples"),
        (lambda: zlib_score([1.0], []), r"texts has 0 rows; expected 1"),
        (lambda: min_k([]), r"log_probs has no rows"),
        (lambda: min_k([[-1], []]), r"log_probs\[1\] has shape \(0,\)"),
        (
            lambda: min_k([[-1]], k=20),
            r"k is 20; expected a share of the tokens above 0 and up to 1: write 20 % as 0\.2",
        ),
        (lambda: min_k([[-1]], k=0), r"k is 0"),
        (lambda: min_k_plus_plus([[-1]], [[-1], [-1]], [[1]]), r"means has 2 rows; expected 1"),
        (
            lambda: min_k_plus_plus([[-1]], [[-1, -1]], [[1]]),
            r"Row 0 has 1 log_probs, 2 means and 1 stds; expected one",
        ),
        (lambda: min_k_plus_plus([[-1]], [[-1]], [[-1]]), r"stds\[0\] has a negative value"),
        (lambda: reference_score([1], [1, 2]), r"reference_losses has 2 rows; expected 1"),
        (lambda: privleak(1.2, 0.5), r"auc is 1\.2; expected an area between 0 and 1: pass"),
        (lambda: privleak(0.5, math.nan), r"auc_retrained is nan"),
        (lambda: privleak(0.5, 1), r"auc_retrained is 1, and PrivLeak divides by"),
        (
            lambda: exposure(0, 5),
            r"A rank among 5 candidates was given as 0\.0; expected numbers from 1",
        ),
        (lambda: exposure([1, 6], 5), r"given as \[1\.0, 6\.0\]"),
        (lambda: exposure(math.nan, 5), r"given as nan"),
        (lambda: exposure_of([1, 2], [[1]]), r"others has 1 rows; expected 2"),
        (
            lambda: generalized_exposure([1, 2], [[1]]),
            r"reference, transposed, has 1 rows; expected 2",
        ),
        (lambda: generalized_exposure([1, 2], [1, 2]), r"reference, transposed, has shape \(2,\)"),
        (lambda: relative_exposure([1], []), r"comparable has shape \(0,\)"),
        (lambda: extraction_strength([]), r"right has no rows"),
        (
            lambda: extraction_strength([T, T[:0]]),
            r"right\[1\] has shape \(0,\) and type bool; .*: leave out rows",
        ),
        (
            lambda: exact_memorization([np.array([0, 1])]),
            r"right\[0\] has shape \(2,\) and type int64; expected \[T\] of bool",
        ),
        (lambda: perplexity([1, 2], [1]), r"counts has 1 rows; expected 2"),
        (
            lambda: perplexity([1, 2], [1, 0]),
            r"counts has the value 0; expected the positive number",
        ),
    ],
)
def test_errors_say_given_expected_and_what_to_do(call, sentence):
    with pytest.raises(InputError, match=sentence):
        call()


def test_every_metric_is_exported_once_and_has_tests():
    assert sorted(metrics.__all__) == sorted(set(metrics.__all__))
    files = [path.read_text() for path in Path(__file__).parent.glob("test_*.py")]
    functions = {name for name in metrics.__all__ if name[0].islower()}
    assert {name for name in functions if not any(f"{name}(" in text for text in files)} == set()
