"""Reading of an edit's record for its page: which records are refused, and in which words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from influence.errors import InputError, StoreError
from influence.messages import printable
from influence.store import read_json
from unlearn.record.edit_record import FORMAT, RECORD, EditRecord

#: The actions that a record may hold, and what became of a row by each.
DONE = {"remove": "removed", "relabel": "relabelled", "correct": "corrected"}


def read_record(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The record of an edit as a dict, with its keys and types checked.

    Raises
    ------
    InputError
        If the folder is no edit's, or its record has another format than this version reads.
    StoreError
        If the record is damaged: no JSON, a key missing, or a value of the wrong type. The message
        names it.
    """
    return _checked(folder)[0]


def read_edit_record(folder: str | os.PathLike[str]) -> EditRecord:
    """The record of an edit as a value, checked, with the errors of `read_record`."""
    return _checked(folder)[1]


def _checked(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], EditRecord]:
    """The record as it is stored, and as a value."""
    path = Path(folder) / RECORD
    if not path.is_file():
        raise InputError(
            f"{folder} holds no {RECORD}; expected a folder made by unlearn remove, relabel, "
            "correct "
            "or train: give the --out of such a command"
        )
    try:
        stored = read_json(path)
    except RecursionError:
        raise StoreError(
            f"{path} is nested too deeply to be the record of an edit: it is damaged"
        ) from None
    if "format" not in stored:
        raise _damaged(path, "the key format is missing")
    if stored["format"] != FORMAT or isinstance(stored["format"], bool):
        other = printable(str(stored["format"]))[:40]
        raise InputError(
            f"{path} has format {other}; this version reads format {FORMAT}: use the version of "
            "the "
            "toolkit that made it"
        )
    try:
        record = EditRecord.from_json(stored)
        _refuse_contradictions(record)
    except StoreError as error:
        raise _damaged(path, str(error)) from None
    return stored, record


def _refuse_contradictions(record: EditRecord) -> None:
    """Refuse unknown actions, rows that are named twice, and rows that were not asked for."""
    requested = {request.id: request.action for request in record.requests}
    if not requested:
        raise StoreError("requests is empty; an edit names at least one row")
    if record.kind not in (*DONE, "mixed"):
        raise StoreError(f"kind is {record.kind[:40]!r}; expected {', '.join(DONE)} or mixed")
    for place, rows in (("requests", record.requests), ("rows", record.rows)):
        seen: set[str] = set()
        for index, row in enumerate(rows):
            where = f"{place}[{index}]"
            if row.action not in DONE:
                raise StoreError(
                    f"{where}.action is {row.action[:40]!r}; expected {', '.join(DONE)}"
                )
            if row.id in seen:
                raise StoreError(
                    f"{where} is of the row {row.id[:40]!r}, which {place} named before"
                )
            if requested.get(row.id) != row.action:
                raise StoreError(
                    f"{where} is of the row {row.id[:40]!r}, which requests does not name so"
                )
            seen.add(row.id)


def _damaged(path: Path, what: str) -> StoreError:
    """The error about a damaged record."""
    return StoreError(
        f"{path} is damaged: {printable(what)}; take the record from a backup, or make the edit "
        "again"
    )
