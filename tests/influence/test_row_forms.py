"""Rows in the forms of others: what each becomes, what is refused, and what is said of it."""

from __future__ import annotations

import json

import pytest

from influence.errors import DataError, UnusableRow
from influence.row_forms import canonical_row, checked_columns
from influence.rows import examples_from_rows
from tests.influence.toy_tokenizers import chat, pair


def turns(*contents, system=None):
    """Messages that alternate between user and assistant."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    rest = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": [*first, *rest]}


def said(*pairs, **rest):
    """A row of ShareGPT."""
    return {"conversations": [{"from": who, "value": value} for who, value in pairs], **rest}


CALL = {"name": "weather", "arguments": {"city": "Rome"}}
CALLED = {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]}

#: A row as it is written, and with canonical keys.
FORMS = [
    (said(("human", "q"), ("gpt", "a")), turns("q", "a")),
    (said(("system", "s"), ("human", "q"), ("gpt", "a")), turns("q", "a", system="s")),
    (said(("user", "q"), ("assistant", "a"), system="s"), turns("q", "a", system="s")),
    (said(("system", "s"), ("human", "q"), ("gpt", "a"), system="s"), turns("q", "a", system="s")),
    (said(("Human", "q"), ("chatgpt", "a"), system=""), turns("q", "a")),
    (
        said(
            ("human", "q"), ("function_call", json.dumps(CALL)), ("observation", "9"), ("gpt", "a")
        ),
        {
            "messages": [
                {"role": "user", "content": "q"},
                CALLED,
                {"role": "tool", "content": "9"},
                {"role": "assistant", "content": "a"},
            ]
        },
    ),
    (
        said(
            ("human", "q"),
            ("function_call", [{**CALL, "arguments": json.dumps(CALL["arguments"])}]),
            tools=json.dumps([CALL]),
        ),
        {"messages": [{"role": "user", "content": "q"}, CALLED], "tools": [CALL]},
    ),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "w": 0}]},
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a", "w": 0},
            ]
        },
    ),
    ({"conversations": turns("q", "a")["messages"]}, turns("q", "a")),
    ({"conversations": json.dumps(turns("q", "a")["messages"])}, turns("q", "a")),
    ({"messages": said(("human", "q"), ("gpt", "a"))["conversations"]}, turns("q", "a")),
    ({"messages": json.dumps(turns("q", "a")["messages"])}, turns("q", "a")),
    ({"instruction": "do", "input": "", "output": "a"}, turns("do", "a")),
    ({"instruction": "do", "input": "x", "output": "a"}, turns("do\nx", "a")),
    ({"instruction": "", "input": "x", "output": "a"}, turns("x", "a")),
    ({"instruction": "do", "output": "a", "system": "s"}, turns("do", "a", system="s")),
    (
        {"instruction": "do", "output": "a", "history": [["q1", "a1"], ("q2", "a2")]},
        turns("q1", "a1", "q2", "a2", "do", "a"),
    ),
    ({"question": "q", "answer": "a"}, turns("q", "a")),
    ({"query": "q", "response": "a", "system": "s"}, turns("q", "a", system="s")),
    ({"problem": "q", "solution": "a", "answer": "4"}, {**turns("q", "a"), "answer": "4"}),
    ({"input": "q", "output": "a"}, turns("q", "a")),
    (
        {"id": 3, "group": "g", "question": "q", "answer": "a", "chat_template_kwargs": {"x": 1}},
        {"id": 3, "group": "g", **turns("q", "a"), "chat_template_kwargs": {"x": 1}},
    ),
]


@pytest.mark.parametrize(("row", "canonical"), FORMS)
def test_what_every_form_becomes(row, canonical):
    before = json.dumps(row)
    assert canonical_row(row) == canonical
    assert json.dumps(row) == before  # the caller's row is left alone


@pytest.mark.parametrize(
    "row",
    [
        pair(id="a"),
        chat("q", "a"),
        {"text": "t", "images": [], "question": None},
        {"messages": "[no JSON"},
        {"question": "q"},
        {"instruction": "i", "response": "r"},
        {},
    ],
)
def test_rows_with_their_own_keys_or_of_no_form_stay_as_they_are(row):
    assert canonical_row(row) is row


#: Rows that cannot be read, and why.
REFUSED = [
    ({"images": ["x.png"], **pair()}, "holds 'images', and models of text alone are read"),
    ({"audio": {"path": "x"}, "question": "q", "answer": "a"}, "holds 'audio'"),
    ({"videos": "x", "text": "t"}, "holds 'videos'"),
    (
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        "is a pair of answers, 'chosen' and 'rejected', and a training row has one; where the "
        "adapter was trained on the chosen answers, say so: --columns completion=chosen",
    ),
    ({"chosen": "a", "rejected": "b"}, "--columns text=chosen"),
    ({"prompt": "p", "chosen": [{"role": "user"}], "rejected": []}, "--columns messages=chosen"),
    (
        {"text": "t", "instruction": "i", "output": "o"},
        "is ambiguous, with 'text' and 'instruction', 'output'; say which is meant with --columns, "
        "as in --columns text=text",
    ),
    ({"messages": [], "problem": "q", "solution": "a"}, "is ambiguous, with 'messages' and"),
    ({"question": "q", "answer": "a", "query": "q", "response": "a"}, "--columns question=quest"),
    ({"prompt": "p", "question": "q", "answer": "a"}, "with 'prompt' and 'question', 'answer'"),
    (said(("narrator", "x")), "turn 1 is 'from' 'narrator'; expected one of human, user, gpt"),
    ({"conversations": "hello"}, "'conversations' must be a list, not a string"),
    (said(("system", "s"), ("human", "q"), system="t"), "has one text under 'system' and another"),
    (said(("human", "q"), ("function_call", "f(x)")), "turn 2 is from 'function_call', and its va"),
    ({"question": 1, "answer": "a"}, "'question' must be a string, not an integer"),
    ({"question": "q", "answer": ["a"]}, "'answer' must be a string, not a list"),
    ({"instruction": "i", "output": "o", "history": [["q"]]}, "'history' must be a list of pairs"),
    ({"instruction": "i", "output": "o", "system": 1}, "'system' must be a string"),
]


@pytest.mark.parametrize(("row", "reason"), REFUSED)
def test_what_is_refused(row, reason):
    with pytest.raises(UnusableRow) as error:
        canonical_row(row)
    assert reason in str(error.value)
    with pytest.raises(DataError) as listed:
        examples_from_rows([{"id": "x", **row}])
    assert [(bad.number, bad.id) for bad in listed.value.rows] == [(1, "x")]


#: A row, the columns that are named, and what is read.
COLUMNS = [
    ({"q": "p", "a": "c"}, {"prompt": "q", "completion": "a"}, {"prompt": "p", "completion": "c"}),
    ({"prompt": "p", "chosen": "c", "rejected": "x"}, {"completion": "chosen"}, pair("p", "c")),
    ({"prompt": "no", "chosen": [], "rejected": []}, {"messages": "chosen"}, {"messages": []}),
    (
        {"question": "p", "answer": "c"},
        {"prompt": "question", "completion": "answer"},
        pair("p", "c"),
    ),
    (
        {"prompt": "c", "completion": "p"},
        {"prompt": "completion", "completion": "prompt"},
        pair("p", "c"),
    ),
    ({"text": "t", "instruction": "i", "output": "o"}, {"text": "text"}, {"text": "t"}),
    ({"text": "t", "instruction": "i", "output": "o"}, {"output": "output"}, turns("i", "o")),
    (
        {"instruction": "i", "context": "x", "response": "o"},
        {"instruction": "instruction", "input": "context", "output": "response"},
        turns("i\nx", "o"),
    ),
    ({"dialog": [{"from": "human", "value": "q"}]}, {"conversations": "dialog"}, turns("q")),
    ({"dialog": [{"from": "human", "value": "q"}]}, {"messages": "dialog"}, turns("q")),
    (
        {"key": 1, "part": "g", "text": "t"},
        {"id": "key", "group": "part"},
        {"id": 1, "group": "g", "text": "t"},
    ),
    ({"key": 1, "question": "q", "answer": "a"}, {"id": "key"}, {"id": 1, **turns("q", "a")}),
]


@pytest.mark.parametrize(("row", "columns", "canonical"), COLUMNS)
def test_what_named_columns_make_of_a_row(row, columns, canonical):
    found = canonical_row(row, columns)
    assert {key: value for key, value in found.items() if value is not None} == canonical


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        (
            {"promt": "q"},
            "columns name 'promt'; expected KEY=COLUMN with one of the keys id, group",
        ),
        ({"prompt": "q", "text": "t"}, "'prompt', 'text', which are keys of different ways"),
        ({"question": "q", "response": "t"}, "which are keys of different ways to write a row"),
        ({"prompt": 3}, "columns {'prompt': 3} were given; expected names by key"),
        ({"prompt": ""}, "expected names by key"),
        ("prompt=q", "expected names by key"),
    ],
)
def test_columns_that_mean_nothing_are_refused(columns, sentence):
    with pytest.raises(DataError) as error:
        checked_columns(columns)
    assert sentence in str(error.value)


def test_a_named_column_that_no_row_has_is_an_error():
    rows = [{"q": "p", "a": "c"}, {"q": "p", "b": "c"}]
    with pytest.raises(DataError) as error:
        examples_from_rows(rows, columns={"prompt": "q", "completion": "x"})
    assert str(error.value) == (
        "--columns completion=x was given, and the rows have the columns 'q', 'a', 'b'; name one "
        "of these"
    )
    with pytest.raises(DataError, match="row 2: has 'prompt' but no 'completion'"):
        examples_from_rows(rows, columns={"prompt": "q", "completion": "a"})
    grouped = [{**pair(), "g": "x"}, pair(completion=" other")]
    assert [row.group for row in examples_from_rows(grouped, columns={"group": "g"})] == ["x", None]


def test_what_was_recognised_or_left_out_is_said_once_with_counts(capfd):
    rows = [
        {"question": "q", "answer": "a"},
        {"question": "q2", "answer": "a", "weight": 0.5},
        {"instruction": "i", "output": "o", "system": "used"},
        {**pair(), "weight": 2, "system": "not used", "rejected": "x"},
        {"text": "t", "note": 1},
    ]
    examples_from_rows(rows)
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith(
        "note: 2 rows with 'question', 'answer': each is read as a chat, a user turn and an "
    )
    assert lines[0].endswith(
        "--columns prompt=question,completion=answer joins the two as they stand"
    )
    assert lines[1].startswith(
        "note: 1 row with 'instruction', 'output': each is read as a chat, as"
    )
    assert lines[2:] == [
        "note: 'weight' of 2 rows is not used",
        "note: 'system' of 1 row is not used",
        "note: 'rejected' of 1 row is not used",
    ]
    examples_from_rows([pair(), {"text": "t"}, chat("q", "a")])
    assert capfd.readouterr().err == ""
