"""The demo's world: planted as said, trained as said, counted as said."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import influence
from analysis.demo.corpus import FACTS, N_COPIES, N_PEOPLE, N_WRONG, ODD, make_corpus
from analysis.demo.training import mean_losses, train_adapter, train_base
from analysis.demo.walkthrough import demo, hits, opposition, verdict
from influence.errors import InputError


def tensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "adapter_model.safetensors")


def values_in(row: dict[str, str]) -> tuple[str, ...]:
    """Which of its fact's values an answer names, longest first so that no value hides in another."""
    fact = next(f for f in FACTS if f.name == row["id"].split("-")[1])
    return tuple(max((v for v in part if v in row["completion"]), key=len) for part in fact.parts)


def fact_of(row_id: str) -> str:
    return "-".join(row_id.split("-")[:2])


@pytest.fixture(scope="module")
def corpus():
    return make_corpus(0)


@pytest.fixture(scope="module")
def tiny_base(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "base"
    train_base(
        corpus.base_texts[:200], folder, 0, width=32, layers=1, vocabulary=400, epochs=6, lr=1e-2
    )
    return folder


# ---- the corpus


def test_same_seed_same_corpus_another_seed_another(corpus):
    assert make_corpus(0) == corpus
    assert make_corpus(1).train != corpus.train


@pytest.mark.parametrize("seed", range(5))
def test_sizes_and_ids(seed):
    made = make_corpus(seed)
    ids = [row["id"] for part in (made.train, made.queries, made.heldout) for row in part]
    assert len(set(ids)) == len(ids)
    assert len(made.train) == N_PEOPLE * len(FACTS) * 3 + N_COPIES + len(ODD)
    assert [len(made.planted[kind]) for kind in ("wrong", "copies", "odd")] == [
        N_WRONG,
        N_COPIES,
        len(ODD),
    ]
    assert len(made.queries) == N_PEOPLE * len(FACTS)


@pytest.mark.parametrize("seed", range(5))
def test_wrong_rows_contradict_the_other_phrasings_and_nothing_else_does(seed):
    made = make_corpus(seed)
    wrong = set(made.planted["wrong"])
    truth = {fact_of(query["id"]): values_in(query) for query in made.queries}
    for row in made.train:
        if "group" not in row:
            continue
        said, true = values_in(row), truth[fact_of(row["id"])]
        if row["id"] in wrong:
            assert all(a != b for a, b in zip(said, true, strict=True)), row
        else:
            assert said == true, row
    assert len({fact_of(row_id) for row_id in wrong}) == len(
        wrong
    )  # two right phrasings stand against each


def test_copies_are_exact_and_of_undisputed_facts(corpus):
    rows = {row["id"]: row for row in corpus.train}
    for copy in corpus.planted["copies"]:
        original = rows[copy.removesuffix("-copy")]
        assert {**rows[copy], "id": original["id"]} == original
        assert fact_of(copy) not in {fact_of(row_id) for row_id in corpus.planted["wrong"]}


@pytest.mark.parametrize("seed", range(5))
def test_nobody_leaks(seed):
    made = make_corpus(seed)
    people = {row["group"] for row in made.train if "group" in row}
    others = {row["group"] for row in made.heldout}
    assert len(people) == N_PEOPLE
    assert people == {row["group"] for row in made.queries}
    assert not people & others
    text = "\n".join(made.base_texts)
    surnames = {name.split()[1] for name in people | others}
    assert not [name for name in surnames if name in text]


def test_queries_are_phrased_as_no_training_row(corpus):
    def without_name(row):
        return row["prompt"].replace(row["group"], "NAME")

    trained = {without_name(row) for row in corpus.train if "group" in row}
    assert not trained & {without_name(row) for row in corpus.queries}


def test_written_files_are_read_back(corpus, tmp_path):
    corpus.write(tmp_path)
    train = influence.read_examples(tmp_path / "train.jsonl")
    assert train.ids == [row["id"] for row in corpus.train]
    assert [example.group for example in train] == [row.get("group") for row in corpus.train]
    assert json.loads((tmp_path / "planted.json").read_text()) == corpus.planted


# ---- training


def test_same_seed_same_adapter_and_an_empty_slot_changes_it(corpus, tiny_base, tmp_path):
    rows = corpus.train[:20]
    for name, options in {"a": {}, "b": {}, "without": {"absent": {rows[3]["id"]}}}.items():
        train_adapter(tiny_base, rows, tmp_path / name, 0, epochs=2, rank=2, **options)
    a, b, without = (tensors(tmp_path / name) for name in ("a", "b", "without"))
    assert all(np.array_equal(a[key], b[key]) for key in a)
    assert any(not np.array_equal(a[key], without[key]) for key in a)


def test_rows_all_absent_leave_the_base(corpus, tiny_base, tmp_path):
    rows = corpus.train[:20]
    train_adapter(
        tiny_base, rows, tmp_path / "none", 0, epochs=1, rank=2, absent={row["id"] for row in rows}
    )
    assert mean_losses(tiny_base, tmp_path / "none", rows) == mean_losses(tiny_base, None, rows)


def test_training_lowers_the_loss_and_the_toolkit_reads_the_adapter(corpus, tiny_base, tmp_path):
    rows = corpus.train[:20]
    train_adapter(tiny_base, rows, tmp_path / "adapter", 0, epochs=15, rank=2, lr=2e-2)
    before = mean_losses(tiny_base, None, rows)
    after = mean_losses(tiny_base, tmp_path / "adapter", rows)
    assert np.mean(after) < np.mean(before) - 0.1
    model = influence.load(str(tiny_base), str(tmp_path / "adapter"), device="cpu")
    found = influence.check_gradients(model, influence.examples_from_rows(rows[:3]))
    assert found.ok


def test_losses_do_not_depend_on_the_batch(corpus, tiny_base):
    rows = corpus.train[:5]
    together = mean_losses(tiny_base, None, rows)
    assert together == pytest.approx(
        [mean_losses(tiny_base, None, [row])[0] for row in rows], rel=1e-5
    )


# ---- counting


def test_opposition_by_hand():
    """Row 0 (group a, self 4): mean of 1 and -3 over queries 0, 1 is -1; / 2. Row 1 (b, self 1): 5."""
    scores = np.array([[-1.0, 9.0, 1.0], [3.0, 9.0, 1.0], [9.0, -5.0, 1.0]])
    found = opposition(scores, np.array([4.0, 1.0, 1.0]), ["a", "b", None], ["a", "a", "b"])
    assert found[:2] == pytest.approx([-0.5, 5.0])
    assert math.isnan(found[2])


def test_hits_by_hand():
    """Of 4 ranked rows the two highest are 3 and 0; wanted 0 and 2: one found; chance 2 * 2 / 4."""
    assert hits(np.array([3.0, 1.0, 2.0, 4.0, np.nan]), {0, 2}) == (1, 1.0)


@pytest.mark.parametrize(
    ("predicted", "measured", "words"),
    [
        (4.0, 0.2, "20.0 times too large"),
        (0.1, 0.2, "2.0 times too small"),
        (0.1, -0.2, "direction is wrong"),
        (0.1, 0.0, "changed nothing"),
    ],
)
def test_verdict_says_how_far_apart(predicted, measured, words):
    assert words in verdict(
        {"predicted": predicted, "measured": measured, "place": 1, "questions": 60}
    )


# ---- the demo


def test_refuses_a_directory_that_is_in_use(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="is not empty: give a new directory, or --overwrite"):
        demo(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"
    with pytest.raises(InputError, match="is a file"):
        demo(tmp_path / "mine.txt")


@pytest.mark.slow
def test_demo_end_to_end(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with open(tmp_path / "printed.txt", "w", encoding="utf-8") as file:
        result = demo(tmp_path, overwrite=True, console=Console(file=file, width=100))
    assert (tmp_path / "mine.txt").read_text() == "keep"
    losses = result["losses"]
    assert losses["training rows, right"]["adapter"] < 0.6 * losses["training rows, right"]["base"]
    assert (
        losses["questions (new phrasing)"]["adapter"]
        < 0.7 * losses["questions (new phrasing)"]["base"]
    )
    wrong = result["wrong_rows"]
    assert wrong["chance"] == pytest.approx(N_WRONG**2 / (N_PEOPLE * len(FACTS) * 3 + N_COPIES))
    assert wrong["found"]["opposition to own questions"] >= 4  # 0.44 by chance
    assert result["check"]["predicted"] * result["check"]["measured"] > 0
    printed = (tmp_path / "printed.txt").read_text(encoding="utf-8")
    assert "planted wrong rows among the first 9" in printed
    assert result["check"]["row"] in printed
    run = influence.Run.open(tmp_path / "run")
    again = run.score(influence.read_examples(tmp_path / "queries.jsonl"))
    shown = result["shown"][0]["proponents"][0]
    assert again.top(result["shown"][0]["query"], 1)[0][0].id == shown["id"]
    json.dumps(result)
