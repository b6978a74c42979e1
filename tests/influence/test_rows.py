"""Rows by id, their digests, reading them, and every reason a row cannot be used."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest

from influence.errors import DataError
from influence.row_files import read_examples
from influence.rows import Example, Examples, examples_from_rows
from tests.influence.toy_tokenizers import chat, pair, write_jsonl

FORMS = "'prompt' and 'completion', or 'messages', or 'text'"


def test_examples_are_a_sliceable_sequence_with_ids_and_digest():
    examples = examples_from_rows(
        [pair(id=f"a{i}", completion=f" {i}", group="g") for i in range(5)]
    )
    assert len(examples) == 5
    assert examples.ids == ["a0", "a1", "a2", "a3", "a4"]
    assert isinstance(examples[1:3], Examples)
    assert examples[1:3].ids == ["a1", "a2"]
    assert examples[-1].completion == " 4"
    assert examples.select(np.array([4, 0, 4])).ids == ["a4", "a0", "a4"]
    assert examples.index("a3") == 3
    assert "a3" in examples
    assert "b3" not in examples
    assert examples[::1] == examples
    assert examples[1:] != examples
    assert pickle.loads(pickle.dumps(examples)).digest == examples.digest


def test_an_unknown_id_names_the_nearest():
    examples = examples_from_rows([pair(id="train-017"), pair(id="train-018"), pair(id="zebra")])
    with pytest.raises(DataError) as error:
        examples.index("train-07")
    assert str(error.value) == (
        "no example has the id 'train-07', among 3; the nearest are 'train-017', 'train-018'"
    )
    with pytest.raises(
        DataError, match=re.escape("no example has the id '???', among 3; there are 'train-017'")
    ):
        examples.index("???")


def test_the_digest_sees_id_group_content_and_order_and_nothing_else():
    rows = [pair(id="a", group="g", note=1), pair(id="b", completion=" no")]
    digest = examples_from_rows(rows).digest
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert examples_from_rows([{**rows[0], "note": 2}, rows[1]]).digest == digest
    changed = [
        [{**rows[0], "id": "c"}, rows[1]],
        [{**rows[0], "group": "h"}, rows[1]],
        [{**rows[0], "group": None}, rows[1]],
        [{**rows[0], "completion": " yes"}, rows[1]],
        rows[::-1],
        rows[:1],
    ]
    assert len({digest, *(examples_from_rows(other).digest for other in changed)}) == 1 + len(
        changed
    )


def test_the_content_hash_is_of_the_content_alone():
    base = Example("a", prompt="p", completion="c")
    # printf '%s' '{"completion":"c","prompt":"p"}' | sha256sum
    assert base.content_hash == "f99316a91c82852d"
    assert Example("b", group="g", prompt="p", completion="c").content_hash == base.content_hash
    # The boundary is part of the content: the same string split elsewhere is another example.
    assert Example("a", prompt="pc", completion="").content_hash != base.content_hash
    assert Example("a", text="pc").content_hash != base.content_hash
    one, other = ({"role": "assistant", "content": "x"}, {"content": "x", "role": "assistant"})
    assert (
        Example("a", messages=(one,)).content_hash == Example("a", messages=(other,)).content_hash
    )


@pytest.mark.parametrize(
    "content", [{}, {"prompt": "p"}, {"text": "t", "prompt": "p"}, {"messages": ()}]
)
def test_an_example_has_exactly_one_kind_of_content(content):
    with pytest.raises(
        DataError, match="give it 'prompt' and 'completion', or 'messages', or 'text'"
    ):
        Example("a", **content)


def test_rows_without_id_get_their_hash_and_duplicates_a_number():
    name = examples_from_rows([pair()])[0].content_hash
    examples = examples_from_rows(
        [pair(), pair(completion=" other"), pair(), pair(id="mine"), pair()]
    )
    assert [examples.ids[i] for i in (0, 2, 3, 4)] == [name, f"{name}#2", "mine", f"{name}#3"]
    assert len(set(examples.ids)) == 5
    # An explicit id keeps its name, wherever it stands in the file.
    assert examples_from_rows([pair(), pair(), pair(id=f"{name}#2")]).ids == [
        name,
        f"{name}#3",
        f"{name}#2",
    ]
    assert examples_from_rows([pair(), pair(id=name)]).ids == [f"{name}#2", name]


def test_integer_ids_and_groups_become_strings():
    example = examples_from_rows([pair(id=7, group=np.int64(3))])[0]
    assert (example.id, example.group) == ("7", "3")


@pytest.mark.parametrize("width", [20, 33, 60])
def test_a_preview_is_one_short_line(width):
    for row in (
        pair("a\nb\x1b[2J " * 20, "c d " * 30),
        pair("short?", "c d " * 30),
        {"text": "one\ttwo\n" * 40},
        chat("why?\n" * 30, "because"),
        chat("only the assistant speaks"),
    ):
        preview = examples_from_rows([row])[0].preview(width)
        assert len(preview) <= width
        assert preview.isprintable()
    assert examples_from_rows([pair("Who?\nA:", " Me.")])[0].preview() == "Who? A: → Me."
    ids = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    plain, shown = (
        examples_from_rows([ids])[0],
        examples_from_rows([{**ids, "shown": ["Q", "A"]}])[0],
    )
    assert (plain.preview(), shown.preview()) == ("3 token ids: 5 6 7", "Q → A")
    assert plain == shown  # what is shown is no content
    assert plain.content_hash == shown.content_hash
    with pytest.raises(DataError, match="'shown' must be two strings"):
        examples_from_rows([{**ids, "shown": "Q"}])
    assert examples_from_rows([chat("x", "y", "Who?", "Me.")])[0].preview() == "Who? → Me."
    # A long prompt leaves room for the answer.
    assert examples_from_rows([pair("word " * 50, " Me.")])[0].preview(30).endswith("… → Me.")


BAD_ROWS = [
    ("just text", f"not an object but a string; expected an object with {FORMS}"),
    ([1, 2], f"not an object but a list; expected an object with {FORMS}"),
    (None, f"not an object but null; expected an object with {FORMS}"),
    (
        {"question": "q", "id": "x"},
        f"has no content, only the keys 'question', 'id'; expected {FORMS}",
    ),
    ({}, f"has no content, only the keys (none); expected {FORMS}"),
    ({"prompt": "p"}, "has 'prompt' but no 'completion'"),
    ({"completion": "c"}, "has 'completion' but no 'prompt'"),
    ({"prompt": 3, "completion": "c"}, "'prompt' must be a string, not an integer"),
    ({"prompt": "p", "completion": True}, "'completion' must be a string, not a boolean"),
    ({"prompt": "p", "completion": ""}, "'completion' is empty; there is nothing to supervise"),
    (
        {"prompt": "p", "completion": "\ud83d"},
        "'completion' holds a lone surrogate, which is not text",
    ),
    (
        {"prompt": "p", "completion": "c", "text": "t"},
        f"is ambiguous, with 'prompt', 'completion', 'text'; keep one of: {FORMS}",
    ),
    (
        {"prompt": "p", "messages": []},
        f"is ambiguous, with 'prompt', 'messages'; keep one of: {FORMS}",
    ),
    ({"text": ""}, "'text' is empty; there is nothing to supervise"),
    ({"text": ["t"]}, "'text' must be a string, not a list"),
    ({"messages": "hello"}, "'messages' must be a list, not a string"),
    ({"messages": []}, "'messages' is empty; expected turns of which the last is the assistant's"),
    ({"messages": ["hello"]}, "message 1 must be an object, not a string"),
    ({"messages": [{"content": "c"}]}, "'role' of message 1 is missing"),
    ({"messages": [{"role": "assistant"}]}, "'content' of message 1 is missing"),
    (
        {"messages": [{"role": "user", "content": 1.5}, {"role": "assistant", "content": "c"}]},
        "'content' of message 1 must be a string, not a number",
    ),
    (
        {"messages": [{"role": "assistant", "content": ""}]},
        "'content' of message 1 is empty; there is nothing to supervise",
    ),
    (
        {"messages": [{"role": "user", "content": "a"}]},
        "the last message is by 'user'; it must be by 'assistant'",
    ),
    (pair(id=1.5), "'id' must be a string or an integer, not a number"),
    (pair(id=False), "'id' must be a string or an integer, not a boolean"),
    (pair(id=""), "'id' is empty; leave it out or give it a value"),
    (pair(id="a\0b"), "'id' holds a NUL or a lone surrogate, which no score file can store"),
    (pair(group=["g"]), "'group' must be a string or an integer, not a list"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS)
def test_every_reason_a_row_cannot_be_used(row, reason):
    with pytest.raises(DataError) as error:
        examples_from_rows([pair(), row])
    (bad,) = error.value.rows
    assert (bad.number, bad.reason) == (2, reason)
    assert str(error.value).startswith("1 of 2 rows cannot be used:\n  row 2")


def test_all_bad_rows_are_listed_at_once(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [pair(id="good"), *(row for row, _ in BAD_ROWS)])
    with pytest.raises(DataError) as error:
        read_examples(path)
    assert [bad.reason for bad in error.value.rows] == [reason for _, reason in BAD_ROWS]
    assert str(error.value).splitlines()[0] == (
        f"{len(BAD_ROWS)} of {len(BAD_ROWS) + 1} rows of {path} cannot be used:"
    )
    assert "  row 5 (id 'x'): has no content" in str(error.value)


def test_an_explicit_id_may_not_repeat():
    with pytest.raises(DataError) as error:
        examples_from_rows([pair(id="a"), pair(id=1), pair(id="1"), pair(id="a", completion=" x")])
    assert [(bad.number, bad.id) for bad in error.value.rows] == [(3, "1"), (4, "a")]
    assert error.value.rows[1].reason == (
        "its id is already that of row 1; ids must differ: use `group` for what several rows share"
    )


def test_what_is_no_rows_says_what_to_give():
    with pytest.raises(DataError, match="there are no rows; give at least one"):
        examples_from_rows([])
    with pytest.raises(DataError, match="expected an iterable of rows, got one dict"):
        examples_from_rows(pair())


def test_a_live_dataset_is_read_as_its_rows_whatever_its_format():
    from datasets import Dataset, DatasetDict

    made = [pair(id=f"p{i}", completion=f" {i}", note=[i]) for i in range(1500)]
    dataset = Dataset.from_list(made)
    expected = examples_from_rows(made)
    assert examples_from_rows(dataset) == expected
    assert examples_from_rows(dataset.with_format("numpy")) == expected
    assert examples_from_rows(dataset.to_iterable_dataset()) == expected
    assert examples_from_rows(dataset.select([3, 1])).ids == ["p3", "p1"]
    renamed = dataset.rename_columns({"prompt": "question"})
    assert examples_from_rows(renamed, columns={"prompt": "question"}) == expected
    with pytest.raises(DataError, match="got one DatasetDict; give one of its splits, 'train'"):
        examples_from_rows(DatasetDict({"train": dataset}))
