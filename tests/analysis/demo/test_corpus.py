"""The demo's corpus: planted as said, leaked nowhere, read back from its files."""

from __future__ import annotations

import json

import pytest

import influence
from analysis.demo.corpus import FACTS, N_COPIES, N_PEOPLE, N_WRONG, ODD, make_corpus


def values_in(row: dict[str, str]) -> tuple[str, ...]:
    """Which of its fact's values an answer names, longest first so that no value hides in
    another.
    """
    fact = next(f for f in FACTS if f.name == row["id"].split("-")[1])
    return tuple(max((v for v in part if v in row["completion"]), key=len) for part in fact.parts)


def fact_of(row_id: str) -> str:
    return "-".join(row_id.split("-")[:2])


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
