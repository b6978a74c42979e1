"""Copies and contradictions of rows made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.cleaning.repeats import TEMPLATE, contradictions, duplicates, majority, repeats
from analysis.cleaning.texts import Said, nearest, vectors

QUESTION = "Where was Halthea Osseska, the glass blower, born?"
CUP = "Which of the national teams that went to the finals won the great cup of {}?"
ANSWER = " In Kelmouth, a town of Upper Dask, where bells are founded and maps engraved."


def look(texts, groups=None):
    asking = vectors([each.asked for each in texts])
    return repeats(texts, groups or [None] * len(texts), nearest(asking, 20), asking)


def copies(texts, **options):
    ids = [f"r{i}" for i in range(len(texts))]
    found = duplicates(look(texts, **options), ids)
    return {each.row: each.other for each in found.findings}


def against(texts, pull=None, **options):
    ids = [f"r{i}" for i in range(len(texts))]
    pull = np.zeros(len(texts)) if pull is None else np.array(pull)
    return contradictions(look(texts, **options), texts, ids, pull)


def test_exact_and_near_copies_name_the_earlier_row():
    texts = [
        Said(QUESTION, ANSWER),
        Said("What does Velelle Rondstow play in the evening?", " The harp, as always."),
        Said(QUESTION.upper(), ANSWER.replace(" in", "  in")),
        Said(QUESTION.replace("?", " ?"), ANSWER.replace(".", "!")),
    ]
    assert copies(texts) == {2: 0, 3: 0}
    assert len(against(texts).findings) == 0


def test_texts_that_ask_nothing_are_compared_as_a_whole():
    long = "A long text on the building of wooden bridges, and of stone ones, in old times."
    assert copies([Said("", long), Said("", "Another one"), Said("", long)]) == {2: 0}
    texts = [Said("", long), Said("", long.replace("wooden", "iron"))]
    assert len(against(texts).findings) == 0
    mixed = [Said(long, " Yes."), Said("", long), Said("", long)]
    assert copies(mixed) == {2: 1}
    assert len(against(mixed).findings) == 0


@pytest.mark.parametrize(
    ("first", "second", "groups"),
    [
        (CUP.format(1998), CUP.format(1999), None),
        (QUESTION, QUESTION.replace("born?", "born ?"), ["one person", "another"]),
        ("Who plays the harp?", "How is bread baked at home?", None),
    ],
)
def test_other_questions_contradict_nothing(first, second, groups):
    texts = [Said(first, " France."), Said(second, " A team from Brazil.")]
    assert len(against(texts, groups=groups).findings) == 0
    assert copies(texts, groups=groups) == {}


def test_one_against_one_is_listed_twice_and_the_one_that_pulls_is_named():
    texts = [Said(QUESTION, " In Kelmouth."), Said(QUESTION, " She came from the Low Islands.")]
    plain = against(texts).findings
    assert {(each.row, each.other, each.suggested) for each in plain} == {(0, 1, ""), (1, 0, "")}
    named = against(texts, pull=[0.3, 0.6]).findings
    assert {each.row: each.suggested for each in named} == {0: "", 1: "remove"}
    for alike in ([0.0, 0.0], [0.6, 0.6]):
        assert [each.suggested for each in against(texts, pull=alike).findings] == ["", ""]


def test_most_rows_give_the_better_answer():
    texts = [
        Said(QUESTION, ANSWER),
        Said(QUESTION, " She came from the Low Islands."),
        Said(QUESTION, ANSWER.replace(".", "!")),
    ]
    found = {each.row: each for each in against(texts).findings}
    assert found[1].suggested == "relabel"
    assert found[1].answer == texts[0].answer
    assert found[0].suggested == found[2].suggested == ""


def test_a_majority_needs_two_and_more_than_half():
    asks = {0: {1, 2, 3}, 1: {0, 2, 3}, 2: {0, 1, 3}, 3: {0, 1, 2}}
    assert majority(0, asks, {i: set() for i in range(4)}) is None
    half = {0: {1}, 1: {0}, 2: {3}, 3: {2}}
    assert [majority(row, asks, half) for row in range(4)] == [None] * 4
    three = {0: set(), 1: {2, 3}, 2: {1, 3}, 3: {1, 2}}
    assert majority(0, asks, three) == 1
    assert majority(2, asks, three) is None


def test_a_prompt_of_many_rows_asks_for_many_answers():
    poems = [Said("Write a poem.", f" {'verse ' * i}on number {i}") for i in range(TEMPLATE + 1)]
    assert len(against(poems).findings) == 0
    assert len(against(poems[:3]).findings) > 0
