"""The whole list: every reason, what is left out and why, what is written, what is refused."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

import influence
from analysis.cleaning import clean, cleaning, opposition, repeats
from analysis.cleaning.files import read_decisions
from analysis.cleaning.findings import REASONS, Finding, Found
from analysis.cleaning.opposition import kin
from analysis.cleaning.texts import plain, said, vectors
from influence.errors import InputError
from influence.row_ids import read_ids
from tests.analysis.cleaning.conftest import EMAIL
from tests.conftest import build_model, examples


@pytest.fixture(scope="module")
def good(made):
    return influence.read_examples(made / "good.jsonl")


@pytest.fixture(scope="module")
def result(run, good):
    return clean(run, good)


def rows_of(result, reason):
    ids = result.run.train.ids
    return [ids[each.row] for each in result.found[reason].findings]


def test_every_reason_is_looked_at(result):
    assert set(result.found) == set(REASONS)
    assert result.left_out == {}
    assert rows_of(result, "duplicate") == ["copy"]
    assert set(rows_of(result, "contradiction")) == {"first", "other"}
    assert rows_of(result, "personal") == ["leak"]
    assert [found.reason for found in result.found.values()] == list(REASONS)


def test_vectors_of_questions_answers_and_both_are_fitted_once(run, good, monkeypatch):
    """Once more with the good rows, where some row has none of its group."""
    fitted = []

    def told(texts):
        fitted.append(list(texts))
        return vectors(texts)

    for module in (cleaning, opposition, repeats):
        monkeypatch.setattr(module, "vectors", told, raising=False)
    clean(run, good)
    texts = [said(row, str) for row in run.train]
    whole = [each.whole for each in texts]
    of_all = [
        [each.asked for each in texts],
        [plain(each.answer) for each in texts],
        whole,
        [*whole, *(said(row, str).whole for row in good)],
    ]
    assert sorted(each for each in fitted if len(each) >= len(texts)) == sorted(of_all)


def test_harms_is_what_the_scores_say(result, run, good):
    scores = run.score(good).values.astype(float)
    texts, asked = ([said(row, str) for row in part] for part in (run.train, good))
    own = kin(run.train, good, texts, asked)
    for row, each in enumerate(own):
        assert result.found["harms"].scores[row] == pytest.approx(-scores[each, row].mean())
    for finding in result.found["harms"].findings:
        assert finding.gain == pytest.approx(-scores[own[finding.row], finding.row].mean())


def test_what_is_predicted_is_of_all_together(result, run, good):
    ids = [run.train.ids[row] for row in sorted({*result.remove, *result.relabel})]
    losses = run.without(ids, good).queries
    predicted = result.summary["predicted"]["suggested"]
    assert predicted["rows"] == len(ids)
    assert predicted["gain"] == pytest.approx(
        np.mean([each.before - each.predicted for each in losses])
    )
    assert predicted["low"] <= predicted["gain"] <= predicted["high"]


def test_without_good_rows_nothing_harms_and_nothing_is_predicted(run):
    found = clean(run)
    assert "harms" not in found.found
    assert found.left_out == {"harms": "no good rows were given (--queries FILE)"}
    assert found.summary["predicted"] == {
        "suggested": {
            "rows": len(found.remove) + len(found.relabel),
            "gain": None,
            "reason": "no good rows were given",
        }
    }


def test_an_adapter_whose_rows_share_no_credit(tmp_path):
    """Where scores are plain products of gradients, nothing is shared."""
    run = influence.fit(
        build_model("llama", layers=1),
        examples(6),
        curvature=influence.Identity(),
        directory=tmp_path / "run",
    )
    found = clean(run, examples(2, seed=4))
    assert "label" in found.left_out
    assert found.summary["predicted"]["harms"]["gain"] is None


def test_the_folder(made, run, result):
    folder = made / "list"
    lines = list(csv.DictReader((folder / "rows.csv").open(encoding="utf-8", newline="")))
    assert [line["reason"] for line in lines] == [
        found.reason for found in result.found.values() for _ in found.findings
    ]
    assert EMAIL not in (folder / "rows.csv").read_text(encoding="utf-8")
    ids = run.train.ids
    assert read_ids(folder / "remove.txt", run.train) == [ids[row] for row in result.remove]
    kept, expected = json.loads((folder / "summary.json").read_text()), dict(result.summary)
    predicted = kept.pop("predicted")["suggested"]
    assert predicted == pytest.approx(expected.pop("predicted")["suggested"], rel=1e-4)
    assert kept == expected
    taken = read_decisions(folder, run.train, suggested=True)
    assert set(taken.removed) == {ids[row] for row in result.remove}
    assert taken.relabelled == {ids[row]: answer for row, answer in result.relabel.items()}


def test_the_list_is_limited(run):
    found = clean(run, most=1)
    assert all(part["listed"] <= 1 for part in found.summary["reasons"].values())
    assert found.summary["reasons"]["contradiction"] == {
        "listed": 1,
        "found": 2,
        "rule": found.found["contradiction"].rule,
    }


def test_a_secret_of_one_row_is_no_answer_for_another(run, monkeypatch):
    finding = Finding(0, "contradiction", 1.0, "seen", suggested="relabel", answer=f" {EMAIL}")
    told = Found("contradiction", "", np.ones(len(run.train)), (finding,))
    monkeypatch.setattr(cleaning, "contradictions", lambda *a: told)
    found = clean(run)
    assert not any(EMAIL in answer for answer in found.relabel.values())
    (only,) = found.found["contradiction"].findings
    assert (only.answer, only.suggested) == (None, "")


def test_nothing_is_replaced_unasked(run, world, tmp_path):
    (world / "list" / "notes.txt").write_text("mine")
    (world / "list" / "applied.json").write_text("{}")
    with pytest.raises(InputError, match="list holds a list already: give another --out, or --ov"):
        clean(run, out=world / "list")
    clean(run, out=world / "list", overwrite=True)
    assert (world / "list" / "notes.txt").read_text() == "mine"
    assert not (world / "list" / "applied.json").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(InputError, match="full holds no list of analysis clean and stays"):
        clean(run, out=tmp_path / "full", overwrite=True)
    with pytest.raises(InputError, match="--most 0 was given"):
        clean(run, most=0)
