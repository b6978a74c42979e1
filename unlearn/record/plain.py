"""Reading and writing JSON, bytes and digests that may be damaged or hostile."""

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

_KINDS = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


_SHORT = reprlib.Repr()


_SHORT.maxstring = _SHORT.maxother = 100


def value_at(value: Any, keys: str) -> Any:
    """The value at `a.b.c`, None where there is none."""
    for key in keys.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def typed_value_at(record: Any, keys: str, kind: type) -> Any:
    """The value at `a.b.c`, which must be of this type."""
    value = value_at(record, keys)
    if type(value) is not kind:
        raise StoreError(f"{keys} is {shortened(value)}, expected {_KINDS[kind]}")
    return value


def parse_object(data: bytes) -> dict[str, Any]:
    value = json.loads(data.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{shortened(value)} is no JSON object")
    return value


def canonical(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode(
        "ascii"
    )


def refuse_unless_plain(path: Path) -> None:
    """Refuse a folder, pipe or device before it is opened: reading one may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise StoreError("it is no plain file")


def read_plain(path: Path) -> bytes:
    refuse_unless_plain(path)
    return path.read_bytes()


def sha256_of_file(path: Path) -> str:
    refuse_unless_plain(path)
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def as_json(value: Any) -> Any:
    """What JSON in UTF-8 can hold: NaN and infinity as null, arrays as lists, unpaired surrogates escaped."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, Mapping):
        return {as_json(key): as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return as_json(value.tolist()) if hasattr(value, "tolist") else value


def reason_of(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "it is missing"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return clipped(
        (error.strerror if isinstance(error, OSError) else None)
        or str(error)
        or type(error).__name__
    )


def shortened(value: Any) -> str:
    return _SHORT.repr(value)


def clipped(text: str, width: int = 400) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
