"""The two answers both ways, comparisons by hand, correlations, whole sets, groups apart."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from analysis.studies.ood_statistics import apart, compare, correlations, verdict, whole_sets
from analysis.studies.planting import KINDS, OUTSIDE
from tests.analysis.studies.ood_cases import measured


def synthetic(effects: dict[str, tuple[float, float]], n: int = 12, seed: int = 0) -> pd.DataFrame:
    """`in` rows of about 10 steps and damage 0.1.

    Every other kind with its factor of the steps and its shift of the damage.
    """
    rng = np.random.default_rng(seed)
    made = []
    for kind, (factor, shift) in {"in": (1.0, 0.0), **effects}.items():
        for j in range(n):
            steps, damage = factor * (10 + rng.normal()), 0.1 + shift + 0.01 * rng.normal()
            one = {
                "id": f"{kind}-{j}",
                "kind": kind,
                "partner": f"in-{j}",
                "steps": steps,
                "damage": damage,
            }
            made.append(
                one | {"area": damage / 2, "gap": 2.0, "matched": damage, "matched_partner": 0.1}
            )
    return pd.DataFrame(made)


@pytest.mark.parametrize(
    ("effects", "steps", "damage"),
    [
        ({"other": (2, -0.05), "shuffled": (1.5, -0.05), "random": (3, -0.02)}, "yes", "yes"),
        ({"other": (0.5, 0.05), "shuffled": (0.6, 0.05), "random": (0.4, 0.02)}, "no", "no"),
        ({"other": (1, 0), "shuffled": (1, 0), "random": (1, 0)}, "undecided", "undecided"),
        (
            {"other": (0.5, 0.05), "shuffled": (3, -0.2), "random": (3, -0.2)},
            "undecided",
            "undecided",
        ),
    ],
    ids=["both", "neither", "equal", "one kind says the contrary"],
)
def test_answers_both_ways(effects, steps, damage):
    found = compare(synthetic(effects), 200, resamples=300)
    assert [(one["kind"], one["measure"]) for one in found][:3] == [
        (OUTSIDE[0], m) for m in ("steps", "damage", "area")
    ]
    assert (verdict(found, "steps"), verdict(found, "damage")) == (steps, damage)
    assert (verdict(found, "area"), verdict(found, "per_nat"), verdict(found, "matched")) == (
        damage,
        damage,
        damage,
    )
    for one in found:
        assert one["low"] <= one["value"] <= one["high"]
        assert one["pairs"] == 12


def test_comparisons_by_hand():
    """Two pairs of each of two kinds. One row never arrived, and its damage is unknown."""
    table = pd.DataFrame(
        [
            ("i0", "in", "i0", 4.0, 0.2, 0.1, 2.0, 0.2, 0.2),
            ("i1", "in", "i1", 6.0, 0.4, 0.2, 2.0, 0.4, 0.4),
            ("o0", "other", "i0", 8.0, 0.1, 0.3, 4.0, 0.05, 0.2),
            ("o1", "other", "i1", np.inf, np.nan, np.nan, 4.0, np.nan, 0.4),
            ("s0", "shuffled", "i0", 2.0, 0.3, 0.5, 1.0, 0.3, 0.1),
            ("s1", "shuffled", "i1", 2.0, 0.5, 0.5, -1.0, 0.0, 0.0),
        ],
        columns=[
            "id",
            "kind",
            "partner",
            "steps",
            "damage",
            "area",
            "gap",
            "matched",
            "matched_partner",
        ],
    )
    found = {(one["kind"], one["measure"]): one for one in compare(table, 20, resamples=20)}
    assert {kind for kind, _ in found} == {"other", "shuffled", "all"}
    expected = {
        ("other", "steps"): (28 / 10, 2),
        ("other", "damage"): (0.1 - 0.2, 1),
        ("other", "area"): (0.2, 1),
        ("other", "per_nat"): (0.1 / 4 - 0.2 / 2, 1),
        ("other", "matched"): (0.05 - 0.2, 1),
        ("shuffled", "steps"): (0.4, 2),
        ("shuffled", "damage"): (0.1, 2),
        ("shuffled", "per_nat"): (0.8 / 1 - 0.6 / 4, 2),
        ("shuffled", "matched"): (0.15 - 0.05, 2),
        ("all", "steps"): ((5 + 11) / 10, 2),
        ("all", "damage"): (0.2 - 0.2, 1),
        ("all", "matched"): (0.175 - 0.15, 1),
    }
    for key, (value, pairs) in expected.items():
        assert (found[key]["value"], found[key]["pairs"]) == (
            pytest.approx(value, abs=1e-12),
            pairs,
        ), key


def test_an_interval_without_numbers_decides_nothing():
    table = synthetic({"other": (2, 0.1)}, n=3).assign(damage=np.nan, area=np.nan)
    found = compare(table, 200, resamples=20)
    assert verdict(found, "steps") == "yes"
    assert verdict(found, "damage") == "undecided"
    assert np.isnan(next(one["low"] for one in found if one["measure"] == "damage"))


def test_correlations_over_all_rows_and_within_kinds():
    n = 8
    within = np.concatenate([np.arange(n)[::-1] + 100 * k for k in range(4)]).astype(float)
    table = pd.DataFrame(
        {"kind": np.repeat(KINDS, n), "base_loss": within, "leverage": np.tile(np.arange(n), 4)}
    )
    table["steps"] = np.concatenate([np.arange(n) + 100.0 * k for k in range(4)])
    table["damage"] = table["area"] = -table["steps"]
    table.loc[31, "steps"] = np.inf
    found = {(one["forecast"], one["measure"]): one for one in correlations(table, resamples=50)}
    first = found["base_loss", "steps"]
    assert first["spearman"] > 0.85
    assert first["within"] == pytest.approx(-1)
    assert first["low"] <= first["spearman"] <= first["high"]
    assert found["leverage", "steps"]["within"] == pytest.approx(1)
    assert found["base_loss", "damage"]["spearman"] < -0.85


@pytest.mark.parametrize(("shift", "answer"), [(-0.3, "yes"), (0.3, "no"), (0.0, "undecided")])
def test_groups_apart_both_ways(shift, answer):
    rng = np.random.default_rng(0)
    names = (
        "part 1",
        "part 2",
        "mixture 1, part 1",
        "mixture 1, part 2",
        "mixture 2, part 1",
        "mixture 2, part 2",
    )
    rise = np.repeat(1 + 0.05 * rng.normal(size=(1, 1, 10)), 7, axis=0)
    rise[0, 0] += np.tile([0.1, -0.1], 5)
    rise[:2] += shift
    found = apart(
        measured(
            [0] * 7, [1] * 7, np.zeros((7, 1)), rise, levels=(1.0,), names=(*names, "together")
        )
    )
    assert found["helps"] == answer
    assert found["homogeneous"] == pytest.approx(rise[:2].mean(2).sum())
    assert found["mixed"] == pytest.approx(rise[2:6].mean(2).sum() / 2)
    assert found["together"] == pytest.approx(rise[6].mean())
    assert found["difference"] == pytest.approx(found["homogeneous"] - found["mixed"])
    assert (found["parts"], found["mixtures"]) == (2, 2)


def test_a_group_that_never_arrived_decides_nothing():
    rise = np.ones((4, 1, 3))
    rise[0] = np.nan
    found = apart(
        measured(
            [0] * 4,
            [1] * 4,
            np.zeros((4, 1)),
            rise,
            levels=(1.0,),
            names=("part 1", "part 2", "mixture 1, part 1", "mixture 1, part 2"),
        )
    )
    assert found["helps"] == "undecided"


def test_whole_sets_by_hand():
    rise = np.array([[[1, 3, 2]], [[2, 5, 3]], [[1, 3, 2]], [[np.nan] * 3]])
    names = ("kind in", "kind other", "kind random", "kind shuffled")
    found = whole_sets(
        measured([0] * 4, [1] * 4, np.zeros((4, 1)), rise, levels=(1.0,), names=names),
        {"in": 5, "other": 5, "shuffled": 4, "random": 5},
    ).set_index("kind")
    assert found.index.tolist() == ["in", "other", "shuffled", "random"]
    assert found["rows"].tolist() == [5, 5, 4, 5]
    np.testing.assert_allclose(found["damage"], [2, 10 / 3, np.nan, 2])
    assert found.loc["other", "more"] == pytest.approx(4 / 3)
    assert 1 <= found.loc["other", "low"] < found.loc["other", "high"] <= 2
    assert found.loc["random", ["more", "low", "high"]].tolist() == [0, 0, 0]
    assert np.isnan(found.loc["shuffled", "low"])
