"""Files of changes, ids and rows: read for an edit, and written beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from influence.errors import DataError, InputError
from influence.row_content import CONTENT_KEYS
from influence.rows import Example
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


def write_rows(rows: Iterable[Example], path: Path) -> None:
    """Write rows as JSON lines that `read_examples` reads."""
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            group = {} if row.group is None else {"group": row.group}
            content = {"id": row.id, **group, **row.content()}
            file.write(json.dumps(content, ensure_ascii=False) + "\n")
