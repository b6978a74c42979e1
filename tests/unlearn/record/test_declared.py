"""Dataclasses from JSON objects and back, by declarations that are made here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from influence.errors import StoreError
from unlearn.record.declared import LATER, NEEDED, WHOLE, nothing, read, written


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the thing."""

    number: float | None
    count: int | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Whatever there is."""

    all: Mapping[str, Any] = field(metadata=WHOLE)


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One field of each rule."""

    name: str
    sure: bool | None
    part: Part
    needed: Part = field(metadata=NEEDED)
    parts: tuple[Part, ...]
    free: Mapping[str, Any] | None
    settings: Settings
    later: Part | None = field(default=None, metadata=LATER)
    odd: float | None = field(
        default=None, metadata={"may_lack": True, "only": lambda thing: thing.sure}
    )


PART = {"number": 0.5, "count": 2}
THING = {"name": "a", "sure": True, "part": PART, "needed": PART, "parts": [PART, PART]}
THING |= {"free": {"x": 1}, "settings": {"a": 1, "b": [2]}, "later": PART, "odd": 0.25}


def test_an_object_is_written_as_it_was_read():
    thing = read(Thing, THING, "", salvage=False)
    assert thing.parts[1] == thing.part == Part(number=0.5, count=2)
    assert thing.settings.all == {"a": 1, "b": [2]}
    assert written(thing) == THING
    assert list(written(thing)) == list(THING)


def test_keys_that_are_not_declared_are_left_out():
    assert written(read(Thing, THING | {"more": 1}, "", salvage=False)) == THING


def test_null_reads_as_nothing_and_is_written_as_null():
    thing = read(Thing, THING | {"part": None, "free": None, "later": None}, "", salvage=False)
    assert thing.part is nothing(Part) == Part(number=None, count=None)
    assert (thing.free, thing.later) == (None, None)
    assert written(thing) == THING | {"part": None, "free": None, "later": None}
    assert nothing(Thing).parts == ()
    assert nothing(Thing).needed is nothing(Part)


def test_what_may_lack_and_what_only_some_write():
    thing = read(Thing, {key: THING[key] for key in THING if key != "odd"}, "", salvage=False)
    assert thing.odd is None
    assert written(thing)["odd"] is None
    assert "odd" not in written(read(Thing, THING | {"sure": False}, "", salvage=False))


@pytest.mark.parametrize("value", [..., "a text", {"number": "a text"}, {}])
def test_what_came_later_is_null_where_it_is_missing_or_of_another_type(value):
    record = {key: THING[key] for key in THING if key != "later"}
    record |= {} if value is ... else {"later": value}
    assert read(Thing, record, "", salvage=False).later is None
    part = PART | {"count": "two"}
    assert read(Thing, THING | {"part": part}, "", salvage=False).part.count is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": None}, "at.name is null; expected a text"),
        ({"name": 3}, "at.name is a number; expected a text"),
        ({"sure": 1}, "at.sure is a number; expected true or false"),
        ({"needed": None}, "at.needed is null; expected an object"),
        ({"part": []}, "at.part is a list; expected an object"),
        ({"part": {"count": 1}}, "the key at.part.number is missing"),
        ({"parts": {}}, "at.parts is an object; expected a list"),
        ({"parts": [PART, None]}, "at.parts[1] is null; expected an object"),
        ({"parts": [{"number": True}]}, "at.parts[0].number is true or false; expected a number"),
        ({"free": []}, "at.free is a list; expected an object"),
        ({"odd": 1e301}, "at.odd is a number; expected a number or null"),
    ],
)
def test_what_is_wrong_is_named(change, sentence):
    with pytest.raises(StoreError) as caught:
        read(Thing, THING | change, "at", salvage=False)
    assert sentence in str(caught.value)


def test_what_is_no_number_counts_as_one_where_it_is_no_loss():
    for value in (math.inf, -math.inf, 3, None):
        assert read(Thing, THING | {"odd": value}, "", salvage=False).odd == value
    assert math.isnan(read(Thing, THING | {"odd": math.nan}, "", salvage=False).odd)


def test_salvaging_takes_what_is_sound():
    record = {"name": "a", "sure": "yes", "part": {"number": 1.5}, "parts": 3, "settings": None}
    thing = read(Thing, record, "", salvage=True)
    assert (thing.name, thing.sure, thing.part.number, thing.parts) == ("a", None, 1.5, ())
    assert (thing.needed, thing.settings.all) == (nothing(Part), {})
    assert read(Thing, {}, "", salvage=True).name is None
