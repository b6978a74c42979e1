"""TOFU's measures of forgetting and of what stayed.

Maini et al. 2024, arXiv 2401.06121, section 2.2.

A question has a right answer, a paraphrase of it, and k wrong answers of the paraphrase's form.
With mean losses (nats per token of the answer), `p = exp(-loss)` is an answer's probability
normalised by length, and

    R = (prod_k p(wrong_k))^(1/k) / p(paraphrase) = exp( loss(paraphrase) - mean_k loss(wrong_k) )

is the **truth ratio**: small where the model knows, about 1 where it cannot tell. **Forget
quality** is the p-value of a Kolmogorov-Smirnov test between the R of the forget set under the
unlearned model and under one that was trained without it: near 1 is good, and it says how sure we
are that the two differ, not by how much, so it falls with n for the same difference.
**Model utility** is the harmonic mean of nine means: {retain, real authors, world facts} x
{probability, ROUGE-L recall, max(0, 1 - R)}.

Known differences from other numbers: the published code tests 1/R and averages max(0, 1 - 1/(1/R)),
which is the same; the logs' own `truth_ratio` is R in float32. Questions on real authors and world
facts have no paraphrase: there the right answer stands in for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax
from scipy.stats import ks_2samp

from analysis.metrics.likelihood import checked, exponential
from influence.errors import InputError

SETS = ("retain", "real_authors", "world_facts")


@dataclass(frozen=True)
class ForgetQuality:
    """Kolmogorov-Smirnov test of two samples of truth ratios.

    Attributes
    ----------
    value : float
        Its p-value (two-sided, exact).
    statistic : float
        The largest distance of the two empirical distribution functions, in [0, 1].
    n, m : int
        Size of the samples.
    floor : float
        `2 / binomial(n + m, n)`, the p-value of samples that do not overlap: no smaller one exists
        at this n and m. 0 where it is below the smallest float.
    """

    value: float
    statistic: float
    n: int
    m: int
    floor: float


@dataclass(frozen=True, eq=False)
class UtilitySet:
    """What model utility needs of one set, [n] each. None is a part that was not measured.

    Attributes
    ----------
    probability
        Of the right answer: `answer_probability` (retain), `option_probability` (real authors,
        world facts).
    rouge
        ROUGE-L recall of the generated answer.
    truth_ratio
        R itself, not yet max(0, 1 - R).
    """

    probability: ArrayLike | None = None
    rouge: ArrayLike | None = None
    truth_ratio: ArrayLike | None = None


@dataclass(frozen=True)
class Utility:
    """Model utility, and what it was made of.

    Attributes
    ----------
    value : float
        Harmonic mean of `parts`; 0 where one of them is 0. Comparable with TOFU's only if nothing
        is missing.
    parts : mapping
        The means, named `"retain probability"`, `"retain rouge"`, `"retain truth_ratio"`,
        `"real_authors probability"`, ...
    missing : tuple of str
        Which of the nine were not given.
    """

    value: float
    parts: Mapping[str, float]
    missing: tuple[str, ...]


def truth_ratio(paraphrased: ArrayLike, perturbed: ArrayLike) -> NDArray[np.float64]:
    """`R = exp( paraphrased - mean_k perturbed_k )` [n], from mean losses [n] and [n, k].

    What would overflow is the largest float.
    """
    paraphrased = checked(paraphrased, "paraphrased")
    perturbed = checked(perturbed, "perturbed", ndim=2, rows=len(paraphrased))
    return exponential(paraphrased - perturbed.mean(axis=1))


def forget_quality(ratios: ArrayLike, retain_ratios: ArrayLike) -> ForgetQuality:
    """Test of truth ratios [n] of the forget set against those [m] of a model that never saw it.

    The two-sample Kolmogorov-Smirnov test, two-sided, exact at every size. Read `value` beside
    `floor`.
    """
    ratios, retain_ratios = checked(ratios, "ratios"), checked(retain_ratios, "retain_ratios")
    for name, sample in (("ratios", ratios), ("retain_ratios", retain_ratios)):
        _refuse_outside(sample, name, "truth ratios", math.inf)
    result: Any = ks_2samp(ratios, retain_ratios, method="exact")
    n, m = len(ratios), len(retain_ratios)
    return ForgetQuality(
        float(result.pvalue), float(result.statistic), n, m, 2 / math.comb(n + m, n)
    )


def answer_probability(losses: ArrayLike) -> NDArray[np.float64]:
    """`exp(-loss)` [n]: the probability of the right answer, the geometric mean over its tokens."""
    return exponential(-checked(losses, "losses"))


def option_probability(losses: ArrayLike, perturbed: ArrayLike) -> NDArray[np.float64]:
    """`p(right) / (p(right) + sum_k p(wrong_k))` [n], from mean losses [n] and [n, k]."""
    losses = checked(losses, "losses")
    perturbed = checked(perturbed, "perturbed", ndim=2, rows=len(losses))
    return softmax(-np.column_stack([losses, perturbed]), axis=1)[:, 0]


def model_utility(sets: Mapping[str, UtilitySet]) -> Utility:
    """Harmonic mean of the nine means of `sets`, keyed `retain`, `real_authors`, `world_facts`.

    Of the parts that are there, if some are missing; the result names those.
    """
    unknown = [name for name in sets if name not in SETS]
    if unknown:
        raise InputError(
            f"sets has the key {unknown[0]!r}; expected some of {', '.join(SETS)}: rename it or "
            "leave it out."
        )
    parts: dict[str, float] = {}
    missing: list[str] = []
    for name in SETS:
        for part in fields(UtilitySet):
            values = getattr(sets.get(name, UtilitySet()), part.name)
            if values is None:
                missing.append(f"{name} {part.name}")
            else:
                parts[f"{name} {part.name}"] = _mean(
                    values, f"{name} {part.name}", is_ratio=part.name == "truth_ratio"
                )
    if not parts:
        raise InputError(
            "No part of model utility was given; expected at least one of the nine: pass a "
            "UtilitySet per set."
        )
    value = (
        len(parts) / sum(1 / part for part in parts.values()) if min(parts.values()) > 0 else 0.0
    )
    return Utility(value, parts, tuple(missing))


def _mean(values: ArrayLike, name: str, is_ratio: bool) -> float:
    values = checked(values, name)
    _refuse_outside(
        values, name, "truth ratios" if is_ratio else "shares", math.inf if is_ratio else 1
    )
    return float(np.maximum(0, 1 - values).mean() if is_ratio else values.mean())


def _refuse_outside(values: NDArray[np.float64], name: str, what: str, high: float) -> None:
    wrong = values[(values < 0) | (values > high)]
    if len(wrong):
        raise InputError(
            f"{name} has the value {wrong[0]:g}; expected {what}, "
            f"{'0 and more' if high == math.inf else f'0 to {high:g}'}: pass "
            "them as they are, not as losses, logarithms or percent."
        )
