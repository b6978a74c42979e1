"""JSON objects by the declarations of dataclasses: read, checked and written.

A field's declared type says what its key may hold, and the rules in its metadata what else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from math import inf
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from influence.errors import StoreError

# Rules of a field for reading and writing, in its metadata.
#: An object that must not be null.
NEEDED = {"needed": True}
#: A key that was added to the format later, and that no page shows: missing or of a wrong type, it
#: reads as null.
LATER = {"later": True}
#: All keys of the object, also those that are not declared.
WHOLE = {"whole": True}


@cache
def nothing(kind: Any) -> Any:
    """The value of a class that null reads as, and that is written as null."""
    return kind(**{name: _null(hint) for name, hint in _hints(kind).items()})


@cache
def _hints(kind: Any) -> dict[str, Any]:
    """The declared type of every field."""
    return get_type_hints(kind)


def _null(hint: Any) -> Any:
    """What null reads as."""
    if is_dataclass(hint):
        return nothing(hint)
    empty = {tuple: (), Mapping: {}}
    return empty.get(get_origin(hint)) if get_origin(hint) in empty else None


def read(kind: Any, record: Any, where: str, *, salvage: bool) -> Any:
    """A dataclass from a JSON object. With `salvage` whatever cannot be read is null."""
    if not isinstance(record, dict):
        raise StoreError(f"{where} is {_called(record)}; expected an object")
    values = {}
    for part in fields(kind):
        rule, hint = part.metadata, _hints(kind)[part.name]
        at = f"{where}.{part.name}" if where else part.name
        if "whole" in rule:
            values[part.name] = record
            continue
        lenient = salvage or "later" in rule
        if part.name not in record and not (lenient or "may_lack" in rule):
            raise StoreError(f"the key {at} is missing")
        try:
            value = record.get(part.name)
            values[part.name] = _value(hint, value, at, "needed" in rule, salvage)
        except StoreError:
            if not lenient:
                raise
            values[part.name] = _null(hint)
    return kind(**values)


def _value(hint: Any, value: Any, where: str, needed: bool, salvage: bool) -> Any:
    """A value of the declared type, or a `StoreError` where it is another, or null and `needed`."""
    if isinstance(hint, UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
        if value is None:
            return None
    if is_dataclass(hint):
        if value is None and not needed:
            return nothing(hint)
        return read(hint, value, where, salvage=salvage)
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise StoreError(f"{where} is {_called(value)}; expected a list")
        (inner, _) = get_args(hint)
        places = (f"{where}[{index}]" for index in range(len(value)))
        pairs = zip(value, places, strict=True)
        return tuple(_value(inner, item, place, True, salvage) for item, place in pairs)
    if not _fits(hint, value):
        expected = {str: "a text", bool: "true or false", int: "a number or null"}
        expected |= {float: "a number or null"}
        raise StoreError(f"{where} is {_called(value)}; expected {expected.get(hint, 'an object')}")
    return value


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value is a text, a truth, a number or an object, as declared."""
    if get_origin(hint) is Mapping:
        return isinstance(value, dict)
    if hint not in (int, float):
        return isinstance(value, hint)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    # Larger ones are no losses, and overflow where they are used.
    return not 1e300 < abs(value) < inf


def _called(value: Any) -> str:
    """What a value is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def written(value: Any) -> Any:
    """A value as JSON holds it."""
    if isinstance(value, tuple):
        return [written(part) for part in value]
    if not is_dataclass(value):
        return dict(value) if isinstance(value, Mapping) else value
    if value is nothing(type(value)):
        return None
    entry: dict[str, Any] = {}
    for part in fields(value):
        if "whole" in part.metadata:
            return dict(getattr(value, part.name))
        if part.metadata.get("only", lambda _: True)(value):
            entry[part.name] = written(getattr(value, part.name))
    return entry
