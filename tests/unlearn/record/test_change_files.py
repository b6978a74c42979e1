"""Changes, ids and rows in files: read as they were written, bad lines named all at once."""

from __future__ import annotations

import json
import re

import pytest

import influence
from influence.errors import DataError, InputError
from influence.row_files import read_examples
from influence.rows import examples_from_rows
from tests.unlearn.record.helpers import ROWS
from unlearn.record.change_files import read_changes, read_ids, split_ids, write_rows

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
    for read in (read_changes, read_ids):
        with pytest.raises(InputError, match="cannot be read"):
            read(tmp_path / "binary")


def test_ids_are_read_one_a_line(tmp_path):
    path = tmp_path / "ids"
    path.write_bytes(b"\xef\xbb\xbfa1\r\n\n a2 \nrow with spaces\n")
    assert read_ids(path) == ["a1", "a2", "row with spaces"]


#: Ids that are hard to name.
IDS = ["0", "1", "0,1", "a", " a", "b ", "c\nd", "e\r", "f\u2028g", '"h"', "i,j", "i", "[k]", "7"]


@pytest.mark.parametrize("id", IDS)
def test_every_id_can_be_named_as_json(tmp_path, id):
    rows = examples_from_rows([{"id": one, "text": "t"} for one in IDS])
    path = tmp_path / "ids"
    for escaped in (True, False):
        path.write_bytes((json.dumps(id, ensure_ascii=escaped) + "\n").encode())
        assert read_ids(path, rows) == [id]
    assert split_ids(json.dumps([id, "1"]), rows) == [id, "1"]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("0,1", "0,1"),
        ("a", "a"),
        ("b ", "b "),
        (" b\t", "b"),  # no row has it: said as it was typed, without blanks
        ("f\u2028g\r", "f\u2028g"),
        ("  7", "7"),
        ('"h"', '"h"'),
        ("new", "new"),
        ('"new\\n"', "new\n"),
        ('"half', '"half'),
    ],
)
def test_a_line_of_ids_is_read_as_what_a_row_is_called(tmp_path, line, named):
    rows = examples_from_rows([{"id": one, "text": "t"} for one in IDS])
    (tmp_path / "ids").write_bytes(f"{line}\n\n".encode())
    assert read_ids(tmp_path / "ids", rows) == [named]


def test_a_line_that_names_two_rows_is_refused(tmp_path):
    rows = examples_from_rows([{"id": one, "text": "t"} for one in IDS])
    (tmp_path / "ids").write_text("0\n a\n")
    with pytest.raises(InputError, match=re.escape("line 2 of ")) as error:
        read_ids(tmp_path / "ids", rows)
    assert """can be any of the ids ' a', 'a': write it as JSON, as in " a\"""" in str(error.value)


@pytest.mark.parametrize(
    ("ids", "text", "named"),
    [
        (["0", "1"], "0,1", ["0", "1"]),
        (["0,1"], "0,1", ["0,1"]),
        (["0", "0,1"], "0,1", ["0,1"]),
        (["a", "b,c", "d"], "a, b,c ,d", ["a", "b,c", "d"]),
        (["a,b,c", "c"], "c,a,b,c", ["c", "a,b,c"]),
        (["a "], "a ", ["a "]),
        (["a"], " a ,,", ["a"]),
        (["a", "b"], "a,x", ["a", "x"]),  # nothing reads all of it: the plain reading is refused
        (["[x"], "[x", ["[x"]),
        (['["a"]', "a"], '["a"]', ['["a"]']),
        (["a", "7"], '["a", 7]', ["a", "7"]),
        (["0", "1", "0,1"], "0,1", None),
        (["a", "a "], "a ", None),
    ],
)
def test_ids_of_a_command_line_are_read_as_what_rows_are_called(ids, text, named):
    rows = examples_from_rows([{"id": one, "text": "t"} for one in ids])
    if named is not None:
        assert split_ids(text, rows) == named
        return
    with pytest.raises(InputError, match="can be read in several ways, as there are ids with com"):
        split_ids(text, rows)


def test_a_list_of_ids_holds_texts():
    with pytest.raises(InputError, match="expected a JSON list of texts"):
        split_ids('["a", null]')
    assert split_ids("a,b c ,") == ["a", "b c"]


def test_thousands_of_ids_are_read_at_once():
    rows = examples_from_rows([{"id": f"r{i}", "text": "t"} for i in range(5000)])
    assert split_ids(",".join(rows.ids), rows) == rows.ids


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
