"""The benchmark of the real model: its arithmetic on toys, and a few rows of the model itself."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import influence
from analysis.metrics.lds import Truth
from influence.loss import mean_losses
from influence.path import read_parameters, scaled
from tests.conftest import build_model, examples, rows, tokens_of
from tests.helpers import save, write_rows
from unlearn.retraining.recipe import Recipe
from unlearn.retraining.retrain import fresh_adapter, train

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import real as benchmark  # noqa: E402
import real_bed  # noqa: E402


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    """A tiny model with 50 rows of 5 authors, 10 queries, and made-up losses of 6 halves."""
    folder = tmp_path_factory.mktemp("bed")
    base, _ = save(folder, layers=1, target_modules=["q_proj", "v_proj"])
    taught = [row | {"group": f"author-{i // 10}"} for i, row in enumerate(rows(50))]
    asked = [row | {"group": f"author-{i // 2}"} for i, row in enumerate(rows(10, seed=1))]
    for name, items in (("train", taught), ("query", asked), ("heldout", rows(8, seed=2))):
        write_rows(folder / f"{name}.jsonl", items)
    rng = np.random.default_rng(0)
    masks = rng.random((6, 50)) < 0.5
    np.savez(folder / "truth.npz", masks=masks, query_loss=rng.random((6, 10)))
    (work := folder / "work").mkdir()
    bed = real_bed.RealBed(folder, base, work)
    trained = fresh_adapter(bed.model, 0)
    train(trained, bed.tokens("train"), Recipe(lr=0.03, epochs=8))
    trained.model.save_pretrained(str(folder / "adapter"))
    return real_bed.RealBed(folder, base, work)


ARGS = Namespace(kronfluence=None, bergson=None, retrained=None, rows=4, only="", threads=1)


# ---- arithmetic ----------------------------------------------------------------------------------


def test_scores_that_are_the_truth_have_an_lds_of_one_and_a_size_of_one():
    rng = np.random.default_rng(0)
    scores, masks = rng.normal(size=(4, 12)), rng.random((9, 12)) < 0.5
    truth = Truth(masks, 3 - masks @ scores.T)
    found = benchmark.faithfulness(scores, truth)
    assert found["lds"] == found["over queries"][0] == 1
    assert found["size"] == pytest.approx(1)
    thrice = benchmark.faithfulness(-3 * scores, truth)
    assert (thrice["lds"], thrice["size"]) == (-1, pytest.approx(3))


def test_rows_are_found_by_hand():
    """Query 0: its row is first. Query 1: third, the first is of its author. Query 2: a tie of all
    six, so that its row is last, and the first is of another author.
    """
    scores = np.array([[9, 1, 2, 3, 4, 5], [1, 2, 5, 4, 3, 0], [1, 1, 1, 1, 1, 1.0]])
    groups, asked = ["a", "a", "b", "b", "c", "c"], ["a", "b", "c"]
    found = benchmark.found_rows(scores, np.array([0, 4, 5]), groups, asked)
    values = {name: value for name, (value, _, _) in found.items()}
    assert values == {
        "row first": pytest.approx(1 / 3),
        "row in five": pytest.approx(2 / 3),
        "author first": pytest.approx(2 / 3),
        "reciprocal rank": pytest.approx((1 + 1 / 3 + 1 / 6) / 3),
    }


def test_forecasts_are_judged_by_hand():
    real, forecast = np.array([1.0, 2.0, 4.0, 8.0]), np.array([1.0, 3.0, 5.0, 12.0])
    found = benchmark.judged_forecast(forecast, real, forecast - 0.5, forecast + 0.5)
    assert found["spearman"] == 1
    assert found["median relative error"] == pytest.approx((0.25 + 0.5) / 2)
    assert found["median of measured over forecast"] == pytest.approx((2 / 3 + 0.8) / 2)
    assert found["inside the interval"] == 0.25


def test_times_are_divided_by_the_bare_work_of_the_same_process_where_it_has_one():
    def clocks(seconds: float) -> dict[str, float]:
        return {"wall": seconds, "cpu": 2 * seconds}

    found = {
        "threads": 1,
        "bare": {"bare": clocks(2), "peak": 1},
        "ours": {"fit": clocks(6), "score": clocks(2), "bare": clocks(4)},
        "peer": {"fit": clocks(6), "score": clocks(2)},
    }
    benchmark.ratios(found)
    assert (found["ours"]["wall over bare"], found["ours"]["cpu over bare"]) == (2, 2)
    assert (found["peer"]["wall over bare"], found["peer"]["cpu over bare"]) == (4, 4)
    alone = {"peer": {"fit": clocks(6), "score": clocks(2)}}
    benchmark.ratios(alone)
    assert list(alone["peer"]) == ["fit", "score"]


# ---- what peers get ------------------------------------------------------------------------------


def test_peers_get_the_same_tokens_and_the_same_supervision():
    """Transformers' own loss of the ready rows is this project's."""
    model, data = build_model(), examples(4)
    tokens = tokens_of(model, data)
    losses = []
    for row in json.loads(json.dumps(real_bed.ready_rows(tokens))):
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        with torch.no_grad(), model.evaluating():
            losses.append(float(model.model(input_ids=ids, labels=labels).loss))
    np.testing.assert_allclose(losses, mean_losses(model, tokens), rtol=1e-5)


def test_a_scaled_copy_is_the_point_of_the_path(bed):
    folder = bed.scaled_adapter(0.6)
    torch.testing.assert_close(
        read_parameters(bed.model, folder), scaled(bed.model, 0.6), rtol=1e-6, atol=0
    )
    assert bed.scaled_adapter(0.6) == folder


# ---- the parts, on the toy -----------------------------------------------------------------------


@pytest.mark.slow
def test_lds_and_retrieval_share_the_scores_of_every_method(bed, monkeypatch):
    found = benchmark.lds_part(bed, ARGS)
    names = ["ours", "ours, additive", "ours, additive, at 1.0", "ours and BM25", "gradient dot"]
    assert list(found) == [*names, "BM25", "hidden states"]
    assert found["ours"]["size, together"] > 0
    monkeypatch.setattr(influence, "fit", None)  # nothing is fitted or scored again
    monkeypatch.setattr(benchmark, "size_together", lambda *_: found["ours"]["size, together"])
    monkeypatch.setattr(real_bed.RealBed, "run", None)
    assert benchmark.lds_part(bed, ARGS) == found
    retrieved = benchmark.retrieval_part(bed, ARGS)
    assert len(retrieved) == len(found)
    assert all(0 <= low <= value <= high <= 1 for value, low, high in retrieved["BM25"].values())


def test_the_size_of_halves_is_that_of_their_predicted_effects(bed):
    """The same by `run.without`, one half at a time."""
    run, truth, queries = bed.run(), bed.truth, bed.rows("query")
    predicted, before = [], None
    for mask in truth.masks:
        gone = [run.train.ids[row] for row in np.flatnonzero(~mask)]
        effect = run.without(gone, queries)
        before = np.array([each.before for each in effect.queries])
        predicted.append([each.change for each in effect.queries])
    real = np.abs(truth.query_loss - before).mean()
    assert benchmark.size_together(bed, truth) == pytest.approx(np.abs(predicted).mean() / real)


def test_scores_of_the_adapter_are_those_of_a_run_of_its_own(bed, tmp_path):
    alone = influence.fit(bed.model, bed.rows("train"), directory=tmp_path / "run", path=(1.0,))
    expected = alone.score(bed.rows("query"), credit="additive").values
    found = real_bed.methods(bed, {})["ours, additive, at 1.0"]()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_a_removal_is_judged_against_the_retrained_adapter(bed):
    found = benchmark.removal_part(bed, ARGS)
    ways = found["ways"]
    assert list(ways) == ["nothing", "retraining", "unlearn remove", "ngdiff"]
    assert found["removed"] == 10
    assert ways["nothing"]["moved"] == 0
    assert max(map(abs, ways["retraining"]["KL"].values())) < 1e-6
    assert ways["nothing"]["KL"]["forget"] > 0
    assert ways["retraining"]["row-gradients"] == 240
    assert all(len(way["answers"]) == len(benchmark.SHOWN) for way in ways.values())
    kept = bed.work / "retrained-without-author-0"
    with bed.model.at(read_parameters(bed.model, kept)):
        loss = mean_losses(bed.model, bed.tokens("train").select(np.arange(10))).mean()
    assert ways["retraining"]["loss"]["forget"] == pytest.approx(loss)


def test_a_removal_that_was_measured_is_not_measured_again(bed, monkeypatch):
    found = benchmark.removal_part(bed, ARGS)
    for name in ("remove", "train"):
        monkeypatch.setattr(benchmark.unlearn, name, None)
    assert benchmark.removal_part(bed, ARGS) == found


@pytest.mark.slow
def test_difficulty_is_forecast_and_measured(bed):
    found = benchmark.difficulty_part(bed, ARGS)
    assert found["rows"] == 4
    assert {"steps", "damage", "gap"} < set(found)


def test_a_contender_is_timed_with_its_bare_work(bed):
    found = benchmark.timed(bed, "ours, one point")
    assert found["peak"] >= found["before"]
    assert found["fit"]["wall"] > 0
    assert found["bare"]["cpu"] > 0
    assert found["disk"] > 0


# ---- the model itself ----------------------------------------------------------------------------


@pytest.mark.slow
def test_gradients_of_the_real_model_are_those_of_a_plain_loop(real):
    folder, base = real
    model = influence.load(base, folder / "adapter", device="cpu")
    data = influence.read_examples(folder / "train.jsonl").select([2, 30])
    check = influence.check_gradients(model, data)
    assert check.ok, str(check)


@pytest.mark.slow
def test_plain_products_of_the_real_model_are_those_of_a_plain_loop(real, tmp_path):
    """Six rows and two queries at the adapter, `identity`: one score by hand."""
    folder, base = real
    model = influence.load(base, folder / "adapter", device="cpu")
    data = influence.read_examples(folder / "train.jsonl").select([2, 7, 30, 45, 66, 90])
    queries = influence.read_examples(folder / "query.jsonl").select([0, 1])
    options = {"curvature": influence.Identity(), "path": (1.0,)}
    run = influence.fit(model, data, directory=tmp_path / "run", **options)
    scores = run.score(queries).values
    tokens = [tokens_of(model, part) for part in (data, queries)]
    (g,), (v,) = (summed_loss_gradients(model, part.select(np.array([1]))) for part in tokens)
    expected = float(g @ v) / int(tokens[1].counts[1]) / int(tokens[0].counts.sum())
    assert scores[1, 1] == pytest.approx(expected, rel=1e-3)


def summed_loss_gradients(model, tokens) -> list[torch.Tensor]:
    """Gradients `[P]` of summed losses by transformers' own loss and autograd."""
    gradients = []
    for row in real_bed.ready_rows(tokens):
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        with model.evaluating(model.parameters), torch.enable_grad():
            loss = model.model(input_ids=ids, labels=labels).loss * (labels[0, 1:] != -100).sum()
            parts = torch.autograd.grad(loss, model.parameters)
        gradients.append(torch.cat([part.ravel() for part in parts]))
    return gradients
