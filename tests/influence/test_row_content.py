"""Conversations with what belongs to them, token ids, and every reason for which they are none."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from influence.errors import DataError
from influence.row_files import read_examples
from influence.rows import Example, examples_from_rows
from tests.influence.toy_tokenizers import chat, pair, write_jsonl

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {}}}]
TALK = chat("Hi", "yes")["messages"]


def example(row) -> Example:
    (found,) = examples_from_rows([row])
    return found


def test_tools_and_template_arguments_are_content():
    plain, options = example({"messages": TALK}), {"enable_thinking": False}
    row = {"messages": TALK, "tools": [TOOL], "chat_template_kwargs": options}
    found = example(row)
    assert found.tools == (TOOL,)
    assert found.template_options == options
    as_text = {**row, "tools": json.dumps([TOOL]), "chat_template_kwargs": json.dumps(options)}
    assert example(as_text) == found
    hashes = {
        plain.content_hash,
        found.content_hash,
        example({"messages": TALK, "tools": [TOOL]}).content_hash,
        example({"messages": TALK, "tools": []}).content_hash,
        example({"messages": TALK, "chat_template_kwargs": options}).content_hash,
    }
    assert len(hashes) == 5
    assert example({"messages": TALK, "tools": None}).content_hash == plain.content_hash
    # beside a string they mean nothing, as before
    assert example({**pair(), "tools": [TOOL]}).content_hash == example(pair()).content_hash


def test_rows_that_were_stored_before_keep_their_hashes():
    """Computed at commit 0fba0b1."""
    assert example(pair("p", "c")).content_hash == "f99316a91c82852d"
    assert example({"messages": TALK}).content_hash == "c46520376ccf7edf"
    assert example({"text": "t"}).content_hash == "0930d8acd47c6f05"


def test_a_conversation_in_two_parts_is_one_with_a_prompt():
    found = example({"prompt": TALK[:1], "completion": TALK[1:]})
    assert (found.messages, found.prompt_turns) == (tuple(TALK), 1)
    assert found.content_hash != example({"messages": TALK}).content_hash
    assert found.preview() == "Hi → yes"


@pytest.mark.parametrize("said", [{"content": None}, {}, {"content": ""}])
def test_a_turn_may_only_call_a_tool(said):
    calling = {"role": "assistant", "tool_calls": CALL, **said}
    for turns in ([TALK[0], calling], [TALK[0], calling, *TALK]):
        found = example({"messages": turns})
        assert found.messages is not None
        assert found.messages[1].get("content", "") == ""
        assert found.preview(200).isprintable()
    assert "weather" in example({"messages": [TALK[0], calling]}).preview()
    assert example({"messages": [TALK[0], calling]}).answer == ""


def test_another_answer_has_no_thoughts_or_calls_of_the_old_one():
    turn = {"role": "assistant", "content": "a", "name": "n", "thinking": "t", "tool_calls": CALL}
    found = example({"messages": [TALK[0], turn], "tools": [TOOL]}).answering("b")
    assert found.messages == (TALK[0], {"role": "assistant", "content": "b", "name": "n"})
    assert found.tools == (TOOL,)
    assert example(pair("p", "c")).answering("d").completion == "d"
    for row, kind in (({"text": "t"}, "one text"), ({"input_ids": [1, 2]}, "token ids")):
        assert example(row).answer is None
        with pytest.raises(DataError, match=f"is {kind}, without an answer"):
            example(row).answering("b")


def test_token_ids_win_over_the_text_that_they_were_made_from():
    row = {"text": "t", "input_ids": np.array([4, 5, 6]), "labels": [-100, 5, 6]}
    found = example(row)
    assert (found.input_ids, found.text) == ((4, 5, 6), None)
    assert found.targets == (False, True, True)
    assert found.preview() == "3 token ids: 4 5 6"


@pytest.mark.parametrize("large", [6, 2**31, 2**63 - 1])
def test_token_ids_are_held_as_an_array_that_is_as_the_tuple_of_them(large):
    given = np.array([4, 5, large])
    found = example({"id": "a", "input_ids": given, "labels": [-100, 5, large]})
    by_hand = Example(id="a", input_ids=(4, 5, large), targets=(False, True, True))
    given[0] = 9
    assert found == by_hand
    assert hash(found) == hash(by_hand)
    assert repr(found) == repr(by_hand)
    assert found.input_ids != (4, 5)
    text = f'{{"input_ids":[4,5,{large}],"labels":[-100,5,{large}]}}'
    assert found.content_hash == hashlib.sha256(text.encode()).hexdigest()[:16]
    assert found.content_hash == by_hand.content_hash
    ids, targets = found.input_ids or (), found.targets or ()
    assert (ids[-1], ids[:2], ids.index(5), targets[0]) == (large, (4, 5), 1, False)
    assert type(ids[0]) is int
    assert type(targets[0]) is bool
    with pytest.raises(ValueError, match="read-only"):
        np.asarray(ids)[0] = 1
    assert np.array(ids, dtype=np.int64).flags.writeable


def test_masks_and_labels_must_all_agree():
    ids = [4, 5, 6, 7]
    assert example({"input_ids": ids}).targets is None
    assert example({"input_ids": ids, "labels": ids}).targets is None
    row = {"input_ids": ids, "completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 0, 1]}
    assert example(row).targets == (False, True, False, True)
    assert (
        example({"input_ids": ids, "loss_mask": [0, 0, 1, 1]}).targets == (False,) * 2 + (True,) * 2
    )
    padded = {"input_ids": [4, 5, 0, 0], "labels": [-100, 5, -100, -100]}
    assert example({**padded, "attention_mask": [1, 1, 0, 0]}).input_ids == (4, 5, 0, 0)


def test_documents_by_positions_and_by_lengths():
    ids = [4, 5, 6, 7, 8]
    by_positions = example({"input_ids": ids, "position_ids": [0, 1, 0, 1, 2]})
    assert by_positions.document_lengths == (2, 3)
    assert (
        by_positions.content_hash == example({"input_ids": ids, "seq_lengths": [2, 3]}).content_hash
    )
    assert example({"input_ids": ids, "position_ids": range_of(5)}).document_lengths is None
    assert example({"input_ids": ids, "seq_lengths": [5]}).document_lengths is None


def range_of(n):
    return list(range(n))


def test_rows_read_as_they_are_written(tmp_path):
    rows = [
        {"messages": TALK, "tools": [TOOL], "chat_template_kwargs": {"a": 1}},
        {"prompt": TALK[:1], "completion": TALK[1:], "tools": []},
        {"input_ids": [4, 5, 6], "labels": [-100, 5, -100], "seq_lengths": [2, 1]},
        {"input_ids": [4, 5]},
        pair(),
        {"text": "t"},
    ]
    examples = examples_from_rows(rows)
    again = read_examples(write_jsonl(tmp_path / "a.jsonl", [one.content() for one in examples]))
    assert again == examples
    assert again.digest == examples.digest


BAD = [
    ({"prompt": TALK[:1], "completion": "c"}, "'completion' is a string where the other one is a"),
    ({"prompt": [], "completion": TALK[1:]}, "'prompt' is empty; expected at least one turn"),
    ({"prompt": TALK, "completion": TALK[:1]}, "the last message is by 'user'"),
    ({"messages": TALK, "tools": TOOL}, "'tools' must be a list of JSON schemas, not an object"),
    ({"messages": TALK, "tools": ["f"]}, "tool 1 must be an object, not a string"),
    ({"messages": TALK, "tools": "[{"}, "'tools' is a string that is no JSON"),
    ({"messages": TALK, "chat_template_kwargs": [1]}, "'chat_template_kwargs' must be an object"),
    (
        {"messages": TALK, "chat_template_kwargs": {"chat_template": "x", "tokenize": True}},
        "'chat_template_kwargs' has 'chat_template', 'tokenize', which no row can set",
    ),
    ({"messages": [{"role": "assistant", "tool_calls": []}]}, "'content' of message 1 is missing"),
    ({"input_ids": []}, "'input_ids' is empty"),
    ({"input_ids": [-1, 2]}, "'input_ids' holds -1"),
    ({"input_ids": "12"}, "'input_ids' must be a list of integers, not a string"),
    ({"input_ids": [1, 2.5]}, "'input_ids' has a number at position 1, not an integer"),
    ({"input_ids": [1, True]}, "'input_ids' has a boolean at position 1, not an integer"),
    ({"input_ids": np.ones(2, bool)}, "'input_ids' has a boolean at position 0, not an integer"),
    ({"input_ids": np.ones(2)}, "'input_ids' has a number at position 0, not an integer"),
    ({"input_ids": np.ones((1, 2), int)}, "'input_ids' has a list at position 0, not an integer"),
    ({"input_ids": [1, 2**63]}, f"'input_ids' holds {2**63}; expected less than 2^63"),
    ({"input_ids": np.array([2**63], np.uint64)}, f"'input_ids' holds {2**63}; expected less"),
    ({"input_ids": [1, -1]}, "'input_ids' holds -1; token ids are at least 0"),
    ({"input_ids": [1, 2], "labels": [1, -(2**70)]}, f"'labels' holds {-(2**70)}; expected less"),
    ({"input_ids": [1, 2], "labels": [1]}, "'labels' has 1 entries for 2 of 'input_ids'"),
    ({"input_ids": [1, 2], "labels": [2, -100]}, "'labels' has 2 at position 0"),
    ({"input_ids": [1, 2], "attention_mask": [0, 1]}, "'attention_mask' hides tokens"),
    ({"input_ids": [1, 2], "position_ids": [1, 2]}, "'position_ids' do not count 0, 1, 2"),
    ({"input_ids": [1, 2], "position_ids": [0, 2]}, "'position_ids' do not count 0, 1, 2"),
    ({"input_ids": [1, 2], "seq_lengths": [1, 2]}, "sum to 3; expected positive lengths"),
    (
        {"input_ids": [1, 2], "seq_lengths": [1, 1], "position_ids": [0, 1]},
        "'position_ids' and 'seq_lengths' tell of different documents",
    ),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_every_reason_for_which_content_cannot_be_used(row, reason):
    with pytest.raises(DataError) as error:
        examples_from_rows([row])
    (bad,) = error.value.rows
    assert reason in bad.reason
