"""Reading of files that may be damaged or hostile, and the JSON that records are made of."""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from influence.errors import StoreError

#: What a value of each type is called in sentences.
KINDS = {str: "text", int: "a whole number", list: "a list", dict: "an object"}

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100


def value_at(value: Any, keys: str) -> Any:
    """The value at the path `a.b.c` of nested objects, None where there is none."""
    for key in keys.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def typed_value_at(record: Any, keys: str, kind: type) -> Any:
    """The value at the path `a.b.c`, which must be exactly of this type.

    `StoreError` names the path where it is not.
    """
    value = value_at(record, keys)
    if type(value) is not kind:
        raise StoreError(f"{keys} is {shortened(value)}, expected {KINDS[kind]}")
    return value


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in UTF-8 bytes.

    `ValueError` or `RecursionError` where they are none.
    """
    value = json.loads(data.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{shortened(value)} is no JSON object")
    return value


def canonical(entry: dict[str, Any]) -> bytes:
    """The one way to write an object that hashes are taken of: keys sorted, no blanks, ASCII."""
    text = json.dumps(entry, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return text.encode("ascii")


def refuse_unless_plain(path: Path) -> None:
    """Refuse a folder, pipe or device before it is opened, because reading one may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise StoreError("it is no plain file")


def read_plain(path: Path) -> bytes:
    """The bytes of a plain file.

    `StoreError` for anything else, `OSError` where it cannot be read.
    """
    refuse_unless_plain(path)
    return path.read_bytes()


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a plain file, in hexadecimal, with the errors of `read_plain`."""
    refuse_unless_plain(path)
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def json_value(value: Any) -> Any:
    """A value as JSON in UTF-8 can hold it.

    NaN and infinity become null, arrays lists, and unpaired surrogates are escaped.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, Mapping):
        return {json_value(key): json_value(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(part) for part in value]
    return json_value(value.tolist()) if hasattr(value, "tolist") else value


def reason_of(error: BaseException) -> str:
    """What went wrong, in a few words that fit after a colon."""
    if isinstance(error, FileNotFoundError):
        return "it is missing"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    by_system = error.strerror if isinstance(error, OSError) else None
    return clipped(by_system or str(error) or type(error).__name__)


def shortened(value: Any) -> str:
    """The value as Python writes it, cut where it is long or deep."""
    return _SHORT.repr(value)


def clipped(text: str, width: int = 400) -> str:
    """The text, cut to `width` characters."""
    return text if len(text) <= width else text[: width - 3] + "..."
