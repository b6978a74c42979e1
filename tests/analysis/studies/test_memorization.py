"""Memorization of a run: the table, the agreement with its intervals, refusals, the testbed."""

from __future__ import annotations

import math
from statistics import mean

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

import influence
from analysis.metrics.lds import Truth
from analysis.studies.counterfactual import c_score, counterfactual_memorization, reliability
from analysis.studies.memorization import Memorization, memorization
from analysis.studies.memorization_tables import tables
from influence.errors import InputError, MismatchError
from tests.analysis.studies.helpers import DAMPED, plain, truth_of
from tests.conftest import build_model, examples, rows


def test_the_table_holds_what_the_model_says(run):
    before = run.model.adapter_digest
    found = memorization(run, resamples=5)
    table = found.table
    forecasts = ["tokens", "loss", "base_loss", "gap", "extraction_strength", "exact_memorization"]
    assert table.columns.tolist() == ["id", *forecasts, "self_influence", *DAMPED]
    assert table["id"].tolist() == run.train.ids
    for i, example in enumerate(run.train):
        losses, right = plain(run.model.model, example, run.model.tokenizer)
        with run.model.model.disable_adapter():
            base, _ = plain(run.model.model, example, run.model.tokenizer)
        tail = 0
        while tail < len(right) and right[-1 - tail]:
            tail += 1
        row = table.iloc[i]
        assert row["tokens"] == len(losses)
        assert row["loss"] == pytest.approx(mean(losses), rel=1e-9)
        assert row["base_loss"] == pytest.approx(mean(base), rel=1e-9)
        assert row["gap"] == pytest.approx(mean(base) - mean(losses), rel=1e-9, abs=1e-12)
        assert row["extraction_strength"] == pytest.approx(tail / len(right))
        assert row["exact_memorization"] == pytest.approx(sum(right) / len(right))
    assert table["self_influence"].tolist() == run.self_influence().values.tolist()
    for rule in ("mean:0.01", "mean:1"):
        assert (
            table[f"self_influence {rule}"].tolist()
            == run.self_influence(damping=rule).values.tolist()
        )
    assert (found.agreement, found.reliability) == ([], None)
    assert found.setting == "raw ekfac mean:0.1 at 0.6,1"
    assert "nothing was measured by retraining" in found.notes[0]
    assert found.most(2)["self_influence"].tolist() == sorted(table["self_influence"])[:-3:-1]
    assert run.model.adapter_digest == before


def test_other_dampings_are_columns_once(run):
    found = memorization(run, dampings=["mean:0.10", "top:0.5", "abs:1e-3", "top:0.5"])
    assert [name for name in found.table if name.startswith("self")] == [
        "self_influence",
        "self_influence top:0.5",
        "self_influence abs:0.001",
    ]
    with pytest.raises(InputError, match="damping 'big' was given"):
        memorization(run, dampings=["big"])


def test_a_run_without_damping(tmp_path):
    model = build_model("llama", layers=1, target_modules=["q_proj", "v_proj"])
    plain_run = influence.fit(
        model, examples(3), path=(1.0,), curvature=influence.Identity(), directory=tmp_path / "run"
    )
    found = memorization(plain_run)
    assert [name for name in found.table if name.startswith("self")] == ["self_influence"]
    with pytest.raises(
        InputError, match=r"damping mean:1 was given, and .* compares plain gradients"
    ):
        memorization(plain_run, dampings=["mean:1"])


def test_one_row_is_measured_and_has_no_agreement(tmp_path):
    model = build_model("llama", layers=1, target_modules=["q_proj", "v_proj"])
    single = influence.fit(
        model, examples(1), path=(1.0,), curvature=influence.EKFAC(), directory=tmp_path / "run"
    )
    losses, masks = np.array([[1.0], [2.0], [4.0]]), np.array([[True], [False], [False]])
    found = memorization(single, Truth(masks, losses, losses), resamples=5)
    assert found.table["counterfactual_memorization"].tolist() == [2.0]
    assert math.isnan(found.table["counterfactual_error"][0])
    assert all(math.isnan(one["spearman"]) and math.isnan(one["low"]) for one in found.agreement)
    assert len(tables(found)) == 1
    assert "reliability of the counterfactual memorization: nan" in "\n".join(found.lines())


def test_agreement_is_spearman_with_intervals_over_rows_and_over_adapters(run):
    truth = truth_of(run)
    found = memorization(run, truth, dampings=[], resamples=40, level=0.8, seed=3)
    expected = counterfactual_memorization(truth.train_loss, truth.masks)
    table = found.table
    np.testing.assert_array_equal(table["counterfactual_memorization"], expected.values)
    np.testing.assert_array_equal(table["counterfactual_error"], expected.errors)
    np.testing.assert_array_equal(table["c_score"], c_score(truth.train_loss, truth.masks))
    assert table["models_without"].tolist() == expected.without.tolist()
    assert table["models_with"].tolist() == expected.trained.tolist()
    assert found.reliability == reliability(truth.train_loss, truth.masks, 3)
    forecasts = [
        "tokens",
        "loss",
        "base_loss",
        "gap",
        "extraction_strength",
        "exact_memorization",
        "self_influence",
    ]
    pairs = [(m, f) for m in ("counterfactual_memorization", "c_score") for f in forecasts]
    assert [(one["measure"], one["forecast"]) for one in found.agreement] == pairs

    def rho(x, y):
        keep = ~np.isnan(x + y)
        with np.errstate(all="ignore"):
            return (
                spearmanr(x[keep], y[keep]).statistic
                if keep.sum() > 2 and np.ptp(x[keep]) * np.ptp(y[keep])
                else math.nan
            )

    for one, rows_known in zip((found.agreement[1], found.agreement[7 + 6]), (5, 6), strict=True):
        x, y = table[one["forecast"]].to_numpy(), table[one["measure"]].to_numpy()
        assert one["rows"] == rows_known
        assert one["spearman"] == pytest.approx(rho(x, y), rel=1e-12)
        keep = np.flatnonzero(~np.isnan(y))
        rng = np.random.default_rng(3)
        over = [
            rho(x[some], y[some])
            for some in (keep[rng.integers(rows_known, size=rows_known)] for _ in range(40))
        ]
        assert [one["low"], one["high"]] == pytest.approx(
            np.nanquantile(over, [0.1, 0.9]).tolist(), rel=1e-12
        )
        rng, over = np.random.default_rng(3), []
        for _ in range(40):
            some = rng.integers(9, size=9)
            losses, masks = truth.train_loss[some], truth.masks[some]
            again = counterfactual_memorization(losses, masks).values
            over.append(
                rho(
                    x,
                    again
                    if one["measure"] == "counterfactual_memorization"
                    else c_score(losses, masks),
                )
            )
        low, high = np.nanquantile(over, [0.1, 0.9])
        ends = [
            max(-1, one["spearman"] - (high - low) / 2),
            min(1, one["spearman"] + (high - low) / 2),
        ]
        assert [one["adapters_low"], one["adapters_high"]] == pytest.approx(ends, rel=1e-12)


def test_rows_that_all_or_no_adapters_saw_are_said(run):
    found = memorization(run, truth_of(run, named=False), dampings=[], resamples=2)
    text = "\n".join(found.notes)
    assert (
        "1 of 7 rows were trained on by all of the 9 retrained adapters and have no counterfactual "
        "memorization and no C-score" in text
    )
    assert "1 of 7 rows were trained on by none of the 9 retrained adapters" in text
    assert "(the first is 'r0-1')" in text
    assert "has no train_ids" in text
    assert (
        np.isnan(found.table["counterfactual_memorization"]).tolist() == [True, True] + [False] * 5
    )
    assert not any(
        "train_ids" in note
        for note in memorization(run, truth_of(run), dampings=[], resamples=2).notes
    )


def test_a_truth_of_something_else_is_refused(run, tmp_path):
    truth = truth_of(run)
    for ids, how in (
        (run.train.ids[::-1], "the same ones in another order"),
        ([*run.train.ids[:6], "q"], "others"),
    ):
        with pytest.raises(MismatchError, match=how):
            memorization(
                run,
                Truth(
                    truth.masks, truth.query_loss, truth.train_loss, {"train_ids": np.array(ids)}
                ),
            )
    with pytest.raises(MismatchError, match=r"of 6 training rows and .* has 7"):
        memorization(run, Truth(truth.masks[:, :6], truth.query_loss, truth.train_loss[:, :6]))
    with pytest.raises(InputError, match="has no train_loss"):
        memorization(run, Truth(truth.masks, truth.query_loss))
    broken = truth.train_loss.copy()
    broken[1, 2] = np.nan
    np.savez(
        tmp_path / "broken.npz", masks=truth.masks, query_loss=truth.query_loss, train_loss=broken
    )
    with pytest.raises(InputError, match=r"broken\.npz: train_loss has 1 NaN"):
        memorization(run, tmp_path / "broken.npz")


def test_exposure_of_canaries_is_compared_too(run):
    canaries = {id: [" the red", " old cats", " sun and songs"] for id in run.train.ids}
    found = memorization(run, canaries=canaries, dampings=[], resamples=5)
    one = next(one for one in found.agreement if one["forecast"] == "loss")
    assert (one["measure"], one["rows"]) == ("exposure", 7)
    assert one["spearman"] == pytest.approx(
        spearmanr(found.table["loss"], found.table["exposure"]).statistic
    )
    assert math.isnan(one["adapters_low"])


def test_relative_exposure_is_against_rows_never_seen(run):
    heldout = examples(4, seed=8)
    found = memorization(run, holdout=heldout).table
    unseen = [mean(plain(run.model.model, example, run.model.tokenizer)[0]) for example in heldout]
    typical = mean(math.exp(-loss) for loss in unseen)
    expected = [math.log2(math.exp(-loss) / typical) for loss in found["loss"]]
    assert found["relative_exposure"].tolist() == pytest.approx(expected, rel=1e-9)
    with pytest.raises(InputError, match="1 of 2 held-out rows have the content of training rows"):
        memorization(run, holdout=influence.examples_from_rows([rows(1)[0], rows(1, seed=4)[0]]))
    with pytest.raises(InputError, match="no held-out rows"):
        memorization(run, holdout=influence.Examples())


def test_writing(run, tmp_path):
    found = memorization(run, truth_of(run), dampings=[], resamples=2)
    for name in ("t.csv", "t.PARQUET"):
        path = found.write(tmp_path / name)
        back = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
        pd.testing.assert_frame_equal(back, found.table, check_exact=True, check_dtype=False)
        with pytest.raises(InputError, match="exists: name another"):
            found.write(path)
        assert found.write(path, overwrite=True) == path
    with pytest.raises(InputError, match=r"ends in \.csv or \.parquet"):
        found.write(tmp_path / "t.txt")
    with pytest.raises(InputError, match="there is no folder"):
        found.write(tmp_path / "none" / "t.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.PARQUET", "t.csv"]


@pytest.mark.slow
def test_self_influence_forecasts_memorization_of_the_testbed(testbed, tmp_path):
    """Measured 0.815, interval over rows [0.75, 0.87].

    The loss alone gives 0.68 [0.60, 0.76]. Halves of 40 adapters agree to 0.96.
    """
    model = influence.load(testbed / "base", testbed / "adapter", device="cpu")
    train = influence.read_examples(testbed / "train.jsonl")
    fitted = influence.fit(model, train, curvature=influence.EKFAC(), directory=tmp_path / "run")
    found: Memorization = memorization(
        fitted, testbed / "truth.npz", dampings=["mean:0.01"], resamples=200
    )
    rho = {
        one["forecast"]: one
        for one in found.agreement
        if one["measure"] == "counterfactual_memorization"
    }
    assert rho["self_influence"]["spearman"] > 0.75
    assert rho["self_influence mean:0.01"]["spearman"] > 0.75
    assert rho["self_influence"]["low"] > rho["loss"]["spearman"] > 0.6
    assert found.reliability is not None
    assert found.reliability.value > 0.95
