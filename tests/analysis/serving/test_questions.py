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
from influence.generation import generate, generated_tokens
from tests.conftest import WORDS

ASKED = "the red fox runs"


@pytest.fixture(scope="module")
def found(served):
    """The adapter's own answer."""
    return answered(served.run, Question(ASKED))


@pytest.fixture(scope="module")
def typed(served):
    """An answer of five tokens that was typed."""
    return answered(served.run, Question(ASKED, " sleep in warm sun"))


def row_of(answer: str):
    return influence.examples_from_rows([{"id": "q", "prompt": ASKED, "completion": answer}])


def test_the_answer_is_the_adapters_own(served, found):
    """Token by token: the text of this tokenizer has no blanks, and would be read as others."""
    assert found.own
    assert [found.answer] == generate(served.run.model, row_of(" x"))
    (new,) = generated_tokens(served.run.model, row_of(" x"))
    assert found.input_ids[found.places][: len(new)].tolist() == new
    assert "".join(found.texts[: len(new)]) == found.answer
    assert found.said == len(found.places) == len(new) + found.ended
    before = served.run.query_tokens(row_of(" x"))[0]
    assert found.input_ids[: found.places[0]].tolist() == before.input_ids[:-2].tolist()


def test_an_answer_that_is_cut_has_no_end_of_its_own(served, monkeypatch):
    monkeypatch.setattr("analysis.serving.questions.MOST_TOKENS", 1)
    cut = answered(served.run, Question(ASKED))
    assert not cut.ended
    assert cut.said == 1
    assert cut.texts[1:] in ([], ["<eos>"])


def test_the_whole_answer_scores_as_the_same_row_does(served, typed):
    """The typed question is a row of token ids; `run.score` of its text gives the same scores."""
    every = range(len(typed.places))
    scores = explained(served.run, typed, list(every))
    scored = served.run.score(row_of(" sleep in warm sun"))
    np.testing.assert_allclose(scores.values, scored.values, rtol=1e-5, atol=1e-9)
    assert np.abs(scored.values).max() > 1e-6
    ranked = ranking(scores)
    strongest = [entry.id for entry in scored.top(0, 3)[0]]
    assert [served.run.train.ids[i] for i in ranked["rows"][:3]] == strongest
    assert ranked["scores"] == sorted(ranked["scores"], reverse=True)


def test_some_tokens_score_as_their_mean_loss(served, typed):
    """By a measurement of one's own that picks the tokens out of the whole answer."""
    chosen = [3, 0]
    scores = explained(served.run, typed, chosen)

    def mean_loss(log_probs, targets):
        return -log_probs[chosen, targets[chosen]].mean()

    some = influence.Custom(mean_loss, "some tokens")
    scored = served.run.score(row_of(" sleep in warm sun"), measurement=some)
    np.testing.assert_allclose(scores.values, scored.values, rtol=1e-4, atol=1e-8)
    whole = explained(served.run, typed, list(range(5)))
    assert not np.allclose(scores.values, whole.values, rtol=1e-2, atol=0)


def test_the_middle_of_many_rows_is_left_out(served, typed, monkeypatch):
    scores = explained(served.run, typed, [0])
    whole = ranking(scores)
    monkeypatch.setattr("analysis.serving.questions.MOST_ROWS", 3)
    ends = ranking(scores)
    assert ends["rows"] == whole["rows"][:3] + whole["rows"][-3:]
    assert (whole["left_out"], ends["left_out"]) == (0, 14)


def test_another_answer_can_be_explained(typed):
    assert (typed.answer, typed.own, typed.ended) == (" sleep in warm sun", False, True)
    assert len(typed.places) == typed.said == 5
    assert [text.strip() for text in typed.texts] == ["sleep", "in", "warm", "sun", "<eos>"]


@pytest.mark.parametrize(
    ("chosen", "words"),
    [([], "no token of the answer was chosen"), ([999], "expected 0 to"), ([-1], "expected 0 to")],
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
