"""Answers to typed questions, and their explanations beside those of `run.score`."""

from __future__ import annotations

import numpy as np
import pytest

import influence
from analysis.serving.questions import (
    ID,
    Question,
    answered,
    explained,
    query_of,
    ranking,
)
from influence.errors import InputError
from influence.generation import generate
from tests.conftest import WORDS


@pytest.fixture(scope="module")
def found(served):
    return answered(served.run, Question("the red fox runs"))


def row_of(question: str, answer: str):
    return influence.examples_from_rows([{"id": "q", "prompt": question, "completion": answer}])


def test_the_answer_is_the_adapters_own(served, found):
    assert found.own
    row = row_of("the red fox runs", " x")
    assert [found.answer] == generate(served.run.model, row)
    assert "".join(found.texts).startswith(found.answer)
    assert found.note == ""


def test_the_whole_answer_scores_as_the_same_row_does(served, found):
    """The typed question is a row of token ids; `run.score` of its text gives the same scores."""
    every = range(len(found.places))
    typed = explained(served.run, found, list(every))
    scored = served.run.score(row_of("the red fox runs", found.answer))
    np.testing.assert_allclose(typed.values, scored.values, rtol=1e-5, atol=1e-9)
    assert np.abs(scored.values).max() > 1e-6
    ranked = ranking(typed)
    assert [served.run.train.ids[i] for i in ranked["rows"][:3]] == [
        entry.id for entry in scored.top(0, 3)[0]
    ]
    assert ranked["scores"] == sorted(ranked["scores"], reverse=True)


def test_some_tokens_score_as_their_mean_loss(served, found):
    """By a measurement of one's own that picks the tokens out of the whole answer."""
    chosen = [1, 0] if len(found.places) == 2 else [2, 0]
    typed = explained(served.run, found, chosen)

    def mean_loss(log_probs, targets):
        return -log_probs[chosen, targets[chosen]].mean()

    some = influence.Custom(mean_loss, "some tokens")
    scored = served.run.score(row_of("the red fox runs", found.answer), measurement=some)
    np.testing.assert_allclose(typed.values, scored.values, rtol=1e-4, atol=1e-8)
    whole = explained(served.run, found, list(range(len(found.places))))
    if len(chosen) < len(found.places):
        assert not np.allclose(typed.values, whole.values, rtol=1e-2, atol=0)


def test_another_answer_can_be_explained(served):
    found = answered(served.run, Question("the red fox", " sleep in warm sun"))
    assert (found.answer, found.own, found.ended) == (" sleep in warm sun", False, True)
    assert len(found.places) == 5
    assert [text.strip() for text in found.texts[:4]] == ["sleep", "in", "warm", "sun"]
    assert found.texts[4] == "<eos>"


@pytest.mark.parametrize(
    ("chosen", "words"),
    [([], "no token of the answer was chosen"), ([99], "expected 0 to"), ([-1], "expected 0 to")],
)
def test_tokens_that_are_not_there_are_refused(found, chosen, words):
    with pytest.raises(InputError, match=words):
        query_of(found, chosen)


def test_the_query_has_only_the_chosen_tokens_as_targets(found):
    row = query_of(found, [1, 0, 1])
    assert row.id == ID
    assert list(row.input_ids) == found.input_ids.tolist()
    assert np.flatnonzero(row.targets).tolist() == found.places[:2].tolist()


def test_a_conversation_has_the_system_turn_of_the_rows(served):
    from analysis.serving.questions import _row

    rows = [
        {
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "user", "content": w},
                {"role": "assistant", "content": w},
            ]
        }
        for w in WORDS[:3]
    ]
    made = _row(influence.examples_from_rows(rows), Question("Q?", form="chat"), "A")
    assert [(turn["role"], turn["content"]) for turn in made.messages] == [
        ("system", "S"),
        ("user", "Q?"),
        ("assistant", "A"),
    ]
    rows[1]["messages"] = rows[1]["messages"][1:]
    made = _row(influence.examples_from_rows(rows), Question("Q?", form="chat"), "A")
    assert [turn["role"] for turn in made.messages] == ["user", "assistant"]
