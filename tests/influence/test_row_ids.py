"""Rows named by their ids: read as they are called, on a command line and in a file."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest

from influence.errors import InputError
from influence.row_ids import named_ids, read_ids, split_ids
from influence.rows import examples_from_rows


def options(ids=None, ids_file=None):
    return SimpleNamespace(ids=ids, ids_file=ids_file)


def test_one_option_names_the_rows_and_none_names_nothing(tmp_path):
    rows = examples_from_rows([{"id": one, "text": "t"} for one in ("a", "b", "c,d")])
    path = tmp_path / "ids"
    path.write_text("c,d\na\n")
    assert named_ids(options(), rows) is None
    assert named_ids(options("b,c,d"), rows) == ["b", "c,d"]
    assert named_ids(options(ids_file=path), rows) == ["c,d", "a"]
    with pytest.raises(InputError, match="--ids and --ids-file were both given"):
        named_ids(options("a", path), rows)


def test_no_ids_are_no_request(tmp_path):
    path = tmp_path / "ids"
    path.write_text("\n \n")
    with pytest.raises(InputError, match=r"^no ids were given: name at least one row$"):
        named_ids(options(" ,"), None)
    with pytest.raises(InputError, match=f"no ids were given: {path} is empty"):
        named_ids(options(ids_file=path), None)


def test_missing_and_binary_files_are_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\xd8")
    for name in ("binary", "missing"):
        with pytest.raises(InputError, match=f"--ids-file .*{name} cannot be read"):
            read_ids(tmp_path / name)


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
