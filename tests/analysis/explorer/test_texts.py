from __future__ import annotations

import pytest

from analysis.explorer.texts import PREVIEW, Texts, parts_of
from influence.rows import examples_from_rows

ROWS = [
    {"id": "a", "prompt": "Who?", "completion": " Ann.", "group": "People"},
    {"id": "b", "text": "Once upon a time"},
    {
        "id": "c",
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look"}}]},
            {"role": "assistant", "content": "Rain."},
        ],
    },
    {"id": "d", "input_ids": [3, 1, 4], "labels": [-100, 1, 4]},
]


@pytest.fixture(scope="module")
def texts():
    return Texts.of(examples_from_rows(ROWS))


def test_what_a_row_says_by_role(texts):
    assert texts.parts(0) == [["prompt", "Who?"], ["completion", " Ann."]]
    assert texts.parts(1) == [["text", "Once upon a time"]]
    assert [role for role, _ in texts.parts(2)] == ["user", "assistant", "assistant"]
    assert texts.parts(2)[0][1] == "Weather?"
    assert "look" in texts.parts(2)[1][1]
    assert parts_of(texts.examples[3]) == [["completion", "3 1 4"]]


def test_what_is_searched_is_lower_case_and_holds_id_group_and_content(texts):
    said = texts.searched[0]
    assert said == said.lower()
    assert all(word in said for word in ("a", "people", "who?", "ann."))
    assert [each.split("\n")[0] for each in texts.searched] == ["a", "b", "c", "d"]


def test_what_is_searched_is_made_once(monkeypatch):
    """Not again for each letter that is typed."""
    texts = Texts.of(examples_from_rows(ROWS))
    assert texts.searched[0] == "a\npeople\nwho?\n ann."
    monkeypatch.setattr(Texts, "parts", None)
    assert len(texts.searched) == len(ROWS)


def test_a_preview_is_one_short_line():
    long = Texts.of(examples_from_rows([{"prompt": "x\n\x1b[31m" * 200, "completion": "y " * 200}]))
    assert len(long.preview(0)) <= PREVIEW
    assert long.preview(0).isprintable()


def test_rows_that_are_not_known_have_ids_alone():
    texts = Texts.named(["a", "b"])
    assert (len(texts), texts.preview(1), texts.parts(1), texts.searched) == (
        2,
        "",
        [],
        ["a\n", "b\n"],
    )
