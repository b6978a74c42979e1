"""Comparisons of sets and of adapters: attacks, forget quality, exposure, divergence, utility.

What cannot be computed is None, with the reason under its name in `notes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.evaluation.measured import Measurement, Subject, defined
from analysis.evaluation.sets import SETS, PreparedSet
from analysis.metrics import mia, tofu
from analysis.metrics.exposure import generalized_exposure, relative_exposure
from analysis.metrics.likelihood import PerRow
from analysis.report.agreement import divergence
from influence.errors import InputError

#: Rows of a side below which membership attacks say little: a choice.
FEW = 10
#: Share of the base's loss on the forget rows below which a reference must have seen them: a
#: choice.
KNOWS = 0.5

#: Measurements by adapter (`adapter`, `reference`), then by set.
Measurements = Mapping[str, Mapping[str, Measurement]]
#: Scores of the membership attacks by attack, `[n]`, higher = more like a member.
AttackScores = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Exposures:
    """Exposure of the forget rows, bits per token.

    Attributes
    ----------
    generalized : PerRow or None
        The adapter's against the reference.
    relative : dict of str to PerRow
        Of each adapter against the held-out rows; empty without them.
    """

    generalized: PerRow | None
    relative: dict[str, PerRow]


def exposures(measurements: Measurements, notes: dict[str, str]) -> Exposures:
    """Exposure of the forget rows against the reference, and against held-out rows."""
    generalized, relative = None, {}
    losses = {where: sets["forget"].outputs.loss for where, sets in measurements.items()}
    if "reference" in losses:
        generalized = generalized_exposure(losses["adapter"], [losses["reference"]])
    else:
        notes["generalized_exposure"] = "no reference adapter was given"
    if "holdout" in measurements["adapter"]:
        relative = {
            where: relative_exposure(losses[where], sets["holdout"].outputs.loss)
            for where, sets in measurements.items()
        }
    else:
        notes["relative_exposure"] = "no holdout rows were given"
    return Exposures(generalized, relative)


def note_reference(
    measurements: Measurements, base: Mapping[str, np.ndarray], notes: dict[str, str]
) -> None:
    """Remark on a reference that has seen the forget rows. `base` are losses `[n]` of each set."""
    if "reference" not in measurements:
        return
    loss = float(measurements["reference"]["forget"].outputs.loss.mean())
    base_loss = float(base["forget"].mean())
    if loss < KNOWS * base_loss:
        notes["remark.reference"] = (
            f"the reference's loss on the forget rows is {loss:.2f} and the base's "
            f"{base_loss:.2f}: it seems to have seen them, or rows that teach the same; only where it "
            "has not does it say what never seen looks like"
        )


def divergences(
    subject: Subject, sets: Mapping[str, PreparedSet], notes: dict[str, str]
) -> dict[str, float | None] | None:
    """`KL(reference || adapter)` of every set, nats per token."""
    if "reference" not in subject.thetas:
        notes["kl"] = notes["reference"] = "no reference adapter was given"
        return None
    adapter, reference = subject.thetas["adapter"], subject.thetas["reference"]
    values: dict[str, float | None] = dict.fromkeys(SETS)
    for name, rows in sets.items():
        values[name] = divergence(
            subject.model, rows.tokens, reference, adapter, token_budget=subject.token_budget
        )
    return values


# ---- membership ----------------------------------------------------------------------------------


def attack_scores(
    subject: Subject,
    sets: Mapping[str, PreparedSet],
    measurements: Mapping[str, Measurement],
    base: Mapping[str, np.ndarray],
) -> dict[str, AttackScores]:
    """Every attack's scores of the forget and held-out rows under one adapter, by set."""
    scores: dict[str, AttackScores] = {}
    for name in ("forget", "holdout"):
        out, norms = measurements[name].outputs, measurements[name].gradient_norms
        assert norms is not None
        tokens, tokenizer = sets[name].tokens, subject.model.tokenizer
        supervised = [row.input_ids[row.supervised] for row in tokens]
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in supervised]
        scores[name] = {
            "loss": mia.loss_score(out.loss),
            "zlib": mia.zlib_score(out.sums, texts),
            "min_k": mia.min_k(out.log_probs),
            "min_40": mia.min_k(out.log_probs, 0.4),
            "min_k_plus_plus": mia.min_k_plus_plus(out.log_probs, out.mean, out.std),
            "base": mia.reference_score(out.loss, base[name]),
            "gradient_norm": mia.gradient_norm_score(norms),
        }
    return scores


def membership(
    scores: Mapping[str, Mapping[str, AttackScores]], seed: int, notes: dict[str, str]
) -> dict[str, Any] | None:
    """Forget rows as members against held-out rows, attack by attack. PrivLeak with a reference.

    `scores` are those of `attack_scores`, by adapter; empty without held-out rows.
    """
    if not scores:
        notes["membership"] = (
            "the attacks compare forget with holdout rows, and no holdout rows were given"
        )
        return None
    attacks = {
        where: {
            key: mia.attack(sets["forget"][key], sets["holdout"][key], seed=seed)
            for key in sets["forget"]
        }
        for where, sets in scores.items()
    }
    first = attacks["adapter"]["loss"]
    if min(first.n, first.m) < FEW:
        notes["remark.membership"] = (
            f"{first.n} forget and {first.m} held-out rows are too few for the attacks: their "
            "intervals are too short, and one row moves PrivLeak by much"
        )
    beside = attacks.get("reference")
    return {
        "members": first.n,
        "non_members": first.m,
        "level": first.interval.level,
        "resamples": first.interval.resamples,
        "attacks": {
            key: {
                "adapter": _attack(result),
                "reference": None if beside is None else _attack(beside[key]),
                "privleak": None if beside is None else _privleak(key, result, beside[key], notes),
            }
            for key, result in attacks["adapter"].items()
        },
    }


def _attack(result: mia.Attack) -> dict[str, Any]:
    interval = result.interval
    tpr = {f"{fpr:g}": share for fpr, share in result.tpr.items()}
    return {"auc": result.auc, "low": interval.low, "high": interval.high, "tpr": tpr}


def _privleak(
    key: str, result: mia.Attack, reference: mia.Attack, notes: dict[str, str]
) -> float | None:
    """PrivLeak of one attack, percent."""
    try:
        return mia.privleak(result.auc, reference.auc)
    except InputError as error:
        notes[f"membership.attacks.{key}.privleak"] = str(error)
        return None


# ---- TOFU ----------------------------------------------------------------------------------------


def forget_quality(measurements: Measurements, notes: dict[str, str]) -> dict[str, Any] | None:
    """TOFU's test of the forget rows' truth ratios against the reference's."""
    ratios = {where: sets["forget"].truth_ratios for where, sets in measurements.items()}
    missing = None
    if "reference" not in ratios:
        missing = "a reference adapter"
    elif np.isnan(ratios["adapter"]).all():
        missing = "forget rows with other answers"
    if missing is not None:
        notes["forget_quality"] = f"it needs {missing}"
        return None
    numbers = {where: values[~np.isnan(values)] for where, values in ratios.items()}
    result = tofu.forget_quality(numbers["adapter"], numbers["reference"])
    return {
        "value": result.value,
        "statistic": result.statistic,
        "rows": result.n,
        "floor": result.floor,
    }


def utility(measurements: Measurements, notes: dict[str, str]) -> dict[str, Any] | None:
    """Model utility by what the retained rows alone say of it."""
    if "retain" not in measurements["adapter"]:
        notes["utility"] = "no retain rows were given"
        return None
    values: dict[str, Any] = {"adapter": None, "reference": None}
    for where, sets in measurements.items():
        retained = sets["retain"]
        part = tofu.UtilitySet(
            probability=tofu.answer_probability(retained.outputs.loss),
            rouge=defined(retained.rougeL),
            truth_ratio=defined(retained.truth_ratios),
        )
        result = tofu.model_utility({"retain": part})
        values[where] = {
            "value": result.value,
            "parts": dict(result.parts),
            "missing": list(result.missing),
        }
    return values
