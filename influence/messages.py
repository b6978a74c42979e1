"""Words that error messages and tables share: names in a list, kinds of values, one short line.

Every function takes plain values and returns text for a person. Nothing here reads a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def listed(names: Iterable[object]) -> str:
    """Names in quotes, separated by commas: `'prompt', 'text'`."""
    return ", ".join(repr(name) for name in names)


def kind_of(value: object) -> str:
    """A value's type in words of the file, not of Python: `a string`, `an object`, `null`."""
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, Mapping):
        return "an object"
    names = {str: "a string", int: "an integer", float: "a number", list: "a list", tuple: "a list"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def printable(text: str) -> str:
    """Text of a row or of a file of others for a terminal.

    Control characters, which could move the cursor, become spaces; line breaks stay.
    """
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def one_line(text: str, width: int) -> str:
    """Text as one line of at most `width` characters, cut with `…`.

    Control characters become spaces, so the line cannot move a terminal's cursor.
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= width else line[: max(width - 1, 0)].rstrip() + "…"
