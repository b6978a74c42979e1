"""`influence.estimate` beside the fit that follows: time by a clock that the work turns, bytes as they
lie on the disk.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import influence
from influence import EKFAC, GGN, KFAC, Fisher, Identity, estimating, probe
from influence.errors import InputError
from influence.gradients import Tape
from tests.conftest import build_model, examples, rows, teach
from tests.helpers import untouched, write_rows
from tests.influence.test_probe import prepared_fit
from tests.influence.toy_runs import BUDGET

N = 60


@pytest.fixture(scope="module")
def model():
    """A small model of its own, taught so that its rows share credit."""
    options = {"layers": 1, "target_modules": ["q_proj", "v_proj"], "dtype": torch.float32}
    return teach(build_model("llama", **options), examples(24), steps=5)


class Clock:
    """Seconds that a model's work makes: so many a token of each forward, twice as many of each
    backward, and of each multiplication with a gradient.
    """

    def __init__(self, monkeypatch, model, each: float = 1e-3) -> None:
        self.seconds = 0.0
        base = model.model.get_base_model()
        forward, backward = base.forward, Tape.backward

        def counted(*args, **kwargs):
            self.seconds += each * kwargs["input_ids"].numel()
            return forward(*args, **kwargs)

        def back(tape, *args, **kwargs):
            self.seconds += 2 * each * tape.valid.numel()
            return backward(tape, *args, **kwargs)

        monkeypatch.setattr(base, "forward", counted)
        monkeypatch.setattr(Tape, "backward", back)
        monkeypatch.setattr(probe, "CLOCK", lambda: self.seconds)

    def during(self, work) -> float:
        before = self.seconds
        work()
        return self.seconds - before


CASES = [
    (EKFAC(), "always", (1.0,), "raw"),
    (EKFAC(), "never", (0.4, 0.8), "raw"),
    pytest.param(EKFAC(samples=3), "auto", (0.5, 0.9), "raw", marks=pytest.mark.slow),
    (KFAC(), "never", (0.7,), "raw"),
    (Fisher(), "always", (0.8,), "raw"),
    (GGN(), "always", (0.8,), "raw"),
    (Identity(), "always", (1.0,), "raw"),
    (EKFAC(), "always", (0.6,), "function"),
    (EKFAC(), "always", (0.6,), "adam"),
    (EKFAC(), "features", (0.4, 0.8), "raw"),
    pytest.param(EKFAC(), "features", (0.6,), "function", marks=pytest.mark.slow),
    pytest.param(EKFAC(rows=20), "full", (0.6,), "raw", marks=pytest.mark.slow),
    (EKFAC(rows=20, samples=2), "none", (0.6,), "raw"),
    (KFAC(rows=20), "features", (0.6,), "raw"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("curvature", "store", "path", "geometry"), CASES)
def test_time_and_disk_are_those_of_the_fit(
    tmp_path, monkeypatch, model, curvature, store, path, geometry
):
    """Of time 20 % for what padding and the last token of a row make; of kept bytes 15 % and the
    bytes that HDF5 needs itself.
    """
    clock = Clock(monkeypatch, model)
    options = {
        "curvature": curvature,
        "store": store,
        "path": path,
        "geometry": geometry,
        "token_budget": BUDGET,
    }
    told = influence.estimate(model, examples(N), directory=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
    directory = tmp_path / "run"
    seconds = clock.during(
        lambda: influence.fit(model, examples(N), directory=directory, **options)
    )
    assert told.fit.seconds == pytest.approx(seconds, rel=0.2)
    kept = sum(p.stat().st_size for p in directory.iterdir() if p.suffix == ".h5")
    assert told.fit.kept_bytes == pytest.approx(kept, rel=0.15, abs=3 * 6_000 * len(path))
    beside = told.fit.disk_bytes - told.fit.kept_bytes - told.plan.passing_bytes
    assert (beside > 0) == told.plan.runs_again  # a checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("store", ["always", "features", "never"])
def test_scores_take_what_was_told(tmp_path, monkeypatch, model, store):
    clock, queries = Clock(monkeypatch, model), examples(9, seed=9)
    options = {"store": store, "path": (0.4, 0.8), "token_budget": BUDGET}
    told = influence.estimate(model, examples(N), queries, directory=tmp_path, **options)
    run = influence.fit(model, examples(N), directory=tmp_path / "run", **options)
    out = tmp_path / "scores.h5"
    seconds = clock.during(lambda: run.score(queries, out=out))
    assert told.queries == 9
    assert told.score.seconds == pytest.approx(seconds, rel=0.25)
    assert told.score.passes == (2 if store == "never" else 0)
    size = out.stat().st_size
    assert told.score.kept_bytes == pytest.approx(size, rel=0.15, abs=12_000)
    assert told.score.disk_bytes == told.score.kept_bytes + 4 * 2 * 9 * N


def test_rows_in_few_bytes_are_made_once_and_decoded_twice_for_their_similarities(tmp_path):
    """And once for each scoring; seconds of a row that are set, beside none."""
    prepared, plan = prepared_fit(store="features")
    speeds = probe.measure(prepared, plan, tmp_path)
    queries = prepared.tokens.select([0, 1, 2])

    def seconds(**each) -> tuple[float, float]:
        few = probe.FewBytes(coordinates=10, **each)
        work = estimating.Work(prepared, replace(speeds, features=few), 0.0)
        return work.fit(plan).seconds, work.score(plan, queries).seconds

    (fit, score), rows = seconds(), plan.points * plan.rows
    assert plan.points == 2
    assert seconds(keep=3.0) == pytest.approx((fit + 3 * rows, score + 3 * 3 * 2))
    assert seconds(decode=5.0) == pytest.approx((fit + 5 * 2 * rows, score + 5 * rows))


def test_without_queries_one_is_taken_that_is_like_a_training_row(tmp_path, model):
    told = influence.estimate(model, examples(20), directory=tmp_path, token_budget=BUDGET)
    assert told.queries == 1
    assert 0 < told.score.seconds < told.fit.seconds
    assert list(tmp_path.iterdir()) == []


def test_memory_is_more_than_what_is_held_and_grows_with_rows(tmp_path, model):
    held = probe.Memory(model.device).now()
    few, many = (
        influence.estimate(model, examples(n), directory=tmp_path, token_budget=BUDGET).fit
        for n in (20, 60)
    )
    assert held / 2 < few.memory_bytes < 4 * held
    assert many.memory_bytes > few.memory_bytes
    assert 3 * few.kept_bytes > many.kept_bytes > 1.5 * few.kept_bytes


def test_a_wrong_option_is_the_fits_error_before_anything_runs(tmp_path, model, monkeypatch):
    monkeypatch.setattr(Tape, "forward", None)
    for options, words in [
        ({"store": "some"}, "expected auto, full, features, none"),
        ({"path": (2.0,)}, "expected different numbers above 0"),
        ({"geometry": "flat"}, "expected one of raw, function, adam"),
        ({"damping": "mean"}, "expected mean:X"),
    ]:
        with pytest.raises(InputError, match=words):
            influence.estimate(model, examples(4), directory=tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_fit_of_which_the_curvature_knows_that_it_fails_is_refused(tmp_path, model, monkeypatch):
    monkeypatch.setattr("influence.curvature.fisher.MEMORY_SHARE", 0.0)
    with pytest.raises(InputError, match="curvature fisher with 20 rows needs"):
        influence.estimate(model, examples(20), directory=tmp_path, curvature=Fisher())


def test_a_text_and_json_say_the_same(tmp_path, model):
    told = influence.estimate(model, examples(20), directory=tmp_path, token_budget=BUDGET)
    record = json.loads(json.dumps(told.as_json()))
    assert {"seconds", "memory_bytes", "disk_bytes", "passes"} <= set(record["fit"])
    assert set(record["fit"]) <= set(record["score"])
    assert record["advice"] == list(told.advice)
    lines = str(told).splitlines()
    assert lines[0].startswith("fit: about ")
    assert lines[1].startswith("score, 1 query: about ")
    assert f"{told.fit.passes:.3g} passes over the rows" in lines[0]


def test_the_command_measures_and_leaves_nothing(made, influence):
    options = ["--adapter", made / "adapter", "--train", made / "train.jsonl"]
    with untouched(made):
        result = influence(
            "estimate", *options, "--queries", made / "queries.jsonl", "--run", made / "x", "--json"
        )
    assert result.status == 0, result.err
    record = result.json()
    assert record["score"]["queries"] == 4
    assert record["fit"]["passes"] == 2
    text = influence("estimate", *options, "--run", made / "x", "--path", "1.0")
    assert text.status == 0
    assert "1 passes over the rows" in text.out or "1 pass over the rows" in text.out
    assert influence("estimate", *options, "--path", "nowhere").status == 2


def test_retraining_is_told_where_the_recipe_is_known(tmp_path, model, monkeypatch):
    """The rows that it reads: those of the recipe beside the adapter."""
    from influence.prepared import prepare

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "recipe.json").write_text(json.dumps({"epochs": 3, "batch_size": 4}))
    monkeypatch.setitem(vars(model), "adapter", str(adapter))
    names = ("curvature", "path", "optimizer", "max_length", "supervise", "token_budget")
    prepared = prepare(
        model,
        examples(20),
        **dict.fromkeys((*names, "trainer_output")),
        damping="mean:0.1",
        reduction="token",
        checkpoints=(),
        geometry="raw",
        store="auto",
        disk_budget=1e9,
        row_bytes=100,
        seed=0,
    )
    assert estimating.rows_retrained(prepared) == 60


def test_rows_of_a_file_need_no_copy(tmp_path, model):
    file = write_rows(tmp_path / "train.jsonl", rows(20))
    told = influence.estimate(model, influence.read_examples(file), directory=tmp_path)
    assert np.isfinite(told.fit.seconds)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train.jsonl"]
