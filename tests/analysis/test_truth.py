"""`analysis lds` from ready losses and by retraining: the same answer, the same rows, refusals that
name what differs.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import influence
import unlearn
from analysis.cli import main
from analysis.metrics.lds import lds
from analysis.truth import check_same_ids, ready_truth, retrained_truth
from influence.errors import InputError, MismatchError
from influence.scorefile import Scores
from tests.conftest import add_lora, build_base, build_tokenizer, rows

HOSTILE = "q\x1b[2J\nforged  line"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with base/, adapter/, train.jsonl, queries.jsonl, recipe.json, run/ with its scores,
    and truth.npz.
    """
    at = tmp_path_factory.mktemp("truth")
    base = build_base("llama", layers=1, dtype=torch.float32)
    base.save_pretrained(at / "base")
    build_tokenizer().save_pretrained(at / "base")
    add_lora(base).save_pretrained(at / "adapter")
    asked = rows(3, seed=9)
    asked[1]["id"] = HOSTILE
    for name, items in (("train", rows(8)), ("queries", asked), ("reversed", asked[::-1])):
        (at / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    (at / "recipe.json").write_text('{"epochs": 2, "batch_size": 4, "lr": 0.02}')
    model = influence.load(at / "base", at / "adapter", device="cpu")
    train = influence.read_examples(at / "train.jsonl")
    run = influence.fit(model, train, curvature=influence.Identity(), directory=at / "run")
    queries = influence.read_examples(at / "queries.jsonl")
    run.score(queries, out=at / "scores.h5")
    recipe = unlearn.Recipe.read(at / "recipe.json")
    unlearn.retrain_subsets(
        run, unlearn.random_halves(8, 5), queries, out=at / "truth.npz", recipe=recipe
    )
    return at


@pytest.fixture
def command(made, run_main):
    """Call `analysis lds` in this process: status, standard output, standard error."""
    fixed = ["analysis", "lds", "--scores", made / "scores.h5", "--resamples", 50]
    return lambda *arguments: run_main(main, *fixed, *arguments)


def retraining(made, **changes):
    options = {
        "run": made / "run",
        "queries": made / "queries.jsonl",
        "recipe": made / "recipe.json",
        "device": "cpu",
    }
    options |= {name.replace("_", "-"): value for name, value in changes.items()}
    return [part for name, value in options.items() for part in (f"--{name}", value)]


def test_ready_losses(command, made):
    result = command("--truth", made / "truth.npz", "--json")
    assert result.status == 0, result.err
    found = json.loads(result.out)
    with np.load(made / "truth.npz") as truth:
        expected = lds(
            Scores.load(made / "scores.h5").values,
            truth["masks"],
            truth["query_loss"],
            resamples=50,
        )
    assert found["lds"] == pytest.approx(expected.mean, abs=1e-12)
    assert (found["low"], found["high"]) == pytest.approx(
        (expected.interval.low, expected.interval.high), abs=1e-12
    )
    assert found["per_query"] == pytest.approx(expected.per_query.tolist(), abs=1e-12)
    assert found["query_ids"] == ["r9-0", HOSTILE, "r9-2"]
    assert (found["subsets"], found["queries"]) == (5, 3)


def test_retraining_first_gives_the_same_and_can_be_reused(command, made, tmp_path):
    ready = command("--truth", made / "truth.npz").out
    out = tmp_path / "again.npz"
    first = command(*retraining(made, subsets=5, truth_out=out))
    assert (first.status, first.out) == (0, ready), first.err
    assert "5 of 5 done" in first.err
    assert out.read_bytes() == (made / "truth.npz").read_bytes()
    second = command(*retraining(made, subsets=5, truth_out=out))
    assert (second.out, "done" in second.err) == (ready, False)
    assert command("--truth", out).out == ready
    other = command(*retraining(made, subsets=4, truth_out=out))
    assert other.status == 2
    assert "number of subsets is 5, now 4" in other.err
    seeded = command(*retraining(made, subsets=5, subset_seed=1, truth_out=out))
    assert "masks is" in seeded.err


def test_the_losses_lie_in_the_run_unless_told_otherwise(command, made):
    result = command(*retraining(made, subsets=3))
    assert result.status == 0, result.err
    assert (
        unlearn.random_halves(8, 3).tolist()
        == ready_truth(Scores.load(made / "scores.h5"), made / "run/truth.npz").masks.tolist()
    )


def test_per_query_prints_one_harmless_line_each(command, made):
    result = command("--truth", made / "truth.npz", "--per-query")
    lines = result.out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("LDS ")
    assert [line[9:] for line in lines[1:]] == ["r9-0", "q [2J forged  line", "r9-2"]
    values = json.loads(command("--truth", made / "truth.npz", "--json").out)["per_query"]
    assert [float(line[:7]) for line in lines[1:]] == pytest.approx(values, abs=1e-4)


def test_a_picture_is_not_replaced(command, made, tmp_path):
    picture = tmp_path / "lds.svg"
    picture.write_text("mine")
    result = command("--truth", made / "truth.npz", "--plot", picture)
    assert result.status == 2
    assert "exists and would be replaced: give another --plot, or --overwrite" in result.err
    assert picture.read_text() == "mine"
    assert command("--truth", made / "truth.npz", "--plot", picture, "--overwrite").status == 0
    assert "Linear datamodeling score" in picture.read_text()


@pytest.mark.parametrize(
    ("key", "change", "sentence"),
    [
        (
            "query_ids",
            lambda ids: ids[::-1],
            "query ids differ: .* has the same ones in another order; .* position 0",
        ),
        (
            "query_ids",
            lambda ids: np.array([ids[0], "x", ids[2]]),
            "has others; .* at position 1, 'x' there and",
        ),
        (
            "train_ids",
            lambda ids: ids[:7],
            "train ids differ: .* has 7 of them, and the scores 8; .* nothing there",
        ),
        (
            "train_ids",
            lambda ids: np.roll(ids, 1),
            "train ids differ: .* the same ones in another order",
        ),
    ],
)
def test_a_truth_of_other_rows_is_refused(command, made, tmp_path, key, change, sentence):
    with np.load(made / "truth.npz") as file:
        parts = dict(file)
    np.savez(tmp_path / "other.npz", **{**parts, key: change(parts[key])})
    with pytest.raises(MismatchError, match=sentence):
        ready_truth(Scores.load(made / "scores.h5"), tmp_path / "other.npz")
    assert command("--truth", tmp_path / "other.npz").status == 2
    del parts[key]  # a truth that does not say which rows it is of is taken at its word
    np.savez(tmp_path / "silent.npz", **parts)
    assert command("--truth", tmp_path / "silent.npz").status == 0


def test_ids_are_compared_as_a_file_holds_them():
    check_same_ids(
        ["a\0", "b"], np.array(["a\0", "b"]).tolist(), "query", "it"
    )  # numpy drops a trailing NUL
    with pytest.raises(MismatchError):
        check_same_ids(["a", "b"], ["a"], "query", "it")


def test_nothing_is_trained_where_scores_and_queries_differ(command, made, tmp_path):
    result = command(
        *retraining(made, queries=made / "reversed.jsonl", truth_out=tmp_path / "t.npz")
    )
    assert result.status == 2
    assert "query ids differ: the file of queries has the same ones in another order" in result.err
    run = influence.Run.open(made / "run", device="cpu")
    with pytest.raises(InputError, match="2 subsets were asked for; expected at least 3"):
        retrained_truth(
            Scores.load(made / "scores.h5"),
            run,
            influence.Examples(),
            subsets=2,
            out=tmp_path / "t.npz",
        )
    assert not list(tmp_path.iterdir())


def test_wrong_calls(command, made):
    for arguments, sentence in (
        ([], "give either --truth FILE.npz"),
        (["--truth", made / "truth.npz", "--run", made / "run"], "give either --truth FILE.npz"),
        (
            ["--truth", made / "truth.npz", "--subsets", 3, "--recipe", "r"],
            "--subsets, --recipe goes with --run only",
        ),
        (["--run", made / "run"], "name the scored ones with --queries FILE"),
        (retraining(made, subsets=2), "2 subsets were asked for"),
    ):
        result = command(*arguments)
        assert result.status == 2
        assert sentence in " ".join(result.err.split())
        assert result.out == ""
