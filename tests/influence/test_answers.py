"""What `influence top` shows of a score file; of `without`, see test_without.py."""

from __future__ import annotations

import json
import re

import h5py
import numpy as np
import pytest

from influence.answers import describe, rows_scored, scores_of
from influence.errors import MismatchError
from influence.scorefile import Scores
from influence.text_search import bm25
from tests.conftest import rows
from tests.helpers import untouched, write_rows
from tests.influence.toy_commands import fit_arguments, wrong


def test_what_scores_were_made_with_is_said_in_one_line():
    attributes = {"geometry": "raw", "curvature": "ekfac", "damping": "mean:0.1"}
    attributes |= {"points": ["0.4", "0.8"], "calibration": "none"}
    made = "raw ekfac, damping mean:0.1, points 0.4, 0.8, credit "
    retrained = {"calibration": "retraining of 3 subsets"}
    for more, said in (
        ({}, "additive, size not calibrated"),  # as files say that were written before
        ({"credit": "additive"}, "additive, size not calibrated"),
        ({"credit": "additive"} | retrained, "additive, size calibrated by retraining of 3 subse"),
        ({"credit": "shared"}, "shared, size from the losses along the path"),
        ({"credit": "shared"} | retrained, "shared, size calibrated by retraining of 3 subsets"),
    ):
        assert describe(attributes | more).startswith(made + said)


def test_top_lists_proponents_and_opponents_by_id_or_position(influence, made):
    by_id = influence("top", "--run", made / "run", "--query", "r9-1", "-k", 2, "--json")
    by_position = influence("top", "--run", made / "run", "--query", 1, "-k", 2, "--json")
    assert by_id.status == by_position.status == 0
    assert by_id.json() == by_position.json()
    with h5py.File(made / "run" / "scores.h5") as file:
        row, ids = file["scores"][1], file["train_ids"].asstr()[()]
    found = by_id.json()
    assert found["query"] == "r9-1"
    assert [entry["id"] for entry in found["proponents"]] == [ids[i] for i in np.argsort(-row)[:2]]
    assert [entry["id"] for entry in found["opponents"]] == [ids[i] for i in np.argsort(row)[:2]]
    assert all(
        entry["score"] == float(row[entry["index"]])
        for entry in found["proponents"] + found["opponents"]
    )
    text = influence("top", "--run", made / "run", "--query", "r9-1", "-k", 2)
    assert text.status == 0
    assert "proponents of r9-1" in text.out
    assert "opponents of r9-1" in text.out
    assert all(entry["id"] in text.out for entry in found["proponents"] + found["opponents"])


def test_top_needs_no_model_but_the_rows_it_was_fitted_on(influence, at):
    manifest = at / "run" / "manifest.json"
    record = json.loads(manifest.read_text())
    record["base"]["path"] = record["adapter"]["path"] = "gone"
    record["data"]["path"] = str(at / "train.jsonl")
    manifest.write_text(json.dumps(record))
    assert influence("top", "--run", at / "run", "--query", 0).status == 0
    write_rows(at / "train.jsonl", rows(20, seed=1))
    result = influence("top", "--run", at / "run", "--query", 0)
    assert result.status == 2
    assert "has changed since" in result.err
    (at / "train.jsonl").unlink()
    assert (
        influence("top", "--run", at / "run", "--query", 0).status == 0
    )  # ids and scores are still shown


def test_top_shows_no_texts_where_the_hub_is_not_reached(influence, at, monkeypatch):
    manifest = json.loads((at / "run" / "manifest.json").read_text())
    manifest["data"]["path"] = "org/name@v1:train"
    (at / "run" / "manifest.json").write_text(json.dumps(manifest))

    def unreachable(*given, **how):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    shown = influence("top", "--run", at / "run", "--query", 0)
    assert shown.status == 0, shown.err
    assert "note: the rows' texts are not shown: org/name@v1:train is no file" in shown.err


@pytest.mark.parametrize("query", ["r9-99", "4", "-1", "", "0.5"])
def test_an_unknown_query(influence, at, query):
    sentence = (
        f"query {query!r} was given; there are 4 scored queries: give a position 0..3 or one of "
        "the ids r9-0, r9-1"
    )
    wrong(influence, at, ["top", "--run", at / "run", f"--query={query}"], sentence)


def test_top_refuses_scores_of_another_run(influence, at):
    influence(*fit_arguments(at, seed=1))
    with untouched(at):
        result = influence(
            "top", "--run", at / "new", "--scores", at / "run" / "scores.h5", "--query", 0
        )
    assert result.status == 2
    assert "belongs to another run than" in result.err


def test_a_run_with_self_influence_only_has_no_scores_to_show(influence, at):
    influence("self", "--run", at / "run", "--out", at / "self.h5")
    wrong(
        influence,
        at,
        ["top", "--run", at / "run", "--scores", at / "self.h5", "--query", 0],
        "it lacks scores",
        status=1,
    )


def test_the_strongest_are_shown_where_the_other_file_has_self_influences_alone(influence, at):
    scored = at / "run" / "scores.h5"
    queries = ("--queries", at / "queries.jsonl")
    assert influence("score", "--run", at / "run", *queries, "--top", 2).status == 0
    assert scores_of(at / "run") == scored
    with h5py.File(scored, "r+") as file:
        del file["scores"], file["query_ids"]
    assert scores_of(at / "run") == at / "run" / "strongest.h5"
    found = influence("top", "--run", at / "run", "--query", 0, "-k", 1, "--json")
    assert found.status == 0, found.err
    assert len(found.json()["proponents"]) == 1
    (at / "run" / "strongest.h5").unlink()
    assert scores_of(at / "run") is None


def test_rows_that_were_scored_are_known_by_their_digest(made, tmp_path):
    attributes = Scores.load(made / "run" / "scores.h5").attributes
    found = rows_scored(attributes)
    assert found is not None
    assert found.digest == attributes["query_digest"]
    assert rows_scored(attributes | {"aggregate": "sum"}) is None
    assert rows_scored(attributes | {"queries": str(tmp_path / "gone.jsonl")}) is None
    assert rows_scored(attributes | {"query_digest": "other"}) is None
    assert rows_scored({}) is None
    other = write_rows(tmp_path / "other.jsonl", rows(1))
    with pytest.raises(MismatchError, match="is not what was scored"):
        rows_scored(attributes, str(other))


# ---- by text, whole rows, tokens -----------------------------------------------------------------


def standardise(values):
    return (values - values.mean()) / values.std()


def test_rows_are_ranked_by_their_words_and_by_both(influence, at):
    """By hand: BM25 of the query with the rows, alone, and standardised beside the scores."""
    train, queries = rows_in(at / "train.jsonl"), rows_in(at / "queries.jsonl")
    with h5py.File(at / "run" / "scores.h5") as file:
        scores = file["scores"][0].astype(float)
    text = [f"{row['prompt']}{row['completion']}" for row in (queries[0], *train)]
    similar = bm25(text[:1], text[1:])[0]
    both = standardise(similar) + standardise(scores)
    for by, ranked in (("text", similar), ("both", both)):
        found = influence("top", "--run", at / "run", "--query", 0, "-k", 3, "--by", by, "--json")
        assert found.status == 0, found.err
        entries = found.json()["rows"]
        expected = np.argsort(-ranked, kind="stable")[:3]
        assert [entry["index"] for entry in entries] == expected.tolist()
        assert [entry["text"] for entry in entries] == pytest.approx(similar[expected])
        assert [entry["score"] for entry in entries] == pytest.approx(scores[expected])
    shown = influence("top", "--run", at / "run", "--query", 0, "--by", "both").out
    assert "BM25" in shown
    assert "rows that say what" in shown


def test_texts_are_needed_where_they_rank(influence, at, tmp_path):
    (at / "queries.jsonl").rename(tmp_path / "elsewhere.jsonl")
    with h5py.File(at / "run" / "scores.h5", "r+") as file:
        file.attrs["queries"] = str(at / "queries.jsonl")
    call = ("top", "--run", at / "run", "--query", 0, "--by", "text")
    refused = influence(*call)
    assert refused.status == 2
    assert "--queries FILE" in refused.err
    assert influence(*call, "--queries", tmp_path / "elsewhere.jsonl").status == 0
    other = write_rows(tmp_path / "others.jsonl", rows(2, seed=77))
    refused = influence(*call, "--queries", other)
    assert refused.status == 2
    assert "is not what was scored" in refused.err
    assert influence("top", "--run", at / "run", "--query", 0).status == 0  # effect needs no text


def test_an_unknown_ranking_is_refused(influence, at):
    refused = influence("top", "--run", at / "run", "--query", 0, "--by", "luck")
    assert refused.status == 2
    assert "expected effect, text, both" in refused.err


def test_rows_are_shown_whole_on_request(influence, at):
    long = [row | {"completion": " red" * 60} for row in rows(6)]
    write_rows(at / "long.jsonl", long)
    arguments = fit_arguments(at, train=at / "long.jsonl", run=at / "long")
    assert influence(*arguments).status == 0
    scored = influence("score", "--run", at / "long", "--queries", at / "queries.jsonl")
    assert scored.status == 0
    call = ("top", "--run", at / "long", "--query", 0, "-k", 1)
    assert influence(*call).out.count("red") < 60
    assert influence(*call, "--whole").out.count("red") >= 60


def test_the_tokens_that_carry_a_score_are_shown_where_the_file_has_them(influence, at):
    out = at / "tokens.h5"
    scored = influence(
        "score", "--run", at / "run", "--queries", at / "queries.jsonl", "--per-token", "--out", out
    )
    assert scored.status == 0, scored.err
    found = Scores.load(out)
    for query in (0, 2):
        call = ("top", "--run", at / "run", "--query", query, "-k", 1, "--scores", out)
        shown = influence(*call)
        assert shown.status == 0, shown.err
        best = found.top(query, 1)[0][0].index
        largest = max(found.tokens.row(query, best)[1], key=abs)
        assert re.search(rf"\[at '[^']*' {re.escape(f'{largest:+.1e}')}", shown.out)


def rows_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_shared_words_are_marked_on_a_terminal_alone(influence, at, monkeypatch):
    """By hand: the words of the query that are in at most a fifth of the rows."""
    rows_ = [f"common {word}" for word in ("aster", "birch", "cedar", "dahlia", "elm", "fir") * 3]
    write_rows(
        at / "train.jsonl",
        [
            {"id": f"t{k}", "prompt": "common", "completion": text[6:]}
            for k, text in enumerate(rows_)
        ],
    )
    write_rows(at / "queries.jsonl", [{"id": "q", "prompt": "common", "completion": " cedar"}])
    influence(*fit_arguments(at))
    influence("score", "--run", at / "new", "--queries", at / "queries.jsonl")
    top = ("top", "--run", at / "new", "--query", 0, "--by", "text", "-k", 1)
    assert "\x1b" not in influence(*top).out
    monkeypatch.setenv("FORCE_COLOR", "1")
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.setenv(name, "xterm" if name == "TERM" else "1")
        marked = influence(*top).out
        assert marked.count("\x1b[1;4mcedar\x1b[0m") == 2  # of the query and of the row
        assert "mcommon" not in marked
