"""Memorization by plain loops: retrained adapters, exposure of secrets, agreement with forecasts; the command end to end."""

from __future__ import annotations

import json
import math
import re
from statistics import mean, stdev

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

import influence
import unlearn
from analysis.cli import main
from analysis.metrics.lds import Truth
from analysis.studies.memorization import (
    DAMPINGS,
    Memorization,
    c_score,
    counterfactual_memorization,
    memorization,
    read_canaries,
    reliability,
    tables,
)
from influence.errors import DataError, InputError, MismatchError
from tests.conftest import add_lora, build_base, build_model, build_tokenizer, examples, rows

HOSTILE = "evil\x1b[2J[red]\nforged  " + "x" * 300
DAMPED = [f"self_influence {rule}" for rule in DAMPINGS if rule != "mean:0.1"]


def subsets(n: int = 7, models: int = 9, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Losses [K, n] and masks: row 0 is in every subset, row 1 in none, row 2 in all but one."""
    rng = np.random.default_rng(seed)
    masks = rng.random((models, n)) < 0.5
    masks[:, 0], masks[:, 1], masks[:, 2] = True, False, np.arange(models) > 0
    return rng.gamma(2, 1, (models, n)), masks


# ---- arrays --------------------------------------------------------------------------------------------------


def test_counterfactual_memorization_and_c_score_are_plain_loops():
    losses, masks = subsets()
    found, score = counterfactual_memorization(losses, masks), c_score(losses, masks)
    for i in range(7):
        out = [float(losses[k, i]) for k in range(9) if not masks[k, i]]
        within = [float(losses[k, i]) for k in range(9) if masks[k, i]]
        assert (found.without[i], found.trained[i]) == (len(out), len(within))
        expected = mean(out) - mean(within) if out and within else math.nan
        error = math.nan
        if min(len(out), len(within)) > 1:
            error = math.sqrt(stdev(out) ** 2 / len(out) + stdev(within) ** 2 / len(within))
        assert found.values[i] == pytest.approx(expected, rel=1e-12, nan_ok=True)
        assert found.errors[i] == pytest.approx(error, rel=1e-12, nan_ok=True)
        likelihood = mean(math.exp(-loss) for loss in out) if out else math.nan
        assert score[i] == pytest.approx(likelihood, rel=1e-12, nan_ok=True)
    assert np.isnan(found.values).tolist() == [True, True] + [False] * 5
    assert np.isnan(found.errors[:3]).all()
    assert not np.isnan(found.errors).all()
    assert np.isnan(score).tolist() == [True] + [False] * 6


def test_what_was_planted_is_found_and_its_error_is_that_of_fresh_draws():
    """mem(x) = 0, 1, 2, ... nats whatever x's own loss; the spread over many sets of models is the standard error."""
    rng = np.random.default_rng(1)
    planted = np.arange(5.0)
    draws, errors = [], []
    for _ in range(400):
        masks = rng.random((30, 5)) < 0.5
        losses = rng.gamma(2, 1, 5) + 5 + planted * ~masks + rng.normal(0, 0.5, (30, 5))
        found = counterfactual_memorization(losses, masks)
        draws.append(found.values)
        errors.append(found.errors)
    np.testing.assert_allclose(np.mean(draws, axis=0), planted, atol=0.04)
    np.testing.assert_allclose(np.std(draws, axis=0), np.mean(errors, axis=0), rtol=0.15)
    masks = rng.random((30, 5)) < 0.5
    losses = 1 + planted * ~masks
    np.testing.assert_allclose(
        counterfactual_memorization(losses, masks).values, planted, atol=1e-12
    )
    np.testing.assert_allclose(
        counterfactual_memorization(losses, ~masks).values, -planted, atol=1e-12
    )
    np.testing.assert_allclose(c_score(losses, masks), np.exp(-1 - planted), rtol=1e-12)


def test_reliability_is_a_plain_loop():
    losses, masks = subsets(n=12)
    rng, found = np.random.default_rng(5), []
    for _ in range(20):
        order = rng.permutation(9)
        halves = []
        for half in (order[:4], order[4:]):
            values = []
            for i in range(12):
                out = [losses[k, i] for k in half if not masks[k, i]]
                within = [losses[k, i] for k in half if masks[k, i]]
                values.append(np.mean(out) - np.mean(within) if out and within else math.nan)
            halves.append(values)
        both = [i for i in range(12) if not math.isnan(halves[0][i] + halves[1][i])]
        found.append(
            spearmanr([halves[0][i] for i in both], [halves[1][i] for i in both]).statistic
        )
    result = reliability(losses, masks, 5, splits=20)
    assert result.half == pytest.approx(np.mean(found), rel=1e-12)
    assert (result.models, result.splits) == (9, 20)
    assert result == reliability(losses, masks, 5, splits=20)
    assert result != reliability(losses, masks, 6, splits=20)


@pytest.mark.parametrize("noise", [0.5, 3.0])
def test_reliability_and_ceiling_are_those_of_ten_thousand_known_rows(noise):
    """mem ~ N(0, 1) measured with variance noise^2 (1 / k_without + 1 / k_trained): the share that is mem, and its root."""
    rng = np.random.default_rng(2)
    n, models = 10_000, 24
    planted = rng.normal(size=n)
    masks = np.argsort(rng.random((models, n)), axis=0) < models // 2
    losses = 9 + planted * ~masks + rng.normal(0, noise, (models, n))
    found = reliability(losses, masks, splits=5)
    share = 1 / (1 + noise**2 * 4 / models)
    assert found.value == pytest.approx(share, abs=0.04)  # halves are not balanced in each row
    measured = counterfactual_memorization(losses, masks).values
    assert spearmanr(planted, measured).statistic == pytest.approx(found.ceiling, abs=0.02)


def test_reliability_of_noise_of_one_row_and_of_too_few_models():
    rng = np.random.default_rng(3)
    masks = rng.random((20, 500)) < 0.5
    noise = reliability(rng.random((20, 500)), masks, splits=20)
    assert abs(noise.half) < 0.05
    assert noise.value <= 0.1
    opposed = reliability(
        np.array([[1.0, 2, 3], [0, 0, 0], [3, 2, 1], [0, 0, 0]]),
        np.array([[0] * 3, [1] * 3] * 2, bool),
    )
    assert opposed.half < 0
    assert (opposed.value, opposed.ceiling) == (0, 0)
    for losses, few in ((rng.random((20, 1)), masks[:, :1]), (rng.random((3, 500)), masks[:3])):
        unknown = reliability(losses, few)
        assert math.isnan(unknown.half)
        assert math.isnan(unknown.value)
        assert math.isnan(unknown.ceiling)


def test_arrays_that_do_not_belong_together_are_refused():
    losses, masks = subsets()
    for function in (counterfactual_memorization, c_score, reliability):
        with pytest.raises(
            InputError, match=r"masks has shape \(9, 6\) and type bool; expected \(9, 7\)"
        ):
            function(losses, masks[:, :6])
        with pytest.raises(InputError, match="type int64; expected"):
            function(losses, masks.astype(np.int64))
        with pytest.raises(InputError, match="NaN or infinite"):
            function(np.where(masks, losses, np.nan), masks)
        with pytest.raises(InputError, match=r"expected \[n, k\]"):
            function(losses[0], masks[0])
    with pytest.raises(InputError, match="splits 0"):
        reliability(losses, masks, splits=0)


# ---- a run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny float64 run of seven rows, the last two of which say words that the tokenizer does not know."""
    items = [
        *rows(5),
        *(
            {"id": f"secret-{i}", "prompt": "the red fox", "completion": f" {w} runs"}
            for i, w in ((1, "zq"), (2, "xj"))
        ),
    ]
    model = build_model("llama", layers=1, target_modules=["q_proj", "v_proj"])
    train = influence.examples_from_rows(items)
    where = tmp_path_factory.mktemp("memorization") / "run"
    return influence.fit(
        model, train, path=(0.6, 1.0), curvature=influence.EKFAC(), directory=where
    )


def truth_of(run, *, named: bool = True) -> Truth:
    losses, masks = subsets()
    extra = {"train_ids": np.array(run.train.ids)} if named else {}
    return Truth(masks, losses[:, :2], losses, extra)


def plain(model, example, tokenizer) -> tuple[list[float], list[bool]]:
    """Losses and greedy hits of every completion token, from a single row's logits."""
    ids = tokenizer(example.prompt + example.completion)["input_ids"] + [1]
    first = len(tokenizer(example.prompt)["input_ids"])
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    at = range(first, len(ids))
    return [-float(logs[t - 1, ids[t]]) for t in at], [
        int(logs[t - 1].argmax()) == ids[t] for t in at
    ]


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
        "1 of 7 rows were trained on by all of the 9 retrained adapters and have no counterfactual memorization and no C-score"
        in text
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


# ---- exposure ------------------------------------------------------------------------------------------------


def test_exposure_ranks_summed_losses_and_ties_share_their_rank(run):
    """Words unknown to the tokenizer are one token: what differs in them only ties with the secret."""
    canaries = {
        "r0-0": [
            " the",
            " the red fox runs over a lazy dog",
            " birds sing loud songs at dawn",
            " old cats",
            " sun",
        ],
        "r0-1": [
            " the",
            " the red fox runs over a lazy dog",
            " birds sing loud songs at dawn",
            " old cats",
            " sun",
        ],
        "secret-1": [" qq runs", " kk runs", " sun"],
        "secret-2": [" qq runs"],
    }
    found = memorization(run, canaries=canaries, dampings=[]).table["exposure"]
    by_mean = []
    for i, example in enumerate(run.train):
        if example.id not in canaries:
            assert math.isnan(found[i])
            continue
        others = [
            influence.Example("x", prompt=example.prompt, completion=text)
            for text in canaries[example.id]
        ]
        losses = [plain(run.model.model, one, run.model.tokenizer)[0] for one in (example, *others)]
        own, *sums = map(sum, losses)
        rank = 1 + sum(s < own - 1e-6 for s in sums) + sum(abs(s - own) < 1e-6 for s in sums) / 2
        assert found[i] == pytest.approx(math.log2((len(sums) + 1) / rank), rel=1e-12)
        by_mean.append(rank != 1 + sum(mean(one) < mean(losses[0]) for one in losses[1:]))
    assert any(by_mean[:2])  # sums and means disagree, so that it matters which of them ranks
    assert found[6] == pytest.approx(math.log2(2 / 1.5))


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
    found = memorization(run, heldout=heldout).table
    unseen = [mean(plain(run.model.model, example, run.model.tokenizer)[0]) for example in heldout]
    typical = mean(math.exp(-loss) for loss in unseen)
    expected = [math.log2(math.exp(-loss) / typical) for loss in found["loss"]]
    assert found["relative_exposure"].tolist() == pytest.approx(expected, rel=1e-9)
    with pytest.raises(InputError, match="1 of 2 held-out rows have the content of training rows"):
        memorization(run, heldout=influence.examples_from_rows([rows(1)[0], rows(1, seed=4)[0]]))
    with pytest.raises(InputError, match="no held-out rows"):
        memorization(run, heldout=influence.Examples())


def test_canaries_that_cannot_be_ranked_are_listed(run):
    own = run.train[0].completion
    with pytest.raises(DataError) as error:
        memorization(
            run,
            canaries={
                "nobody": [" a"],
                "r0-0": [" a", own],
                "r0-1": [],
                "r0-2": [" a", ""],
                "r0-3": [" a", " a"],
                "r0-4": ["\ud800"],
            },
        )
    text = str(error.value)
    for part in (
        "6 of 6",
        "no training row has this id",
        "own completion",
        "no candidates",
        "non-empty",
        "twice",
        "surrogate",
    ):
        assert part in text
    with pytest.raises(InputError, match="no canaries were given"):
        memorization(run, canaries={})
    with pytest.raises(DataError, match="not a list of non-empty strings"):
        memorization(run, canaries={"r0-0": " word"})


def test_texts_and_cut_rows_are_no_canaries(tmp_path):
    model = build_model("llama", layers=1, target_modules=["q_proj", "v_proj"])
    train = influence.examples_from_rows(
        [{"id": "t", "text": "the red fox"}, {"id": "p", "prompt": "the", "completion": " fox"}]
    )
    cut = influence.fit(
        model,
        train,
        path=(1.0,),
        curvature=influence.Identity(),
        directory=tmp_path / "run",
        max_length=5,
    )
    with pytest.raises(DataError, match="it is a text"):
        memorization(cut, canaries={"t": [" dog"]})
    with (
        pytest.warns(UserWarning, match="longer than"),
        pytest.raises(InputError, match=r"max_length \(5\)"),
    ):
        memorization(cut, canaries={"p": [" the red fox runs over a dog"]})


def test_reading_canaries(tmp_path):
    path = tmp_path / "canaries.jsonl"
    path.write_text(
        '{"id": "a", "candidates": [" x"], "note": 1}\n\n{"id": 7, "candidates": [" y", " z"]}\n'
    )
    assert read_canaries(path) == {"a": [" x"], "7": [" y", " z"]}
    path.write_text(
        '{"id": "a"}\n{"id": "a", "candidates": []}\n{"id": "a", "candidates": []}\n[1]\n{"id": true, "candidates": []}\nno\n'
    )
    with pytest.raises(DataError) as error:
        read_canaries(path)
    assert [row.number for row in error.value.rows] == [1, 3, 4, 5, 6]
    path.write_text("\n")
    with pytest.raises(DataError, match="has no canaries"):
        read_canaries(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_canaries(tmp_path / "missing.jsonl")


# ---- files, tables, the command ------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with run/ (one id is hostile), truth.npz by retraining, canaries.jsonl and heldout.jsonl."""
    at = tmp_path_factory.mktemp("memorization-command")
    base = build_base("llama", layers=1, dtype=torch.float32)
    base.save_pretrained(at / "base")
    build_tokenizer().save_pretrained(at / "base")
    add_lora(base).save_pretrained(at / "adapter")
    items = rows(6)
    items[2]["id"] = HOSTILE
    canaries = [{"id": HOSTILE, "candidates": [" the", " old cats"]}]
    for name, lines in (("train", items), ("heldout", rows(3, seed=5)), ("canaries", canaries)):
        (at / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    model = influence.load(at / "base", at / "adapter", device="cpu")
    fitted = influence.fit(
        model, influence.read_examples(at / "train.jsonl"), path=(1.0,), directory=at / "run"
    )
    masks = unlearn.random_halves(6, 6)
    unlearn.retrain_subsets(
        fitted, masks, out=at / "truth.npz", recipe=unlearn.Recipe(epochs=2, batch_size=4, lr=0.02)
    )
    return at


@pytest.fixture
def command(made, run_main):
    """Call `analysis memorization` in this process."""
    fixed = ["analysis", "memorization", "--run", made / "run", "--device", "cpu", "--resamples", 5]
    return lambda *arguments: run_main(main, *fixed, *arguments)


def everything(made):
    return [
        "--truth",
        made / "truth.npz",
        "--canaries",
        made / "canaries.jsonl",
        "--heldout",
        made / "heldout.jsonl",
    ]


def test_command_as_json_and_files(made, command, tmp_path):
    result = command(
        *everything(made), "--damping", "mean:1", "--out", tmp_path / "t.csv", "--json"
    )
    assert result.status == 0, result.err
    found = result.json()
    assert found["out"] == str(tmp_path / "t.csv")
    assert [row["id"] for row in found["rows"]][2] == HOSTILE
    table = pd.read_csv(tmp_path / "t.csv")
    assert table["id"].tolist()[2] == HOSTILE
    assert table.columns.tolist() == list(found["rows"][0])
    with np.load(made / "truth.npz") as truth:
        expected = counterfactual_memorization(
            truth["train_loss"].astype(float), truth["masks"]
        ).values
    np.testing.assert_allclose(table["counterfactual_memorization"], expected, rtol=1e-12)
    assert [row["exposure"] is None for row in found["rows"]] == [
        True,
        True,
        False,
        True,
        True,
        True,
    ]
    assert found["reliability"]["models"] == 6
    assert {one["forecast"] for one in found["agreement"]} >= {
        "self_influence",
        "self_influence mean:1",
        "gap",
    }
    assert found["resamples"] == 5


def test_command_for_people_is_narrow_and_harmless(made, command, tmp_path):
    result = command(*everything(made), "-k", 4, "--out", tmp_path / "t.parquet")
    assert result.status == 0, result.err
    assert len(pd.read_parquet(tmp_path / "t.parquet")) == 6
    assert "highest counterfactual memorization: 4 of 6 rows" in result.out
    assert re.search(r"Spearman with the counterfactual memorization \(\d rows\)", result.out)
    assert "reliability of the counterfactual memorization" in result.out
    assert "\x1b" not in result.out
    assert "forged" not in result.out.split("Spearman")[1]
    head = result.out.partition("self-influence is with")[0]
    assert max(map(len, head.splitlines())) <= 80
    alone = command("-k", 99)
    assert alone.status == 0, alone.err
    assert "highest self-influence: 6 of 6 rows" in alone.out
    assert "evil [2J[red]" in alone.out
    assert "Spearman" not in alone.out


def test_command_refuses_before_it_works(made, command, tmp_path):
    (tmp_path / "there.csv").write_text("mine")
    for arguments, words in (
        (["--out", tmp_path / "there.csv"], "exists: name another"),
        (["--out", tmp_path / "t.xlsx"], "ends in .csv or .parquet"),
        (["--damping", "0.1"], "damping '0.1' was given"),
        (["--truth", tmp_path / "no.npz"], "There is no file"),
        (["--canaries", tmp_path / "no.jsonl"], "cannot be read"),
        (["--heldout", made / "train.jsonl"], "held-out rows have the content of training rows"),
        (["-k", 0], "-k 0 was given"),
        (["--seed", -1], "expected at least 0 and 1"),
    ):
        result = command(*arguments)
        assert result.status == 2, arguments
        assert words in result.err
    assert (tmp_path / "there.csv").read_text() == "mine"
    assert command("--out", tmp_path / "there.csv", "--overwrite").status == 0


# ---- the real adapter ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_self_influence_forecasts_memorization_of_the_testbed(testbed, tmp_path):
    """Measured 0.815, interval over rows [0.75, 0.87]; the loss alone gives 0.68 [0.60, 0.76]; halves of 40 adapters agree to 0.96."""
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
