"""Files of changes, ids and rows: read for an edit, and written beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from influence.errors import DataError, InputError
from influence.row_content import CONTENT_KEYS
from influence.rows import Example, Examples
from unlearn.record.change import ACTIONS, OTHER_KEYS


def read_changes(path: Path, only: str | None = None) -> dict[str, dict[str, Any]]:
    """Requests by kind from JSON lines, for `plan`.

    A line is `{"id", "completion"}`, or with other new content, or `{"id", "action": "remove"}`.
    Without an `action` a row is a relabelling if it has a completion only, else a correction; with
    `only` (`relabel`, `correct`) all rows are of that kind. Bad lines are listed all at once.
    """
    requests: dict[str, dict[str, Any]] = {"remove": {}, "relabel": {}, "correct": {}}
    problems: list[str] = []
    try:
        # Not splitlines, which would also split inside JSON strings.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"line {number}: not JSON ({error})")
            continue
        problem = _sort_in(row, only, requests)
        if problem:
            problems.append(f"line {number}: {problem}")
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:50])
        raise DataError(f"{len(problems)} lines of {path} cannot be used:\n{shown}")
    if not any(requests.values()):
        raise InputError(
            f'{path} holds no change; give one JSON object per line, as in {{"id": ..., '
            '"completion": ...}'
        )
    return requests


def _sort_in(row: Any, only: str | None, requests: dict[str, dict[str, Any]]) -> str:
    """Add one request to its kind, and return what is wrong with it, or an empty text."""
    row_id = row.get("id") if isinstance(row, dict) else None
    if not isinstance(row_id, str | int) or isinstance(row_id, bool):
        return 'expected an object with an "id"'
    id, content = (
        str(row_id),
        {key: row[key] for key in (*CONTENT_KEYS, *OTHER_KEYS) if row.get(key) is not None},
    )
    usual = "relabel" if set(content) == {"completion"} else "correct"
    action = row.get("action") or only or usual
    if action not in ACTIONS:
        return f"action {action!r}; expected one of {', '.join(ACTIONS)}"
    if only is not None and action != only:
        return f"action {action!r} in a file of {only}; unlearn edit takes several kinds at once"
    if any(id in kind for kind in requests.values()):
        return f"id {id!r} was there before; name each row once"
    if action == "remove":
        if content:
            return f"row {id!r} is to be removed and has new content: leave one of them out"
        requests["remove"][id] = None
    elif action == "relabel":
        if set(content) != {"completion"}:
            given = ", ".join(content) or "no content"
            return f'row {id!r} has {given}; a relabelling needs a "completion" and nothing else'
        requests["relabel"][id] = content["completion"]
    elif not content:
        return (
            f'row {id!r} has no new content; expected a "prompt", a "completion", "messages" or a '
            '"text"'
        )
    else:
        requests["correct"][id] = content
    return ""


def read_ids(path: Path, rows: Examples | None = None) -> list[str]:
    """Ids from a file, one per line: the line as it is, without outer blanks, or as JSON text.

    Which of these names a row of `rows` is taken. Raises `InputError` where several do.
    """
    try:
        # newline="": a carriage return inside an id is none of a line's end
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = file.read().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--ids-file {path} cannot be read: {error}") from error
    found = [
        _id_of_line(line.removesuffix("\r"), f"line {number} of {path}", rows)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    return found


def split_ids(text: str, rows: Examples | None = None) -> list[str]:
    """Ids from a command line: separated by commas, or a JSON list of texts.

    Commas and outer blanks may be parts of ids, where only that names rows of `rows`. Raises
    `InputError` where the text can be read in several ways.
    """
    listed = _json(text)
    if isinstance(listed, list) and (rows is None or text not in rows):
        if not all(isinstance(id, str | int) and not isinstance(id, bool) for id in listed):
            raise InputError(f"--ids {text} was given; expected a JSON list of texts")
        return [str(id) for id in listed]
    parts = text.split(",")
    plain = [part.strip() for part in parts if part.strip()]
    if rows is None:
        return plain
    longest = 1 + max((id.count(",") for id in rows.ids), default=0)
    # from the end: how many ways there are to read the parts from here on, and one of them
    ways, ids = [0] * len(parts) + [1], [[] for _ in parts] + [[]]
    for start in reversed(range(len(parts))):
        for end in range(start + 1, min(start + longest, len(parts)) + 1):
            whole = ",".join(parts[start:end])
            names = [[id] for id in dict.fromkeys((whole, whole.strip())) if id in rows]
            if not whole.strip():
                names.append([])
            for name in names:
                if ways[end]:
                    ways[start] = min(ways[start] + ways[end], 2)
                    ids[start] = name + ids[end]
    if ways[0] > 1:
        raise InputError(
            f"--ids {text!r} can be read in several ways, as there are ids with commas or outer "
            f"blanks in them: give a JSON list, as in --ids '{json.dumps(plain[:2])}'"
        )
    return ids[0] if ways[0] else plain


def _id_of_line(line: str, place: str, rows: Examples | None) -> str:
    """The id that a line names."""
    decoded = _json(line)
    texts = [decoded] if isinstance(decoded, str) else []
    if rows is not None:
        named = [id for id in dict.fromkeys((line, line.strip(), *texts)) if id in rows]
        if len(named) > 1:
            raise InputError(
                f"{place} can be any of the ids {', '.join(map(repr, named))}: write it as JSON, "
                f"as in {json.dumps(named[0])}"
            )
        if named:
            return named[0]
    return texts[0] if texts else line.strip()


def _json(text: str) -> Any:
    """What a text in quotes or brackets says as JSON; None: it says nothing."""
    if text.strip()[:1] not in ('"', "["):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def write_rows(rows: Iterable[Example], path: Path) -> None:
    """Write rows as JSON lines that `read_examples` reads."""
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            group = {} if row.group is None else {"group": row.group}
            content = {"id": row.id, **group, **row.content()}
            file.write(json.dumps(content, ensure_ascii=False) + "\n")
