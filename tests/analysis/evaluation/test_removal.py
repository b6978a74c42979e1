"""Removal: named rows by hand, losses of retrainings made by hand, resumption, refusals, command."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

import analysis
import influence
import unlearn
from analysis.cli import main
from analysis.evaluation.named_rows import random_rows
from analysis.stats import bootstrap_interval
from influence.errors import InputError, MismatchError
from influence.loss import mean_losses
from tests.conftest import build_base, build_model, examples, rows
from tests.helpers import save, write_rows
from unlearn.retraining import subsets as subsets_module
from unlearn.retraining.retrain import train

N = 10
QUERIES = examples(3, seed=9)
RECIPE = unlearn.Recipe(epochs=2, batch_size=4, lr=2e-2)
#: Sums over the queries: 3, 0, 9, -6, 0, 9, 0, 0, 12, 0; so rows 8, then 2 and 5, which tie, ...
BY_HAND = np.array([1.0, 0, 3, -2, 0, 3, 0, 0, 4, 0]) * np.ones((3, 1))
#: Of 10 rows 1 and 3.
SHARES = (0.1, 0.3)


@pytest.fixture
def run(tmp_path):
    return influence.fit(
        build_model("llama", layers=1),
        examples(N),
        curvature=influence.Identity(),
        directory=tmp_path / "run",
    )


@pytest.fixture
def asked(tmp_path):
    """What is asked in most tests: two shares, a file of scores, two random draws."""
    np.save(tmp_path / "hand.npy", BY_HAND)
    return {
        "out": tmp_path / "r.json",
        "recipe": RECIPE,
        "share": SHARES,
        "scores": [tmp_path / "hand.npy"],
        "draws": 2,
        "resamples": 50,
    }


def entry(record, method, share):
    (found,) = (e for e in record["removals"] if (e["method"], e["share"]) == (method, share))
    return found


# ---- what is named, and what is measured -----------------------------------------------------


def test_the_rows_are_those_with_the_largest_sums(run, asked, tmp_path):
    record = analysis.removal(run, QUERIES, **asked)
    ids, hand = run.train.ids, str(tmp_path / "hand.npy")
    assert [(e["method"], e["share"], e["rows"]) for e in record["removals"]] == [
        (method, share, rows)
        for share, rows in zip(SHARES, (1, 3), strict=True)
        for method in ("influence", hand, "BM25", "random")
    ]
    assert entry(record, hand, 0.1)["sets"][0]["ids"] == [ids[8]]
    assert entry(record, hand, 0.3)["sets"][0]["ids"] == [ids[8], ids[2], ids[5]]
    assert entry(record, hand, 0.3)["positive"] == 3
    own = run.score(QUERIES).values.astype(np.float64).sum(axis=0)
    by_influence = [ids[i] for i in sorted(range(N), key=lambda i: -own[i])]
    for share, k in zip(SHARES, (1, 3), strict=True):
        assert entry(record, "influence", share)["sets"][0]["ids"] == by_influence[:k]
        drawn = [[ids[i] for i in random_rows(N, draw, 0)[:k]] for draw in (0, 1)]
        assert [part["ids"] for part in entry(record, "random", share)["sets"]] == drawn
    assert record["left_out"] == {}
    assert json.loads((tmp_path / "r.json").read_text()) == record


def test_the_losses_are_those_of_single_retrainings(run, asked, tmp_path):
    """Two seeds; every set by `unlearn.retrain`, its adapter loaded back."""
    record = analysis.removal(run, QUERIES, seeds=2, **asked)

    def losses(removed, seed):
        folder = unlearn.retrain(
            run,
            removed,
            out=tmp_path / "one",
            recipe=replace(RECIPE, seed=seed),
            overwrite=True,
        )
        from peft import PeftModel

        model = PeftModel.from_pretrained(build_base("llama", layers=1), str(folder)).double()
        adapted = influence.from_peft(model, run.model.tokenizer)
        return mean_losses(adapted, run.query_tokens(QUERIES))

    reference = np.stack([losses([], seed) for seed in (0, 1)])
    assert record["reference"]["losses"] == pytest.approx(reference.mean(axis=0), abs=1e-12)
    assert record["reference"]["loss"] == pytest.approx(reference.mean(), abs=1e-12)

    def rises(method, share):
        """[sets, seeds, Q]"""
        return np.stack(
            [
                np.stack([losses(part["ids"], seed) for seed in (0, 1)]) - reference
                for part in entry(record, method, share)["sets"]
            ]
        )

    at_random, by_hand = rises("random", 0.3), rises(str(tmp_path / "hand.npy"), 0.3)
    found = entry(record, str(tmp_path / "hand.npy"), 0.3)
    assert found["by_seed"] == pytest.approx(by_hand[0].mean(axis=1), abs=1e-12)
    assert entry(record, "random", 0.3)["by_seed"] == pytest.approx(
        at_random.mean(axis=(0, 2)), abs=1e-12
    )
    assert [part["rise"] for part in entry(record, "random", 0.3)["sets"]] == pytest.approx(
        at_random.mean(axis=(1, 2)), abs=1e-12
    )
    per_query, of_random = by_hand.mean(axis=(0, 1)), at_random.mean(axis=(0, 1))
    assert found["rises"] == pytest.approx(per_query, abs=1e-12)
    assert entry(record, "random", 0.3)["over_random"] is None
    for part, values in (
        (found["rise"], per_query),
        (found["over_random"], per_query - of_random),
        (entry(record, "random", 0.3)["rise"], of_random),
    ):
        interval = bootstrap_interval(lambda q, v=values: float(v[q].mean()), 3, resamples=50)
        expected = [values.mean(), interval.low, interval.high]
        assert [part["mean"], part["low"], part["high"]] == pytest.approx(expected, abs=1e-12)
    assert np.abs(by_hand).max() > 1e-3


def trained_sets(monkeypatch, stop=None):
    """The rows of every training from here on, one of which may be killed at its end."""
    seen = []

    def spied(model, tokens, recipe):
        loss = train(model, tokens, recipe)
        if len(seen) == stop:
            raise KeyboardInterrupt
        seen.append((tuple(tokens.ids), recipe.seed))
        return loss

    monkeypatch.setattr(subsets_module, "train", spied)
    return seen


def test_a_set_that_is_named_twice_is_trained_once(run, asked, tmp_path, monkeypatch):
    """The file beside it names the same rows in another order; 0.1 and 0.12 of 10 are one row."""
    np.save(tmp_path / "other.npy", BY_HAND + np.eye(10)[5])
    files = [*asked["scores"], tmp_path / "other.npy"]
    seen = trained_sets(monkeypatch)
    asked |= {"scores": files, "share": (0.1, 0.12, 0.3), "seeds": 2}
    record = analysis.removal(run, QUERIES, **asked)
    assert len(seen) == len(set(seen))
    first, second = (entry(record, str(path), 0.3) for path in files)
    assert first["sets"][0]["ids"] != second["sets"][0]["ids"]
    assert first["rises"] == second["rises"]
    named = {frozenset(part["ids"]) for e in record["removals"] for part in e["sets"]}
    left = {frozenset(run.train.ids) - set(kept) for kept, _ in seen}
    assert left == named | {frozenset()}
    assert {seed for _, seed in seen} == {0, 1}


def test_fewer_rows_than_one_a_share_and_no_word_in_common(run, asked, tmp_path):
    strange = influence.examples_from_rows([{"prompt": "zebra", "completion": " quartz"}])
    asked |= {"scores": [], "share": (0.01, 0.05), "draws": 1}
    record = analysis.removal(run, strange, **asked)
    assert record["left_out"] == {"BM25": "it has no word in common with any row"}
    assert [e["method"] for e in record["removals"]] == ["influence", "random"] * 2
    assert {e["rows"] for e in record["removals"]} == {1}
    first, second = (entry(record, "influence", share) for share in (0.01, 0.05))
    assert {**first, "share": 0} == {**second, "share": 0}
    assert (first["rise"]["low"], first["rise"]["high"]) == (None, None)  # of a single query


# ---- going on, and what is in the way --------------------------------------------------------


def test_killed_and_called_again_gives_the_same_record(run, asked, tmp_path, monkeypatch):
    whole = analysis.removal(run, QUERIES, **asked | {"out": tmp_path / "whole.json"})
    with monkeypatch.context() as patch:
        before = trained_sets(patch, stop=3)
        with pytest.raises(KeyboardInterrupt):
            analysis.removal(run, QUERIES, **asked)
    assert not asked["out"].exists()
    with monkeypatch.context() as patch:
        after = trained_sets(patch)
        assert analysis.removal(run, QUERIES, **asked) == whole
    assert len(before) == 3
    assert not set(before) & set(after)
    assert asked["out"].read_bytes() == (tmp_path / "whole.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(subsets_module, "train", None)
        patch.setattr(influence.Run, "score", None)
        assert analysis.removal(run, QUERIES, **asked) == whole


def test_another_request_is_refused_and_replaced_when_asked(run, asked, monkeypatch):
    first = analysis.removal(run, QUERIES, **asked)
    kept = asked["out"].read_bytes()
    np.save(asked["scores"][0], -BY_HAND)
    with pytest.raises(MismatchError, match=r"r.json is of another removal: scores differ"):
        analysis.removal(run, QUERIES, **asked)
    other = asked | {"draws": 1, "seed": 1, "recipe": replace(RECIPE, lr=0.01)}
    with pytest.raises(
        MismatchError, match=r"recipe, scores, draws, seed differ. Ask for the same"
    ):
        analysis.removal(run, QUERIES, **other)
    with pytest.raises(MismatchError, match="queries, scores differ"):
        analysis.removal(run, QUERIES[:2], **asked | {"scores": []})
    assert asked["out"].read_bytes() == kept
    second = analysis.removal(run, QUERIES, **other, overwrite=True)
    assert second["removals"] != first["removals"]
    seen = trained_sets(monkeypatch)  # the same again with overwrite trains nothing
    assert analysis.removal(run, QUERIES, **other, overwrite=True) == second
    assert seen == []


def test_losses_of_another_request_are_not_gone_on_with(run, asked, monkeypatch):
    """Killed, and asked for something else: the record is not there yet, the losses are."""
    with monkeypatch.context() as patch:
        trained_sets(patch, stop=1)
        with pytest.raises(KeyboardInterrupt):
            analysis.removal(run, QUERIES, **asked)
    with pytest.raises(MismatchError, match=r"r.losses.npz holds other subsets: .*lr is 0.02, now"):
        analysis.removal(run, QUERIES, **asked | {"recipe": replace(RECIPE, lr=0.01)})
    with pytest.raises(MismatchError, match=r"r.scores.h5 holds other scores .of other queries"):
        analysis.removal(run, QUERIES[::-1], **asked | {"scores": []})


@pytest.mark.parametrize("text", ["mine", "[]", '{"kind": "removal"}', '{"a": 1}'])
def test_what_is_no_record_of_a_removal_stays(run, asked, text):
    asked["out"].write_text(text)
    for overwrite in (False, True):
        with pytest.raises(InputError, match="is no record of a removal and stays"):
            analysis.removal(run, QUERIES, **asked, overwrite=overwrite)
    assert asked["out"].read_text() == text


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"share": (0.1, 0.97)}, "--share 0.97 of 10 rows is all of them"),
        ({"share": (1.5,)}, "--share 1.5 was given; expected numbers between 0 and 1"),
        ({"draws": 0}, "--draws 0 was given; expected at least 1"),
        ({"scores": ["nowhere.npy"]}, "nowhere.npy does not exist"),
        ({"out": "r.csv"}, "--out r.csv was given; expected a file that ends in .json"),
        ({"out": "no/r.json"}, "there is no folder no to write r.json into"),
        ({"queries": influence.Examples()}, "no queries were given"),
    ],
)
def test_what_cannot_be_is_refused_before_work_starts(run, asked, monkeypatch, change, sentence):
    monkeypatch.setattr(influence.Run, "score", None)
    monkeypatch.setattr(subsets_module, "train", None)
    with pytest.raises(InputError, match=sentence):
        analysis.removal(run, **{"queries": QUERIES} | asked | change)
    assert not asked["out"].exists()


def test_an_adapter_that_cannot_be_drawn_again_is_refused_before_scoring(run, asked, monkeypatch):
    monkeypatch.setattr(influence.Run, "score", None)
    run.model.model.peft_config["default"].init_lora_weights = "pissa"
    with pytest.raises(InputError, match="init_lora_weights='pissa', which changes the base"):
        analysis.removal(run, QUERIES, **asked)


def test_where_no_method_names_rows_nothing_is_trained(run, asked, monkeypatch):
    monkeypatch.setattr(subsets_module, "train", None)
    monkeypatch.setattr(
        influence.Run, "score", lambda self, queries, out, **_: flat_scores(self, queries, out)
    )
    strange = influence.examples_from_rows([{"prompt": "zebra", "completion": " quartz"}])
    with pytest.raises(InputError, match="no method names any rows"):
        analysis.removal(run, strange, **asked | {"scores": []})


def flat_scores(run, queries, out):
    from influence.store import write_file

    write_file(
        out,
        {"scores": np.zeros((len(queries), len(run.train)))},
        strings={"query_ids": queries.ids, "train_ids": run.train.ids},
    )


# ---- the command -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """base/, adapter/, train.jsonl, queries.jsonl, recipe.json, run/ and scores of two kinds."""
    at = tmp_path_factory.mktemp("removal")
    save(at, layers=1)
    for name, items in (("train", rows(N)), ("queries", rows(3, seed=9))):
        write_rows(at / f"{name}.jsonl", items)
    (at / "recipe.json").write_text(json.dumps({"epochs": 2, "batch_size": 4, "lr": 0.02}))
    model = influence.load(at / "base", at / "adapter", device="cpu")
    data = influence.read_examples(at / "train.jsonl")
    run = influence.fit(model, data, curvature=influence.Identity(), directory=at / "run")
    queries = influence.read_examples(at / "queries.jsonl")
    run.score(queries, out=at / "margin.h5", measurement="margin")
    np.save(at / "hand.npy", BY_HAND)
    return at


@pytest.fixture
def command(folder, run_main):
    fixed = ["--run", folder / "run", "--queries", folder / "queries.jsonl", "--device", "cpu"]
    fixed += ["--recipe", folder / "recipe.json", "--draws", 1, "--resamples", 20]
    return lambda *arguments: run_main(main, "analysis", "removal", *fixed, *arguments)


def test_the_command_writes_what_the_function_returns(command, folder, tmp_path):
    scores = ["--scores", folder / "hand.npy", folder / "margin.h5"]
    typed = ["--share", "0.1,0.3", *scores]
    done = command(*typed, "--out", tmp_path / "r.json", "--json")
    assert done.status == 0, done.err
    expected = analysis.removal(
        influence.Run.open(folder / "run", device="cpu"),
        influence.read_examples(folder / "queries.jsonl"),
        out=tmp_path / "again.json",
        recipe=unlearn.Recipe.read(folder / "recipe.json"),
        share=SHARES,
        scores=[folder / "hand.npy", folder / "margin.h5"],
        draws=1,
        resamples=20,
    )
    assert done.json() == expected
    assert json.loads((tmp_path / "r.json").read_text()) == expected
    made = {path.name for path in tmp_path.iterdir()}
    assert {"r.json", "r.scores.h5", "r.losses.npz"} <= made
    margin = influence.Scores.load(folder / "margin.h5")
    worst = int(np.argmin(margin.values.astype(np.float64).sum(axis=0)))  # it falls
    named = entry(expected, str(folder / "margin.h5"), 0.1)["sets"][0]["ids"]
    assert named == [margin.train_ids[worst]]


def test_the_command_prints_a_table(command, folder, tmp_path):
    done = command("--share", "0.1", "--out", tmp_path / "r.json")
    assert done.status == 0, done.err
    record = json.loads((tmp_path / "r.json").read_text())
    assert "without 1 of 10 rows (0.1)" in done.out
    for method in ("influence", "BM25", "random"):
        mean = f"{entry(record, method, 0.1)['rise']['mean']:+.4f}"
        assert any(line.split()[:2] == [method, mean] for line in done.out.splitlines())
    assert f"{tmp_path / 'r.json'}: every number and id" in done.out
    assert "trainings" in done.err
    again = command("--share", "0.1", "--out", tmp_path / "r.json")
    assert (again.out, "trainings" in again.err) == (done.out, False)


def test_wrong_calls(command, folder, tmp_path):
    for arguments, sentence in (
        (["--share", "a", "--out", tmp_path / "r.json"], "--share 'a' was given; expected numbers"),
        (["--out", tmp_path / "r.txt"], "expected a file that ends in .json"),
        (["--out", tmp_path / "r.json", "--scores", folder / "recipe.json"], "not an HDF5 file"),
        (["--out", folder / "recipe.json"], "is no record of a removal and stays"),
    ):
        done = command(*arguments)
        assert done.status == 2, done.err
        assert sentence in " ".join(done.err.split())
        assert done.out == ""
    assert not list(tmp_path.iterdir())
