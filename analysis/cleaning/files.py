"""The files of a cleaning: `rows.csv`, which a person edits, and what commands take.

    DIR/rows.csv        a line for each row and reason; `decision` and `answer` are for the reader
    DIR/remove.txt      ids suggested for removal, for --ids-file
    DIR/relabel.jsonl   better answers where the rows hold one, for unlearn relabel --changes
    DIR/summary.json    what was asked, what was found, what is predicted
    DIR/applied.json    what was decided, and what it changed (`analysis.cleaning.applied`)

**rows.csv** is RFC 4180: CRLF, quotes where they must be, UTF-8; its texts are such that a spreadsheet
leaves them as they are (`analysis.spreadsheets`), and ids come back as they were.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.cleaning.findings import DECISIONS, RELABEL, REMOVE, Finding, Found
from analysis.cleaning.personal import without_secrets
from analysis.spreadsheets import escaped, read_table, unescaped
from influence.errors import DataError, InputError
from influence.messages import one_line
from influence.rows import Examples

ROWS, REMOVED, RELABELLED = "rows.csv", "remove.txt", "relabel.jsonl"
SUMMARY, APPLIED = "summary.json", "applied.json"
COLUMNS = (
    "id",
    "reason",
    "rank",
    "score",
    "gain",
    "evidence",
    "other",
    "suggested",
    "decision",
    "answer",
    "text",
)
#: Columns that must be there when a list is read back, and the command that writes them.
NEEDED, MAKER = ("id", "decision"), "analysis clean --out"
#: Characters of a row's text, and of a better answer, that are shown.
SHOWN, SHOWN_ANSWER = 160, 80


def csv_text(found: Sequence[Found], rows: Examples, previews: Sequence[str]) -> str:
    """The list as CSV. `previews` [n] are the rows' texts, whose secrets are masked here."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for part in found:
        for rank, each in enumerate(part.findings, start=1):
            writer.writerow(_cells(rank, each, rows, previews))
    return out.getvalue()


def _cells(rank: int, each: Finding, rows: Examples, previews: Sequence[str]) -> list[str | int]:
    evidence = each.evidence
    if each.answer is not None:
        evidence += f"; better: {one_line(without_secrets(each.answer), SHOWN_ANSWER)}"
    return [
        escaped(rows.ids[each.row]),
        each.reason,
        rank,
        f"{each.score:.6g}",
        "" if each.gain is None else f"{each.gain:.6g}",
        escaped(one_line(evidence, 600)),
        "" if each.other is None else escaped(rows.ids[each.other]),
        each.suggested,
        "",
        "",
        escaped(one_line(without_secrets(previews[each.row]), SHOWN)),
    ]


def suggestions(found: Sequence[Found]) -> tuple[list[int], dict[int, str]]:
    """The rows that are suggested for removal, and better answers by row; no row is in both.

    Personal data goes; elsewhere a better answer, the first in the list, wins over a removal.
    """
    findings = [each for part in found for each in part.findings]
    leaking = {e.row for e in findings if e.reason == "personal" and e.suggested == REMOVE}
    better: dict[int, str] = {}
    for each in findings:
        if each.suggested == RELABEL and each.answer is not None and each.row not in leaking:
            better.setdefault(each.row, each.answer)
    gone = {each.row for each in findings if each.suggested == REMOVE} - set(better)
    return sorted(gone), better


def ids_text(ids: Sequence[str]) -> str:
    """Ids for --ids-file, one a line; those that a line cannot hold as they are as JSON text."""
    plain = [id == id.strip() and id != "" and id.isprintable() and id[0] != '"' for id in ids]
    return "".join(
        f"{id if fits else json.dumps(id)}\n" for id, fits in zip(ids, plain, strict=True)
    )


def answers_text(answers: Mapping[str, str]) -> str:
    """Better answers by id as JSON lines, as `unlearn relabel` reads them."""
    lines = ({"id": id, "completion": answer} for id, answer in answers.items())
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


# ---- reading what a person decided ---------------------------------------------------------------


@dataclass(frozen=True)
class Decided:
    """What was decided: ids that go, new answers by id, and ids that stay as they are."""

    removed: tuple[str, ...]
    relabelled: dict[str, str]
    kept: tuple[str, ...]


def read_decisions(folder: Path, rows: Examples, *, suggested: bool = False) -> Decided:
    """Read what a person decided in a cleaning's folder.

    `suggested`: where nothing was decided of a row, what is suggested holds. A row that is relabelled
    gets the answer in its line, or the one in `relabel.jsonl`.

    Raises `DataError`, with all wrong lines at once, for unknown ids, decisions that are none, that
    contradict one another, or a relabelling without an answer; `InputError` where nothing is decided.
    """
    path = folder / ROWS
    table = read_table(path, NEEDED, MAKER)
    problems: list[str] = []
    decided: dict[str, tuple[str, str, int]] = {}
    advised: dict[str, str] = {}
    for number, line in zip(table.lines, table.rows, strict=True):
        id = unescaped(line["id"])
        if id not in rows and line["id"] in rows:
            id = line["id"]
        word = line["decision"].strip().lower()
        if id not in rows:
            problems.append(f"line {number}: no training row has the id {id!r}")
        elif word not in ("", *DECISIONS):
            problems.append(
                f"line {number}: decision {word!r}; expected {', '.join(DECISIONS)} or nothing"
            )
        elif word:
            answer = unescaped(line.get("answer") or "")
            before = decided.get(id)
            if before is not None and before[0] != word:
                problems.append(
                    f"line {number}: {id!r} is {word!r} here and {before[0]!r} in line {before[2]}"
                )
            elif before is not None and answer and before[1] and before[1] != answer:
                problems.append(f"line {number}: {id!r} has another answer in line {before[2]}")
            elif before is None or answer:
                decided[id] = word, answer, number
        elif suggested and (advice := (line.get("suggested") or "").strip()):
            advised[id] = advice if advice in DECISIONS else ""
    better = _answers(folder / RELABELLED) if (folder / RELABELLED).exists() else {}
    if suggested:
        leaking = {
            unescaped(line["id"])
            for line in table.rows
            if line.get("reason") == "personal" and line.get("suggested") == REMOVE
        }
        for id in advised:
            if id not in decided:
                relabels = id in better and id not in leaking
                decided[id] = (RELABEL if relabels else advised[id]), "", 0
    relabelled: dict[str, str] = {}
    for id, (word, answer, number) in decided.items():
        if word == RELABEL:
            relabelled[id] = answer or better.get(id, "")
            if not relabelled[id]:
                problems.append(
                    f"line {number}: {id!r} is to be relabelled and has no answer: write one into "
                    "the column answer"
                )
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:50])
        raise DataError(f"{len(problems)} lines of {path} cannot be used:\n{shown}")
    gone = tuple(id for id, (word, _, _) in decided.items() if word == REMOVE)
    if not gone and not relabelled:
        raise InputError(
            f"{path} decides nothing: write remove, relabel or keep into the column decision of the "
            "rows that you looked at, or give --take-suggested"
        )
    kept = tuple(id for id, (word, _, _) in decided.items() if word not in (REMOVE, RELABEL, ""))
    return Decided(gone, relabelled, kept)


def _answers(path: Path) -> dict[str, str]:
    """Better answers by id, as `answers_text` wrote them."""
    from unlearn.record.change_files import read_changes

    if not path.read_text(encoding="utf-8").strip():
        return {}
    return dict(read_changes(path, "relabel")["relabel"])
