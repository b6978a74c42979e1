"""Training again as it was decided: the rows, the gain against trainings made by hand, refusals."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import influence
import unlearn
from analysis.cleaning import apply
from analysis.cleaning.applied import changed_rows
from analysis.cleaning.files import Decided
from analysis.stats import bootstrap_interval
from influence.errors import InputError, MismatchError
from influence.loss import mean_losses
from influence.rows import Examples

RECIPE = unlearn.Recipe(epochs=2, batch_size=4, lr=1e-2)


def decide(world, *lines):
    text = "\n".join(["id,decision,answer", *lines]) + "\n"
    (world / "list" / "rows.csv").write_text(text)


def losses_by_hand(run, rows, queries, folder, seed=0):
    """Of an adapter that another run's retraining makes of these rows."""
    model = influence.load(run.manifest.base.path, run.manifest.adapter.path, device="cpu")
    other = influence.fit(
        model, rows, curvature=influence.Identity(), store="never", directory=folder / "other"
    )
    recipe = unlearn.Recipe(epochs=2, batch_size=4, lr=1e-2, seed=seed)
    unlearn.retrain(other, out=folder / "again", recipe=recipe)
    again = influence.load(run.manifest.base.path, str(folder / "again"), device="cpu")
    shutil.rmtree(folder / "other")
    shutil.rmtree(folder / "again")
    return mean_losses(again, run.query_tokens(queries))


def test_the_gain_is_that_of_trainings_made_by_hand(run, world, tmp_path):
    decide(world, "copy,remove,", "other,relabel, sleep in warm sun", "leak,keep,")
    good = influence.read_examples(world / "good.jsonl")
    record = apply(
        world / "list", run, holdout=good[:2], recipe=RECIPE, seeds=2, seed=3, resamples=60
    )
    cleaned = Examples(
        row.answering(" sleep in warm sun") if row.id == "other" else row
        for row in run.train
        if row.id != "copy"
    )
    gains = []
    for seed in (0, 1):
        before = losses_by_hand(run, run.train, good, tmp_path, seed)
        after = losses_by_hand(run, cleaned, good, tmp_path, seed)
        gains.append(before - after)
    gains = np.array(gains)
    part = record["sets"]["good"]
    assert part["gains"] == pytest.approx(gains.mean(0), abs=1e-5)
    assert part["gain"] == pytest.approx(gains.mean(), abs=1e-5)
    assert part["by_seed"] == pytest.approx(gains.mean(1), abs=1e-5)
    assert abs(gains).max() > 1e-3  # else nothing is shown
    shown = np.array(part["gains"])
    interval = bootstrap_interval(lambda rows: shown[rows].mean(), 4, resamples=60, seed=3)
    assert (part["low"], part["high"]) == (interval.low, interval.high)
    losses = run.without(["copy", "other"], good).queries
    predicted = np.mean([each.before - each.predicted for each in losses])
    assert part["predicted"]["gain"] == pytest.approx(predicted)
    assert record["sets"]["heldout"]["gains"] == pytest.approx(gains.mean(0)[:2], abs=1e-5)
    assert (record["removed"], list(record["relabelled"])) == (["copy"], ["other"])
    assert record["kept"] == ["leak"]
    assert record == json.loads((world / "list" / "applied.json").read_text())


def test_the_adapter_loads_and_a_reference_is_trained_once(run, world, monkeypatch, capfd):
    from analysis.cleaning import applied

    decide(world, "copy,remove,")
    apply(world / "list", run, recipe=RECIPE, adapter_out=world / "cleaned")
    told = capfd.readouterr().err
    n, steps = len(run.train), RECIPE.steps(len(run.train)) + RECIPE.steps(len(run.train) - 1)
    read = RECIPE.epochs * (2 * n - 1)
    assert f"cost: 2 trainings, {steps} steps, {read} row-gradients in all" in told
    kept = json.loads((world / "cleaned" / "retrain.json").read_text())
    assert kept["removed"] == ["copy"]
    influence.load(run.manifest.base.path, str(world / "cleaned"), device="cpu")
    trained = []
    real = applied.retrain
    monkeypatch.setattr(applied, "retrain", lambda *a, **k: trained.append(1) or real(*a, **k))
    with pytest.raises(InputError, match="cleaned is not empty: give another directory, or --over"):
        apply(world / "list", run, recipe=RECIPE, adapter_out=world / "cleaned")
    apply(world / "list", run, recipe=RECIPE, adapter_out=world / "cleaned", overwrite=True)
    assert trained == []
    told = capfd.readouterr().err
    assert "cost: 1 training, " in told
    assert "in all; 1 more on all rows is there already\n" in told
    with pytest.raises(InputError, match=r"applied.json says what was applied before"):
        apply(world / "list", run, recipe=RECIPE, adapter_out=world / "another")
    apply(world / "list", run, recipe=unlearn.Recipe(epochs=1, batch_size=4), overwrite=True)
    assert trained == [1]


def test_what_is_decided_of_the_rows(run):
    rows = changed_rows(run.train, Decided(("copy",), {"first": " new"}, ("leak",)))
    assert rows.ids == [id for id in run.train.ids if id != "copy"]
    assert rows[rows.index("first")].completion == " new"
    with pytest.raises(InputError, match="every row is to be removed"):
        changed_rows(run.train, Decided(tuple(run.train.ids), {}, ()))


def test_what_is_refused(run, world, tmp_path):
    folder = world / "list"
    with pytest.raises(InputError, match="decides nothing"):
        apply(folder, run, recipe=RECIPE)
    decide(world, "copy,remove,")
    with pytest.raises(InputError, match="seeds 0 was given; expected at least 1"):
        apply(folder, run, seeds=0)
    with pytest.raises(InputError, match="no holds no list of analysis clean"):
        apply(tmp_path / "no", run)
    summary = json.loads((folder / "summary.json").read_text())

    def changed(**values):
        (folder / "summary.json").write_text(json.dumps({**summary, **values}))

    changed(run_digest="0" * 64)
    with pytest.raises(MismatchError, match="is not the run that the list in"):
        apply(folder, run)
    changed(queries={**summary["queries"], "digest": "0"})
    with pytest.raises(MismatchError, match=r"good.jsonl has changed since the list was made"):
        apply(folder, run)
    changed(queries={**summary["queries"], "path": None})
    with pytest.raises(InputError, match="good rows that came from no file: pass queries="):
        apply(folder, run)
    changed(queries=None)
    with pytest.raises(InputError, match="there are no rows to measure the gain on"):
        apply(folder, run)
    assert not (folder / "adapter").exists()
