"""Cells that a spreadsheet leaves alone, and tables that it saved."""

from __future__ import annotations

import csv
import random

import pytest

from analysis.spreadsheets import escaped, read_table, unescaped
from influence.errors import InputError


@pytest.mark.parametrize(
    "text",
    [
        "007",
        "MAR1",
        "sep-2",
        "$5",
        "(3)",
        "true",
        "€1",
        "1e5",
        "75 %",
        "1/2",
        "2 May",
        "3:30 pm",
        " 5",
    ],
)
def test_what_a_spreadsheet_would_change_has_an_apostrophe(text):
    assert escaped(text) == f"'{text}"
    assert unescaped(escaped(text)) == text


def test_no_program_that_splits_at_semicolons_finds_a_formula(tmp_path):
    """Whatever stands before it; and the text comes back as it was."""
    rng, pieces = random.Random(0), [";", '"', "'", " ", "=", "+1", "@", "\n", "a", ","]
    texts = ["".join(rng.choices(pieces, k=rng.randint(1, 8))) for _ in range(20_000)]
    texts += ["a;\"=cmd|' /C calc'!A0;b", " =1+1", '"=1', '; "=1']
    for text in texts:
        assert unescaped(escaped(text)) == text
    path = tmp_path / "t.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([text_cell] for text_cell in map(escaped, texts))
    with path.open(newline="") as file:
        cells = [cell for row in csv.reader(file, delimiter=";") for cell in row]
    assert [cell for cell in cells if cell.strip(' "')[:1] in tuple("=+-@")] == []


def test_words_are_left_as_they_are():
    for text in (
        "plain 7",
        "marble 7",
        "decade",
        "mayor",
        "a;b",
        "a; b-c",
        "(see)",
        "75% of it",
        "7 dogs",
        "3 pm or so",
        "12 monkeys",
    ):
        assert escaped(text) == text


# ---- tables --------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_what_a_spreadsheet_saved_is_read(tmp_path, separator):
    """With its separator and a byte order mark, lines of nothing, and cells that are missing."""
    lines = ["id,note,", '"a\nb",,', ",,", "", "c", "'=1,x,beyond"]
    text = "\ufeff" + "\r\n".join(lines).replace(",", separator)
    (tmp_path / "t.csv").write_text(text, encoding="utf-8", newline="")
    table = read_table(tmp_path / "t.csv", ("id",), "a command")
    assert table.columns == ["id", "note"]
    assert [tuple(row.values()) for row in table.rows] == [("a\nb", ""), ("c", ""), ("'=1", "x")]
    assert table.lines == [3, 6, 7]


def test_cells_may_be_long_and_the_limit_stays_as_it_was(tmp_path):
    before = csv.field_size_limit()
    (tmp_path / "t.csv").write_text(f"id\n{'x' * 300_000}\n")
    (row,) = read_table(tmp_path / "t.csv", ("id",), "a command").rows
    assert len(row["id"]) == 300_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "t.csv does not exist: make it with a command"),
        (b"id\n\xff\n", "t.csv cannot be read as CSV: 'utf-8' codec"),
        (b"\n", "lacks the columns 'id', 'word'; expected the table that a command wrote"),
        (b"word\n1\n", "lacks the columns 'id'; expected"),
    ],
)
def test_other_files_are_refused(tmp_path, content, says):
    if content is not None:
        (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(InputError, match=says):
        read_table(tmp_path / "t.csv", ("id", "word"), "a command")
