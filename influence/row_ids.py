"""Training rows named by their ids: on a command line, in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from influence.errors import InputError

if TYPE_CHECKING:
    from influence.options import RowsOptions
    from influence.rows import Examples


def named_ids(options: RowsOptions, rows: Examples | None) -> list[str] | None:
    """The ids of `rows` that were named, None where neither of the options was given."""
    if options.ids is not None and options.ids_file is not None:
        raise InputError("--ids and --ids-file were both given: give one of them")
    if options.ids_file is not None:
        ids, place = read_ids(options.ids_file, rows), f"{options.ids_file} is empty: "
    elif options.ids is not None:
        ids, place = split_ids(options.ids, rows), ""
    else:
        return None
    if not ids:
        raise InputError(f"no ids were given: {place}name at least one row")
    return ids


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
