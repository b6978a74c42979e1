"""Changes and rows in files: read as they were written, bad lines named all at once."""

from __future__ import annotations

import json

import pytest

import influence
from influence.errors import DataError, InputError
from influence.row_files import read_examples
from tests.unlearn.record.helpers import ROWS
from unlearn.record.change_files import read_changes, write_rows

TALK = [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "runs"}]

HOSTILE = [
    "line\u2028break\u2029 and\x85next",
    "\v\f\x1c\x1d",
    "ta\tb\r\nend",
    '"quoted" \\ {}',
    "\U0001f98a\u202e",
]


def file_of(tmp_path, *lines):
    path = tmp_path / "changes.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_changes_are_sorted_into_kinds(tmp_path):
    path = file_of(
        tmp_path,
        json.dumps({"id": "a1", "completion": " x"}),
        "",
        json.dumps({"id": 7, "prompt": "y"}),
        json.dumps({"id": "a2", "action": "remove"}),
        json.dumps({"id": "m1", "completion": "z", "action": "correct"}),
        json.dumps({"id": "t1", "text": "w", "prompt": None, "note": "ignored"}),
    )
    requests = read_changes(path)
    assert requests["remove"] == {"a2": None}
    assert requests["relabel"] == {"a1": " x"}
    assert requests["correct"] == {
        "7": {"prompt": "y"},
        "m1": {"completion": "z"},
        "t1": {"text": "w"},
    }


def test_bad_lines_are_listed_all_at_once(tmp_path):
    path = file_of(
        tmp_path,
        "{not json",
        "[1]",
        '{"completion": "x"}',
        '{"id": true, "completion": "x"}',
        '{"id": "a", "completion": "x", "action": "forget"}',
        '{"id": "b", "completion": "x"}',
        '{"id": "b", "completion": "y"}',
        '{"id": "c", "action": "remove", "completion": "y"}',
        '{"id": "d", "action": "relabel", "prompt": "y"}',
        '{"id": "e"}',
        "[" * 100_000,
    )
    with pytest.raises(DataError, match=r"10 lines of .*changes.jsonl cannot be used") as caught:
        read_changes(path)
    text = str(caught.value)
    for sentence in (
        "line 1: not JSON",
        'line 2: expected an object with an "id"',
        'line 3: expected an object with an "id"',
        'line 4: expected an object with an "id"',
        "line 5: action 'forget'; expected one of remove, relabel, correct",
        "line 7: id 'b' was there before; name each row once",
        "line 8: row 'c' is to be removed and has new content",
        "line 9: row 'd' has prompt; a relabelling needs a \"completion\" and nothing else",
        "line 10: row 'e' has no new content",
        "line 11: not JSON",
    ):
        assert sentence in text
    assert "line 6" not in text


def test_a_file_of_one_kind_refuses_the_others(tmp_path):
    path = file_of(tmp_path, '{"id": "a", "action": "remove"}', '{"id": "b", "prompt": "x"}')
    with pytest.raises(
        DataError, match=r"line 1: action 'remove' in a file of relabel; unlearn edit takes several"
    ):
        read_changes(path, "relabel")
    with pytest.raises(DataError, match=r"line 2: row 'b' has prompt; a relabelling needs"):
        read_changes(path, "relabel")


def test_empty_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds no change; give one JSON object per line"):
        read_changes(file_of(tmp_path, "", "  "))
    with pytest.raises(InputError, match="cannot be read"):
        read_changes(tmp_path / "missing.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(InputError, match="cannot be read"):
        read_changes(tmp_path / "binary")


@pytest.mark.parametrize("text", HOSTILE)
def test_changes_with_any_characters_are_read_as_they_were_written(tmp_path, text):
    """JSON allows U+2028, U+0085 and such inside strings: only a line feed ends a line."""
    path = file_of(
        tmp_path,
        json.dumps({"id": "a", "completion": text}, ensure_ascii=False),
        '{"id": "b", "text": "x"}',
    )
    assert read_changes(path) == {
        "remove": {},
        "relabel": {"a": text},
        "correct": {"b": {"text": "x"}},
    }


def test_written_rows_are_read_back_the_same(tmp_path):
    rows = influence.examples_from_rows(
        [
            *ROWS,
            {"id": "ids", "input_ids": [4, 5, 6], "labels": [-100, 5, 6], "seq_lengths": [2, 1]},
            {"id": "two", "prompt": TALK[:1], "completion": TALK[1:], "tools": [{"n": 1}]},
            *(
                {"id": f"h{i}", "prompt": text, "completion": text}
                for i, text in enumerate(HOSTILE)
            ),
        ]
    )
    write_rows(rows, tmp_path / "rows.jsonl")
    again = read_examples(tmp_path / "rows.jsonl")
    assert again == rows
    assert again.digest == rows.digest
