"""Tables that go through a spreadsheet: cells that it leaves as they are, and CSV that it saved.

A spreadsheet runs a cell that begins with `=`, `+`, `-` or `@`, and changes one that looks like a
number, a date or a truth value: such texts get an apostrophe before them, as does a text that begins
with one, and `unescaped` takes exactly one away again. Where the system's list separator is a
semicolon, a spreadsheet splits lines there, within quotes too, and takes blanks and quotes before a
formula for none: what follows one gets its apostrophe as a cell of its own would. So texts come back as they were. What a spreadsheet saves, with semicolons
or tabs and a byte order mark, is read too.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from influence.errors import InputError
from influence.messages import listed

#: What a spreadsheet takes for a formula, a number, an amount, a date or a truth value; and the
#: apostrophe.
_MONTH = (
    "jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?"
    "|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?"
)
_TAKEN = re.compile(
    r"[ \"]*(?:[=+\-@\t\r\n'＝＋－＠]|[.($€£¥]*\d[\d\s.,:/()$€£¥%+\-]*(?:e[+\-]?\d+)?(?:[ap]\.?m\.?)?[\s)%$€£¥]*$|(?:true|false)$"
    rf"|\d{{1,2}}[\s./-]*(?:{_MONTH})"
    rf"|(?:{_MONTH})[ ./-]*\d)",
    re.IGNORECASE,
)
#: Formulas after what some spreadsheets split a line at; with and without the apostrophe.
_FORMULA = r"(?=[=+\-@＝＋－＠])"
_WITHIN = re.compile(rf"([;\t\r\n][ \"]*'*){_FORMULA}")
_WITHIN_ESCAPED = re.compile(rf"([;\t\r\n][ \"]*'*)'{_FORMULA}")
#: Characters of a cell that are read, at most; csv's own limit is 131,072.
_LONGEST = 2**31 - 1


def escaped(text: str) -> str:
    """A text as a cell that a spreadsheet leaves as it is."""
    within = _WITHIN.sub(r"\1'", text)
    return f"'{within}" if _TAKEN.match(text) else within


def unescaped(cell: str) -> str:
    """The text of an `escaped` cell."""
    return _WITHIN_ESCAPED.sub(r"\1", cell[1:] if cell.startswith("'") else cell)


@dataclass(frozen=True)
class Table:
    """A table as text: its columns, its rows by column, and the line in which each row ends."""

    columns: list[str]
    rows: list[dict[str, str]]
    lines: list[int]


def read_table(path: Path, needed: Sequence[str], maker: str) -> Table:
    """A CSV file with commas, semicolons or tabs; rows that are empty are left out.

    Cells stay as they are (`unescaped`), those that are missing are empty. Raises `InputError` where
    there is no such file or it lacks a column that is `needed`; `maker` is the command that makes it.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist: make it with {maker}")
    before, rows, lines = csv.field_size_limit(_LONGEST), [], []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            head = file.readline()
            file.seek(0)
            delimiter = max(",;\t", key=head.count)
            reader = csv.DictReader(file, restval="", delimiter=delimiter)
            columns = [name for name in reader.fieldnames or () if name]
            for row in reader:
                cells = {name: row[name] for name in columns}
                if any(cells.values()):
                    rows.append(cells)
                    lines.append(reader.line_num)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}") from error
    finally:
        csv.field_size_limit(before)
    if missing := [name for name in needed if name not in columns]:
        raise InputError(
            f"{path} lacks the columns {listed(missing)}; expected the table that {maker} wrote"
        )
    return Table(columns, rows, lines)
